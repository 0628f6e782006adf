"""The sample of the demo: generated buyer-seller messages with tabular columns, and a small BERT for them.

The label says whether a message is abuse, and needs text AND columns:

1. a *request* (pay outside the shop, talk elsewhere, money back without returning the item) is abuse
   only from a *risky* account: younger than 60 days, or with 4 or more past refunds;
2. a *threat* is abuse from any account (text alone decides);
3. any message of an account with 40 or more messages in the last day is abuse (columns alone decide);
4. everything else is not; a missing cell counts as harmless. Then 2 % of the labels are flipped.

The rule is a text score plus a column score above a threshold, because the merge network (ReLU, then one linear layer
over the concatenation) can express nothing else: it cannot learn requests with *opposite* account rules.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoModel, BertConfig, BertTokenizerFast

from mmbert_core.storage.files import mode_of_new_files

TEXT_COLUMN, ID_COLUMN, LABEL_COLUMN = "message", "message_id", "is_abuse"
NUMBER_COLUMNS = ("account_age_days", "order_value", "past_refunds", "messages_last_day")
CATEGORY_COLUMNS = ("item_category", "ship_country")
BENIGN, REQUEST, THREAT = 0, 1, 2  # kinds of messages; not a column of the table

YOUNG_DAYS, MANY_REFUNDS, MANY_MESSAGES = 60, 4, 40  # thresholds of the rule
LABEL_NOISE = 0.02
MISSING_NUMBER, MISSING_CATEGORY = 0.04, 0.02  # shares of empty cells

# ---- words ----

ITEMS = {
    "phones": ("phone", "phone case", "charger", "headset", "tablet"),
    "clothing": ("jacket", "dress", "coat", "sweater", "scarf"),
    "shoes": ("pair of sneakers", "pair of boots", "pair of sandals", "running shoe"),
    "home": ("lamp", "carpet", "mirror", "coffee table", "blender"),
    "toys": ("puzzle", "board game", "doll house", "model train"),
    "gift cards": ("gift card", "voucher", "game code"),
}
COUNTRIES = ("DE", "FR", "IT", "ES", "PL", "NL", "GB", "US", "CA", "AU")
SLOTS = {
    "outside": ("by bank transfer", "with crypto", "by wire", "in cash", "with prepaid vouchers", "by western union"),
    "app": ("whatsapp", "telegram", "signal", "my private email", "sms"),
    "money": ("20 euro", "35 dollars", "80 euro", "the 120", "half the price", "the full amount", "49.90"),
    "when": ("today", "tonight", "tomorrow", "this week", "on friday", "as soon as possible", "right now"),
    "past": ("yesterday", "this morning", "on friday", "last week", "two days ago"),
    "colour": ("black", "blue", "dark green", "red", "white", "grey"),
    "size": ("small", "medium", "large", "the bigger size", "another size"),
    "person": ("daughter", "brother", "wife", "friend", "mother", "neighbour"),
}
REQUESTS = (
    "can i pay you {outside} instead of the checkout?",
    "i would rather send {money} {outside}, that saves us both the fee",
    "please cancel the order here and i will transfer {money} {outside} {when}",
    "let us settle it {outside} and not through the site",
    "is a direct payment {outside} possible? the card form never works for me",
    "write to me on {app} and we arrange the rest between us",
    "please answer me on {app}, i do not want to discuss this here",
    "send your number, then we continue on {app} {when}",
    "give me my money back {when}, i will not return the {item}",
    "i demand {money} back and i keep the {item}, it never worked",
    "refund me {money} {when} or i open a dispute with my bank",
    "the {item} arrived empty, so i demand everything back without a return",
)
THREATS = (
    "i know where your shop is and you will be sorry",
    "you are a pathetic liar, watch your back",
    "i will find you and make you regret this",
    "you disgusting thief, i hope your shop burns down",
    "people like you deserve to get hurt, idiot",
)
BENIGN_SENTENCES = (
    "when will the {item} be shipped?",
    "is the {item} still available in {colour}?",
    "does the {item} come in {size} as well?",
    "thank you for the refund {past}, the new {item} is much better",
    "i paid through the checkout {past}, did the payment arrive?",
    "could you please send an invoice for the {item}?",
    "the {item} arrived {past} and my {person} loves it",
    "which fee do you charge for express delivery?",
    "how do i return the {item} if {size} does not fit?",
    "the tracking page shows nothing for my {item} yet",
    "can you pack the {item} as a present for my {person}?",
    "i typed the wrong street, can the address still be changed?",
    "my {person} wants the same {item} in {colour}, do you have one more?",
    "is there a discount if i order two of them at the checkout?",
    "please tell me whether the {item} has a warranty",
    "the {item} looks great, i will leave a good review {when}",
)
OPENINGS = (
    "hi,",
    "hello,",
    "hey there,",
    "good morning,",
    "dear seller,",
    "hi again,",
    "hello, me again,",
    "sorry to bother you,",
)
FILLERS = (
    "i ordered the {item} a few days ago.",
    "it would be for my {person}.",
    "i have been waiting since monday.",
    "i am travelling next week, so time is short.",
    "your shop was recommended to me by my {person}.",
    "the photos show it in {colour}.",
    "i bought from you before.",
    "my phone corrects everything, sorry for mistakes.",
    "i could not find the answer on your page.",
)
CLOSINGS = (
    "thanks!",
    "thank you very much",
    "best regards",
    "please reply soon",
    "waiting for your answer",
    "have a nice day",
    "cheers",
    "let me know",
)


# ---- table ----


def sample_table(num_rows: int, seed: int) -> pd.DataFrame:
    """`num_rows` messages as a table of strings ("" is missing); the same rows for the same `num_rows` and `seed`."""
    return draw_sample(num_rows, seed)[0]


def draw_sample(num_rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The table, and the kind of each message: [num_rows] of BENIGN, REQUEST, THREAT."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice([BENIGN, REQUEST, THREAT], size=num_rows, p=[0.48, 0.45, 0.07])
    numbers = _draw_numbers(rng, num_rows)
    risky = risky_account(numbers)
    # risky accounts buy what is easy to resell: a weak signal in this column
    categories = list(ITEMS)
    item_category = np.where(
        risky,
        rng.choice(categories, size=num_rows, p=[0.2, 0.18, 0.18, 0.14, 0.12, 0.18]),
        rng.choice(categories, size=num_rows, p=[0.16, 0.2, 0.19, 0.17, 0.16, 0.12]),
    )
    messages = [
        _write_message(rng, int(kind), str(category)) for kind, category in zip(kinds, item_category, strict=True)
    ]
    is_abuse = abuse_rule(kinds, numbers) ^ (rng.random(num_rows) < LABEL_NOISE)

    frame = pd.DataFrame({ID_COLUMN: [f"m{row:06d}" for row in range(num_rows)], TEXT_COLUMN: messages}, dtype=object)
    for name in NUMBER_COLUMNS:
        decimals = 2 if name == "order_value" else 0
        frame[name] = ["" if np.isnan(value) else f"{value:.{decimals}f}" for value in numbers[name]]
    country = rng.choice(COUNTRIES, size=num_rows)
    for name, values in (("item_category", item_category), ("ship_country", country)):
        missing = rng.random(num_rows) < MISSING_CATEGORY
        frame[name] = ["" if is_missing else str(value) for value, is_missing in zip(values, missing, strict=True)]
    frame[LABEL_COLUMN] = np.where(is_abuse, "1", "0").astype(object)
    return frame.astype(object), kinds


def risky_account(numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Bool [N]: young, or with many refunds. NaN compares false: a missing cell counts as harmless."""
    return (numbers["account_age_days"] < YOUNG_DAYS) | (numbers["past_refunds"] >= MANY_REFUNDS)


def abuse_rule(kinds: np.ndarray, numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Bool [N]: the rule of the module's docstring, before label noise."""
    request_of_risky = (kinds == REQUEST) & risky_account(numbers)
    return request_of_risky | (kinds == THREAT) | (numbers["messages_last_day"] >= MANY_MESSAGES)


def _draw_numbers(rng: np.random.Generator, num_rows: int) -> dict[str, np.ndarray]:
    """Numeric column -> float64 [N], NaN for an empty cell."""

    def mixture(share: float, low: tuple[int, int], high: tuple[int, int]) -> np.ndarray:
        rare, common = rng.integers(*low, size=num_rows), rng.integers(*high, size=num_rows)
        return np.where(rng.random(num_rows) < share, rare, common).astype(np.float64)

    numbers = {
        "account_age_days": mixture(0.25, (1, YOUNG_DAYS - 5), (YOUNG_DAYS + 20, 900)),
        "order_value": np.round(rng.gamma(2.0, 40.0, size=num_rows) + 5.0, 2),
        "past_refunds": mixture(0.25, (MANY_REFUNDS, 9), (0, 3)),
        "messages_last_day": mixture(0.03, (MANY_MESSAGES, 80), (1, 20)),
    }
    for values in numbers.values():
        values[rng.random(num_rows) < MISSING_NUMBER] = np.nan
    return numbers


# ---- messages ----


def _write_message(rng: np.random.Generator, kind: int, category: str) -> str:
    """One message of 8 to 60 words about one item of `category`."""
    slots = SLOTS | {"item": (ITEMS[category][int(rng.integers(len(ITEMS[category])))],)}
    core = [_fill(rng, {BENIGN: BENIGN_SENTENCES, REQUEST: REQUESTS, THREAT: THREATS}[kind], slots)]
    if kind == BENIGN or rng.random() < 0.5:  # most requests come with a harmless sentence
        core.insert(int(rng.integers(2)), _fill(rng, BENIGN_SENTENCES, slots))
    before = [_fill(rng, FILLERS, slots)] if rng.random() < 0.5 else []
    after = [_fill(rng, FILLERS, slots)] if rng.random() < 0.25 else []
    after += [_fill(rng, CLOSINGS, slots)] if rng.random() < 0.6 else []
    sentences = list(dict.fromkeys(before + core + after))  # no sentence twice
    while sum(len(sentence.split()) for sentence in sentences) < 8:
        sentences.insert(0, _fill(rng, FILLERS, slots))
    if rng.random() < 0.7:
        sentences[0] = f"{_fill(rng, OPENINGS, slots)} {sentences[0]}"
    if rng.random() < 0.6:  # a writer who uses capitals and full stops
        sentences = [re.sub(r"\bi\b", "I", sentence[0].upper() + sentence[1:]) for sentence in sentences]
        sentences = [sentence if sentence[-1] in ".,?!" else sentence + "." for sentence in sentences]
    # some line breaks: a row of a CSV file may have several lines
    text = ("\n" if rng.random() < 0.08 else " ").join(sentences)
    return _mistype(rng, text) if rng.random() < 0.25 else text


def _fill(rng: np.random.Generator, templates: Sequence[str], slots: dict[str, Sequence[str]]) -> str:
    """A random template with random words in its slots."""

    def pick(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    return re.sub(r"\{(\w+)\}", lambda slot: pick(slots[slot.group(1)]), pick(templates))


def _mistype(rng: np.random.Generator, text: str) -> str:
    """Swap two adjacent letters inside a word of four or more, or drop the second of them."""
    words = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    start, end = words[int(rng.integers(len(words)))]
    index = int(rng.integers(start + 1, end - 1))
    replacement = text[index + 1] + text[index] if rng.random() < 0.6 else text[index]
    return text[:index] + replacement + text[index + 2 :]


# ---- files ----


def write_sample(folder: str | Path, *, num_rows: int = 6000, seed: int = 0) -> dict[str, Path]:
    """Write train.csv (3/4 of the rows), val.csv and test.csv (1/8 each); the same bytes for the same arguments.

    Returns the paths under "train", "val", "test".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = sample_table(num_rows, seed)
    first, second = num_rows * 6 // 8, num_rows * 7 // 8
    splits = {"train": table[:first], "val": table[first:second], "test": table[second:]}
    paths = {name: folder / f"{name}.csv" for name in splits}
    for name, split in splits.items():
        split.to_csv(paths[name], index=False, lineterminator="\n", encoding="utf-8")
    return paths


def wordpiece_vocabulary(texts: Iterable[str], *, max_words: int = 2000, min_count: int = 2) -> dict[str, int]:
    """Piece -> id: special tokens, every character alone and as a continuation, then whole words, most frequent first.

    The trainer of `tokenizers` is not used: its ids depend on the order of a hash map and differ between processes, but
    equal seeds must give equal files.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()  # as a BERT tokenizer, before WordPiece
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation).union(*words))
    frequent = [word for word, count in words.items() if count >= min_count and len(word) > 1]
    frequent.sort(key=lambda word: (-words[word], word))
    special = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
    pieces = [*special, *characters, *(f"##{character}" for character in characters)]
    return {piece: index for index, piece in enumerate(pieces + frequent[:max_words])}


def write_small_encoder(folder: str | Path, texts: Iterable[str], *, seed: int = 0) -> Path:
    """Save a small untrained BERT (2 layers, hidden 64, up to 128 tokens) and a tokenizer of the words of `texts`.

    Returns the folder. The weights are random numbers from `seed`. `from_pretrained(folder)` loads both without
    network; equal texts and seed give equal files.
    """
    folder = Path(folder)
    vocabulary = wordpiece_vocabulary(texts)
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=128)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=128,
        pad_token_id=vocabulary["[PAD]"],
    )
    with torch.random.fork_rng(devices=[]):  # restores the caller's random state
        torch.manual_seed(seed)
        encoder = AutoModel.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    with mode_of_new_files(folder / "model.safetensors"):
        encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
