"""A frame of all dtypes, a tiny encoder, and a model that was fitted on both once."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmbert_core import MultimodalClassifier
from tests.support import tiny

NUM_ROWS = 120
QUICK = {  # settings with which a training takes about a second
    "recipe": "original",
    "max_epochs": 1,
    "lr": 1e-3,
    "num_threads": 1,
    "max_length": 16,
    "batch_size": 16,
    "val_fraction": 0.2,
    "hidden_common_dim": 8,
}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    return str(tiny.write_encoder(tmp_path_factory.mktemp("encoder") / "bert", hidden=16, layers=1))


def frame_of(num_rows: int = NUM_ROWS, seed: int = 0) -> pd.DataFrame:
    """Columns of numpy's, nullable, categorical and date dtypes with missing values, and the label `is_abuse`."""
    rng = np.random.default_rng(seed)
    row = np.arange(num_rows)
    texts = [" ".join(rng.choice(tiny.WORDS, size=6)) for _ in row]
    ages = [None if index % 9 == 0 else int(age) for index, age in enumerate(rng.integers(0, 90, num_rows))]
    frame = pd.DataFrame(
        {
            "key": [f"r{index:04d}" for index in row],
            "message": pd.array(texts, dtype="string"),
            "age": pd.array(ages, dtype="Int64"),
            "amount": np.where(row % 11 == 0, np.nan, rng.normal(size=num_rows)).astype(np.float32),
            "kind": pd.Categorical(rng.choice(["a", "b", "c"], num_rows)),
            "grade": pd.Categorical(rng.integers(1, 5, num_rows)),
            "has_photo": pd.array(rng.choice([True, False, None], num_rows), dtype="boolean"),
            "is_new": rng.random(num_rows) < 0.5,
            "country": pd.Series(rng.choice(["NL", 'D"E', None, np.nan], num_rows), dtype=object),
            "sent": pd.date_range("2024-01-01 08:30", periods=num_rows, freq="7h"),
            "tags": [["x"]] * num_rows,
        },
        index=rng.permutation(num_rows),
    )
    frame.iloc[3, frame.columns.get_loc("sent")] = pd.NaT
    frame.iloc[5, frame.columns.get_loc("message")] = pd.NA
    frame.iloc[7, frame.columns.get_loc("kind")] = None
    frame.iloc[8, frame.columns.get_loc("message")] = 'two\r\nlines, "quoted"\tpay'
    frame["is_abuse"] = [int("pay" in text or "bank" in text) for text in texts]
    return frame


@pytest.fixture(scope="session")
def frame() -> pd.DataFrame:
    return frame_of()


@pytest.fixture(scope="session")
def fitted(encoder, frame) -> MultimodalClassifier:
    return MultimodalClassifier(encoder=encoder, **QUICK).fit(frame, label="is_abuse")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
