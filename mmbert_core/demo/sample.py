"""The built-in sample: buyer-seller messages with tabular columns, and a small BERT for them.

The label says whether a message is abuse, and needs text AND columns:

1. a *request* (pay outside the shop, talk elsewhere, money back without returning the item) is abuse
   only from a *risky* account: younger than 60 days, or with 4 or more past refunds;
2. a *threat* is abuse whoever wrote it (text alone says so);
3. whatever an account with 40 or more messages in the last day writes is abuse (columns alone say so);
4. everything else is not; a missing cell counts as harmless; then 2 % of the labels are flipped.

The rule is a sum of a text score and a column score over a threshold, because that is all the merge network
(ReLU, then one linear layer over the concatenation) can express: two requests with *opposite* account rules it cannot.
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
BENIGN, REQUEST, THREAT = 0, 1, 2  # what a message is about; never written into the table

YOUNG_DAYS, MANY_REFUNDS, MANY_MESSAGES = 60, 4, 40  # thresholds of the rule
LABEL_NOISE = 0.02
MISSING_NUMBER, MISSING_CATEGORY = 0.04, 0.02  # shares of empty cells

# ---- words ------------------------------------------------------------------------------------------------------------

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


# ---- table ------------------------------------------------------------------------------------------------------------


def sample_table(num_rows: int, seed: int) -> pd.DataFrame:
    """`num_rows` messages as a table of strings ("" is missing); the same rows for the same `num_rows` and `seed`."""
    return draw_sample(num_rows, seed)[0]


def draw_sample(num_rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The table, and beside it what each message is about: [num_rows] of BENIGN, REQUEST, THREAT."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice([BENIGN, REQUEST, THREAT], size=num_rows, p=[0.48, 0.45, 0.07])
    numbers = _draw_numbers(rng, num_rows)
    risky = risky_account(numbers)
    # risky accounts buy what is easily sold on: a weak hint that no single column gives away
    categories = list(ITEMS)
    item_category = np.where(
        risky,
        rng.choice(categories, size=num_rows, p=[0.2, 0.18, 0.18, 0.14, 0.12, 0.18]),
        rng.choice(categories, size=num_rows, p=[0.16, 0.2, 0.19, 0.17, 0.16, 0.12]),
    )
    messages = [_write_message(rng, int(kind), str(category)) for kind, category in zip(kinds, item_category)]
    is_abuse = abuse_rule(kinds, numbers) ^ (rng.random(num_rows) < LABEL_NOISE)

    frame = pd.DataFrame({ID_COLUMN: [f"m{row:06d}" for row in range(num_rows)], TEXT_COLUMN: messages}, dtype=object)
    for name in NUMBER_COLUMNS:
        decimals = 2 if name == "order_value" else 0
        frame[name] = ["" if np.isnan(value) else f"{value:.{decimals}f}" for value in numbers[name]]
    country = rng.choice(COUNTRIES, size=num_rows)
    for name, values in (("item_category", item_category), ("ship_country", country)):
        missing = rng.random(num_rows) < MISSING_CATEGORY
        frame[name] = ["" if gone else str(value) for value, gone in zip(values, missing)]
    frame[LABEL_COLUMN] = np.where(is_abuse, "1", "0").astype(object)
    return frame.astype(object), kinds


def risky_account(numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Bool [N]: young, or often refunded. NaN compares false, so a missing cell counts as harmless."""
    return (numbers["account_age_days"] < YOUNG_DAYS) | (numbers["past_refunds"] >= MANY_REFUNDS)


def abuse_rule(kinds: np.ndarray, numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Bool [N]: the rule of the module's docstring, before label noise."""
    request_of_risky = (kinds == REQUEST) & risky_account(numbers)
    return request_of_risky | (kinds == THREAT) | (numbers["messages_last_day"] >= MANY_MESSAGES)


def _draw_numbers(rng: np.random.Generator, num_rows: int) -> dict[str, np.ndarray]:
    """Float64 [N] per number column, NaN where the cell will be empty."""

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


# ---- messages ---------------------------------------------------------------------------------------------------------


def _write_message(rng: np.random.Generator, kind: int, category: str) -> str:
    """One message of 8 to 60 words about one item of `category`."""
    slots = SLOTS | {"item": (ITEMS[category][int(rng.integers(len(ITEMS[category])))],)}
    core = [_fill(rng, {BENIGN: BENIGN_SENTENCES, REQUEST: REQUESTS, THREAT: THREATS}[kind], slots)]
    if kind == BENIGN or rng.random() < 0.5:  # requests hide among harmless sentences
        core.insert(int(rng.integers(2)), _fill(rng, BENIGN_SENTENCES, slots))
    before = [_fill(rng, FILLERS, slots)] if rng.random() < 0.5 else []
    after = [_fill(rng, FILLERS, slots)] if rng.random() < 0.25 else []
    after += [_fill(rng, CLOSINGS, slots)] if rng.random() < 0.6 else []
    sentences = list(dict.fromkeys(before + core + after))  # nobody says the same thing twice
    while sum(len(sentence.split()) for sentence in sentences) < 8:
        sentences.insert(0, _fill(rng, FILLERS, slots))
    if rng.random() < 0.7:
        sentences[0] = f"{_fill(rng, OPENINGS, slots)} {sentences[0]}"
    if rng.random() < 0.6:  # a careful writer
        sentences = [re.sub(r"\bi\b", "I", sentence[0].upper() + sentence[1:]) for sentence in sentences]
        sentences = [sentence if sentence[-1] in ".,?!" else sentence + "." for sentence in sentences]
    # a line break now and then: rows of a CSV file are not lines
    text = ("\n" if rng.random() < 0.08 else " ").join(sentences)
    return _mistype(rng, text) if rng.random() < 0.25 else text


def _fill(rng: np.random.Generator, templates: Sequence[str], slots: dict[str, Sequence[str]]) -> str:
    """A random template with a random word in each of its slots."""

    def pick(choices: Sequence[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    return re.sub(r"\{(\w+)\}", lambda slot: pick(slots[slot.group(1)]), pick(templates))


def _mistype(rng: np.random.Generator, text: str) -> str:
    """Swap two neighbouring letters inside one longer word, or lose the second of them."""
    words = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    start, end = words[int(rng.integers(len(words)))]
    at = int(rng.integers(start + 1, end - 1))
    kept = text[at + 1] + text[at] if rng.random() < 0.6 else text[at]
    return text[:at] + kept + text[at + 2 :]


# ---- files ------------------------------------------------------------------------------------------------------------


def write_sample(folder: str | Path, *, num_rows: int = 6000, seed: int = 0) -> dict[str, Path]:
    """Write train.csv (3/4 of the rows), val.csv and test.csv (1/8 each); the same bytes for the same arguments.

    Returns the paths under "train", "val", "test".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = sample_table(num_rows, seed)
    first, second = num_rows * 6 // 8, num_rows * 7 // 8
    parts = {"train": table[:first], "val": table[first:second], "test": table[second:]}
    paths = {name: folder / f"{name}.csv" for name in parts}
    for name, part in parts.items():
        part.to_csv(paths[name], index=False, lineterminator="\n", encoding="utf-8")
    return paths


def wordpiece_vocabulary(texts: Iterable[str], *, max_words: int = 2000, min_count: int = 2) -> dict[str, int]:
    """Piece -> id: special tokens, every character alone and as a continuation, then whole words, most frequent first.

    Counted here rather than by `tokenizers`' trainer, whose ids depend on the order of a hash map: they differ
    from process to process, and equal seeds must give equal files.
    """
    normalizer, splitter = (
        BertNormalizer(lowercase=True),
        BertPreTokenizer(),
    )  # what a BERT tokenizer does before WordPiece
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation).union(*words))
    frequent = [word for word, count in words.items() if count >= min_count and len(word) > 1]
    frequent.sort(key=lambda word: (-words[word], word))
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{character}" for character in characters),
    ]
    return {piece: index for index, piece in enumerate(pieces + frequent[:max_words])}


def write_small_encoder(folder: str | Path, texts: Iterable[str], *, seed: int = 0) -> Path:
    """Save a small untrained BERT (2 layers, hidden 64, up to 128 tokens) and a tokenizer made from `texts`; returns the folder.

    The weights are random numbers from `seed`: nothing in it is pretrained. Both load with `from_pretrained(folder)`
    without network, and equal texts and seed give equal files.
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
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        encoder = AutoModel.from_config(config)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with mode_of_new_files(Path(folder) / "model.safetensors"):
        encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
