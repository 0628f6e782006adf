"""What a column's name says: an identifier, a code, a person's data, the label, or something that is known after it."""

import re

IDENTIFIER_WORDS = frozenset("id ids uid uuid guid identifier key".split())
ENTITY_WORDS = frozenset("user username customer client author session thread conversation dialogue visitor".split())
INDEX_NAMES = frozenset("index idx no nr".split())  # as the whole name
JOINED_IDENTIFIER = re.compile(
    r"(user|customer|client|member|account|order|item|product|session|message|tweet|post|thread|dialog|dialogue|case|"
    r"ticket|row|record|visitor|device|seller|buyer|author)_?ids?"
)
CODE_WORDS = frozenset("code codes zip zipcode postcode postal plz naics sic cluster type category".split())
PERSONAL_WORDS = frozenset(
    "email mail phone telephone mobile fax surname username handle address street url ip".split()
)
NAMED_PERSON = frozenset("first last full user customer client seller buyer author sender contact person".split())
TIME_WORDS = frozenset("time timestamp ts date datetime at created updated deadline launched utc epoch".split())
# Words for what exists only once the label does. Those of events (refund, payment) are not here: past ones are inputs.
LATE_WORDS = frozenset(
    """
    outcome resolution resolved response closed closure decision decided verdict disposition prediction predicted
    annotation annotator annotators groundtruth gold
    """.split()
)
LABEL_NAMES = frozenset("label labels target y class_label target_label label_name ground_truth gold_label".split())


def words_of_name(name: str) -> list[str]:
    """`Clothing ID`, clothing_id and clothingId -> clothing, id."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


def is_identifier(name: str) -> bool:
    """Whether a column is called an id of something, or what has one: order_id, userId, uuid, thread."""
    words = words_of_name(name)
    if not words:
        return False
    last_says_so = words[-1] in IDENTIFIER_WORDS | ENTITY_WORDS or JOINED_IDENTIFIER.fullmatch(words[-1]) is not None
    return last_says_so or (len(words) == 1 and words[0] in INDEX_NAMES)


def is_code(name: str) -> bool:
    """Whether the numbers of a column are names: zip codes, types."""
    return any(word in CODE_WORDS for word in words_of_name(name))


def is_personal(name: str) -> bool:
    """Whether a column names or reaches a person: email, phone, customer_name."""
    words = words_of_name(name)
    return any(word in PERSONAL_WORDS for word in words) or (
        words[-1:] == ["name"] and any(word in NAMED_PERSON for word in words[:-1])
    )


def is_time(name: str) -> bool:
    """Whether a column is called a time: created_at, timestamp."""
    return any(word in TIME_WORDS for word in words_of_name(name))


def follows_label_by_name(name: str) -> bool:
    """Whether a column's name says that it is written when, or after, the label is known."""
    return any(word in LATE_WORDS for word in words_of_name(name))


def is_about_label(name: str, label: str) -> bool:
    """Whether a name holds the whole name of the label, of two words or more: sentiment_label_confidence."""
    words, inner = words_of_name(name), words_of_name(label)
    starts = range(len(words) - len(inner) + 1)
    return len(inner) > 1 and any(words[start : start + len(inner)] == inner for start in starts)


def is_label_name(name: str) -> bool:
    """Whether a column is clearly called a label."""
    return "_".join(words_of_name(name)) in LABEL_NAMES
