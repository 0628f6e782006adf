"""D8: texts of any kind and length in the cells."""

import gc
import os
import time
from pathlib import Path

import pandas as pd
import pytest

from mmbert_core.predictor import Predictor
from mmbert_core.runtime.memory import peak_mb, reset_peak
from mmbert_core.training.memory import return_freed_memory
from tests.faults.inputs import (
    HEADER,
    count_prediction,
    predictions_of,
    read_tsv,
    rows_of,
    table_of,
    train_run,
    trained,
    write_config,
    write_rows,
)
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


# ---- D8: texts ----

TEXTS = {
    "empty": "",
    "blank": "   ",
    "line breaks and tabs": " \t\r\n ",
    "NaN": "NaN",
    "emoji": "refund 😀👩‍👩‍👧‍👦🏳️‍🌈 now",
    "right to left": "\u202eأعيدوا مالي\u202c שלום",
    "zero width": "re\u200bfu\u200dnd\ufeff",
    "combining marks": "z" + "\u0301" * 500,
    "only unknown tokens": "日本 ☃ ᚠᚢ ∑",
    "special tokens": "[SEP] [PAD] [CLS] [MASK] [UNK]",
    "control characters": "\x01\x02\x1b[31m\x7f",
    "markup": "<script>alert(1)</script> {{7*7}} %s %n",
}
LONG = 1_000_000
LONG_TEXTS = {
    "10^6 characters without a space": "x" * LONG,
    "10^6 characters with spaces": "refund pay " * (LONG // 11),
    "10^6 spaces": " " * LONG,
    "10^6 emoji": "😀" * LONG,
    "10^6 combining marks": "\u0301" * LONG,
}


@row(
    "D8",
    "texts: empty, blank, NaN, emoji, right to left, zero width, unknown or special tokens",
    "each gives a prediction, finite, summing to 1 within 1e-6; neighbours unchanged; trained on as well",
)
def test_D8_odd_texts(tmp_path: Path) -> Figures:
    figures = Figures()
    model = trained(3) / "run"
    texts = [*TEXTS.values(), *LONG_TEXTS.values()]
    source = write_rows(tmp_path / "all.csv", table_of(text=texts))
    together = count_prediction(figures, "together", source, tmp_path / "all.tsv", num_rows=len(texts), model=model)
    for (case, text), line in zip((TEXTS | LONG_TEXTS).items(), together, strict=True):
        source = write_rows(tmp_path / "one.csv", table_of(text=[text]))
        [alone] = count_prediction(figures, case, source, tmp_path / "one.tsv", num_rows=1, model=model)
        differences = [abs(float(alone[name]) - float(line[name])) for name in alone if name.startswith("prob")]
        figures.count(max(differences) <= 1e-6, f"{case}: {max(differences)} away from the same row among others")
    frame = pd.DataFrame(table_of(text=["x"] * 4)[1:], columns=HEADER).assign(text=[None, float("nan"), pd.NA, ""])
    found = Predictor.from_folder(model).predict(frame)["prob_0"].tolist()
    figures.count(max(found) - min(found) <= 1e-6, f"missing texts of a frame differ: {found}")
    rows = rows_of("train")
    for index, text in enumerate(texts, start=1):
        rows[index][1] = text
    paths = {
        "train_path": write_rows(tmp_path / "train.csv", rows),
        "test_path": write_rows(tmp_path / "test.csv", table_of(text=texts)),
    }
    done = train_run(
        figures, "trained on them", write_config(tmp_path, trained(), model_path=tmp_path / "run", **paths)
    )
    warning = " texts are longer than 1 x 32 tokens (max_chunks x max_length) and were truncated"
    figures.count(warning in done.err, f"trained on them: truncated texts not counted: {done.err}")
    figures.count(len(read_tsv(predictions_of(tmp_path / "run"))) == len(texts), "trained on them: test rows lost")
    return figures


def start_peak() -> float:
    """Start a new peak and return the resident MB now, without freed memory, which could be used again unnoticed."""
    gc.collect()
    return_freed_memory()
    reset_peak()
    return peak_mb()


@row(
    "D8",
    "texts of 10^6 characters, with and without spaces",
    "at most 1 s a row and 200 MB of extra memory, of one row and of a file of them",
    full={"num_rows": 1000},
)
def test_D8_long_texts(tmp_path: Path, num_rows: int = 300) -> Figures:
    figures = Figures()
    predictor = Predictor.from_folder(trained() / "run")
    short = write_rows(tmp_path / "short.csv", table_of(text=["refund pay " * 100] * 256))
    predictor.predict_file([str(short)], tmp_path / "short.tsv")  # the first batch's allocations are not measured
    for case, text in LONG_TEXTS.items():
        measured = []
        for count in (1, num_rows) if len(text.encode()) <= LONG else (1,):  # several bytes a character: one row
            source = write_rows(tmp_path / "long.csv", table_of(text=[text] * count))
            before, started = start_peak(), time.perf_counter()
            num_predicted = predictor.predict_file([str(source)], tmp_path / "long.tsv")
            seconds, extra = (time.perf_counter() - started) / count, peak_mb() - before
            figures.rows_lost += count - num_predicted
            figures.count(
                seconds <= 1 and extra <= 200, f"{count} rows of {case}: {seconds:.2f} s a row, {extra:.0f} MB"
            )
            measured.append(f"{max(extra, 0):.0f} MB for {count}")
            os.remove(source)
        figures.notes.append(f"{case}: {1000 * seconds:.0f} ms a row, extra memory {', '.join(measured)}")
    return figures
