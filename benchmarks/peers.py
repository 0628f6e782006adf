"""What a practitioner has in a few lines: TF-IDF, frozen vectors and columns with logistic regression or LightGBM.

Every peer chooses its own settings by validation log loss and predicts validation and test rows. All are fitted on the
training rows alone.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.quality_scores import log_loss
from benchmarks.quality_sets import FILES, Rows
from mmbert_core.storage.files import sha256_of

C_GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
MAX_LENGTH = 512  # tokens of a text that frozen vectors are of; fewer where the encoder has fewer positions
BATCH_TOKENS = 8192  # padded, of one forward pass
SAVE_SECONDS = 20.0
LIGHTGBM = {
    "learning_rate": 0.05,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
    "feature_pre_filter": False,
}
COLUMN_GRID = {"num_leaves": (4, 15, 31), "min_data_in_leaf": (5, 20), "min_data_per_group": (10, 100)}
VECTOR_GRID = {"num_leaves": (4, 15), "min_data_in_leaf": (20,), "feature_fraction": (0.3,)}
ROUNDS, PATIENCE = 1000, 50


@dataclass
class Inputs:
    """The rows of one division, as the peers read them. Each dict is by file: train, val, test."""

    texts: dict[str, list[str]]  # empty without text columns
    numbers: dict[str, pd.DataFrame]  # NaN where missing; dates as numbers
    categories: dict[str, pd.DataFrame]  # "" where missing
    labels: dict[str, np.ndarray]
    num_classes: int
    seed: int
    num_threads: int
    vectors: dict[str, np.ndarray]  # only for the peers that need them


def inputs_of(rows: Rows, *, num_threads: int) -> Inputs:
    table_set, cells = rows.table_set, {name: rows.cells(name) for name in FILES}
    return Inputs(
        texts={name: texts_of(rows, each) for name, each in cells.items()},
        numbers={name: numbers_of(rows, each) for name, each in cells.items()},
        categories={
            name: pd.DataFrame({key: each[key] for key in table_set.categories}) for name, each in cells.items()
        },
        labels={name: rows.labels(name) for name in FILES},
        num_classes=len(table_set.classes),
        seed=rows.seed,
        num_threads=num_threads,
        vectors={},
    )


def texts_of(rows: Rows, cells: dict[str, list[str]]) -> list[str]:
    return [" ".join(filter(None, texts)) for texts in zip(*(cells[name] for name in rows.table_set.text))]


def numbers_of(rows: Rows, cells: dict[str, list[str]]) -> pd.DataFrame:
    found = {name: pd.to_numeric(pd.Series(cells[name]), errors="coerce") for name in rows.table_set.numbers}
    for name in rows.table_set.dates:
        dates = pd.to_datetime(pd.Series(cells[name]), errors="coerce", format="mixed")
        found |= {
            f"{name}: days": (dates - pd.Timestamp("1970-01-01")) / pd.Timedelta(days=1),
            f"{name}: month": dates.dt.month,
            f"{name}: weekday": dates.dt.weekday,
            f"{name}: hour": dates.dt.hour,
        }
    return pd.DataFrame(found).astype(float).replace([np.inf, -np.inf], np.nan)


# ---- logistic regression ----


def words(inputs: Inputs) -> dict[str, Any]:
    """TF-IDF of words and pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    fitted = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(inputs.texts["train"])
    return {name: fitted.transform(texts) for name, texts in inputs.texts.items()}


def columns(inputs: Inputs) -> dict[str, Any]:
    """One-hot categories and standardised numbers, the missing ones as the median with an indicator."""
    from scipy import sparse
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    found: dict[str, list[Any]] = {name: [] for name in FILES}
    if inputs.categories["train"].shape[1]:
        encoder = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=2).fit(inputs.categories["train"])
        for name in FILES:
            found[name].append(encoder.transform(inputs.categories[name]))
    if inputs.numbers["train"].shape[1]:
        imputer = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
        scaler = make_pipeline(imputer, StandardScaler()).fit(inputs.numbers["train"])
        for name in FILES:
            found[name].append(sparse.csr_matrix(scaler.transform(inputs.numbers[name])))
    return {name: sparse.hstack(blocks, format="csr") for name, blocks in found.items() if blocks}


def logistic_regression(inputs: Inputs, *blocks: dict[str, Any]) -> dict[str, np.ndarray]:
    """Blocks of features, C by validation log loss."""
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    blocks = tuple(block for block in blocks if block)
    features = {name: sparse.hstack([sparse.csr_matrix(each[name]) for each in blocks], format="csr") for name in FILES}

    def fitted(c: float) -> dict[str, np.ndarray]:
        with threadpool_limits(1):  # many products of small vectors, which threads only slow down
            model = LogisticRegression(C=c, max_iter=2000).fit(features["train"], inputs.labels["train"])
        found = {}
        for name in ("val", "test"):
            found[name] = np.zeros((features[name].shape[0], inputs.num_classes))
            found[name][:, model.classes_] = model.predict_proba(features[name])
        return found

    return best_of((fitted(c) for c in C_GRID), inputs)


def best_of(candidates: Iterator[dict[str, np.ndarray]], inputs: Inputs) -> dict[str, np.ndarray]:
    """The probabilities with the lowest validation log loss."""
    return min(candidates, key=lambda found: log_loss(found["val"], inputs.labels["val"]))


# ---- LightGBM ----


def lightgbm(inputs: Inputs, grid: dict[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Columns and, where there are any, vectors; early stopping and the point of the grid by validation log loss."""
    import lightgbm as library

    frames = {name: _frame(inputs, name) for name in FILES}
    has_categories = inputs.categories["train"].shape[1] > 0
    objective = (
        {"objective": "binary"}
        if inputs.num_classes == 2
        else {"objective": "multiclass", "num_class": inputs.num_classes}
    )

    def fitted(point: dict[str, Any]) -> dict[str, np.ndarray]:
        settings = LIGHTGBM | objective | point | {"seed": inputs.seed, "num_threads": inputs.num_threads}
        train = library.Dataset(frames["train"], inputs.labels["train"], params=settings, free_raw_data=False)
        val = library.Dataset(frames["val"], inputs.labels["val"], reference=train, free_raw_data=False)
        stop = library.early_stopping(PATIENCE, verbose=False)
        model = library.train(settings, train, ROUNDS, valid_sets=[val], callbacks=[stop])
        found = {name: model.predict(frames[name], num_iteration=model.best_iteration) for name in ("val", "test")}
        return {name: np.stack([1 - each, each], axis=1) if each.ndim == 1 else each for name, each in found.items()}

    points = [dict(zip(grid, values)) for values in product(*grid.values())]
    if not has_categories and "min_data_per_group" in grid:
        points = [point for point in points if point["min_data_per_group"] == grid["min_data_per_group"][0]]
    return best_of((fitted(point) for point in points), inputs)


def _frame(inputs: Inputs, name: str) -> pd.DataFrame:
    """Categories of the training rows; others are missing."""
    frame = inputs.numbers[name].copy()
    for column in inputs.categories[name]:
        known = sorted(set(inputs.categories["train"][column]))
        frame[column] = pd.Categorical(inputs.categories[name][column], categories=known)
    if inputs.vectors:
        vectors = pd.DataFrame(inputs.vectors[name], columns=[f"v{i}" for i in range(inputs.vectors[name].shape[1])])
        frame = pd.concat([frame, vectors], axis=1)
    return frame.set_axis(
        [f"column{number}" for number in range(frame.shape[1])], axis=1
    )  # names may hold any character


# ---- the peers by name ----


@dataclass(frozen=True)
class Peer:
    run: Callable[[Inputs], dict[str, np.ndarray]]  # probabilities [N, K] of val and test
    settings: dict[str, Any]  # what a stored result depends on
    needs_text: bool = False
    needs_columns: bool = False
    needs_vectors: bool = False


PEERS = {
    "words, LR": Peer(lambda i: logistic_regression(i, words(i)), {"C": C_GRID}, needs_text=True),
    "words + columns, LR": Peer(
        lambda i: logistic_regression(i, words(i), columns(i)), {"C": C_GRID}, needs_text=True, needs_columns=True
    ),
    "columns, LR": Peer(lambda i: logistic_regression(i, columns(i)), {"C": C_GRID}, needs_columns=True),
    "columns, LightGBM": Peer(lambda i: lightgbm(i, COLUMN_GRID), LIGHTGBM | COLUMN_GRID, needs_columns=True),
    "vectors + columns, LR": Peer(
        lambda i: logistic_regression(i, i.vectors, columns(i)), {"C": C_GRID}, needs_text=True, needs_vectors=True
    ),
    "vectors + columns, LightGBM": Peer(
        lambda i: lightgbm(i, VECTOR_GRID), LIGHTGBM | VECTOR_GRID, needs_text=True, needs_vectors=True
    ),
}
MEAN = "mean of the best four"  # peers of a set, by validation log loss


# ---- frozen vectors ----


class Vectors:
    """Mean-pooled, normalised vectors of a frozen encoder, each text encoded once and kept in a folder."""

    def __init__(self, folder: Path, encoder: str, *, num_threads: int) -> None:
        self.folder, self.encoder, self.num_threads = folder, encoder, num_threads
        self.sha = encoder_sha(encoder)
        self.path = folder / f"{self.sha}.npz"
        self.known: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}  # that each text took
        self.seconds_spent = 0.0  # by this object
        if self.path.exists():
            with np.load(self.path) as stored:
                self.known = dict(zip(stored["keys"].tolist(), stored["vectors"]))
                self.seconds = dict(zip(stored["keys"].tolist(), stored["seconds"].tolist()))

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """[N, H] float32."""
        keys = _keys(texts)
        missing = {key: text for key, text in zip(keys, texts) if key not in self.known}
        if missing:
            started = time.perf_counter()
            self._encode(missing)
            self.seconds_spent += time.perf_counter() - started
        return np.stack([self.known[key] for key in keys])

    def seconds_of(self, texts: Sequence[str]) -> float:
        """What encoding these texts took."""
        return sum(self.seconds[key] for key in _keys(texts))

    def _encode(self, texts: dict[str, str]) -> None:
        """Saved now and then, so that a killed benchmark continues."""
        torch.set_num_threads(self.num_threads)
        tokenizer = AutoTokenizer.from_pretrained(self.encoder)
        model = AutoModel.from_pretrained(self.encoder).eval()
        positions = getattr(model.config, "max_position_embeddings", MAX_LENGTH)
        encoded = tokenizer(list(texts.values()), truncation=True, max_length=min(MAX_LENGTH, positions))["input_ids"]
        keys, saved = list(texts), time.perf_counter()
        order = sorted(range(len(keys)), key=lambda index: len(encoded[index]))
        while order:
            size = max(1, BATCH_TOKENS // max(1, len(encoded[order[-1]])))
            batch, order = order[-size:], order[:-size]
            started = time.perf_counter()
            for index, vector in zip(batch, _vectors(model, tokenizer, [encoded[index] for index in batch])):
                self.known[keys[index]] = vector
            self.seconds |= {keys[index]: (time.perf_counter() - started) / len(batch) for index in batch}
            if not order or time.perf_counter() - saved > SAVE_SECONDS:
                self._save()
                saved = time.perf_counter()

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.stem}-{os.getpid()}.npz")
        np.savez(
            temporary,
            keys=np.array(list(self.known)),
            vectors=np.stack(list(self.known.values())),
            seconds=np.array([self.seconds[key] for key in self.known]),
        )
        os.replace(temporary, self.path)


def _keys(texts: Sequence[str]) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]


def encoder_sha(folder: str) -> str:
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors", ".txt"))
    return hashlib.sha256(json.dumps([sha256_of(path) for path in files]).encode()).hexdigest()[:12]


def _vectors(model: Any, tokenizer: Any, input_ids: list[list[int]]) -> np.ndarray:
    padded = tokenizer.pad({"input_ids": input_ids}, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state
    mask = padded["attention_mask"][..., None].float()
    means = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(means, dim=1).numpy()
