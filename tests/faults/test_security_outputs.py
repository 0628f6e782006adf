"""Spreadsheet formulas in predictions, and secrets of the environment in files and output."""

import base64
import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.manipulated_runs import (
    Outcome,
    trained,
    write_config,
)
from tests.support import tiny
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


# ---- S4: formulas ----

FORMULAS = (
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://x","y")',
    "+",
    "-",
    "-x",
    "=\n1",
    "-2+3+cmd|' /C calc'!A0",
)
PLAIN_TEXTS = ("plain", "007", "a=b", "1e5", "NA", " =1", "'=1", "x\ty", 'say "hi"', "é=")
NUMBERS = ("-5", "+1.5", "-1e5", "-.5")  # a spreadsheet shows these unchanged


@row(
    "S4",
    "ids and class names that a spreadsheet would evaluate: = + - @ tab, carriage return first",
    "plain: byte for byte; --sheet_safe: a ' before them and before no other cell; probabilities the same in both",
)
def test_S4_formula_cells(tmp_path: Path) -> Figures:
    figures = Figures()
    ids = (*FORMULAS, *PLAIN_TEXTS, *NUMBERS)
    for is_binary in (True, False):
        folder = tmp_path / f"{2 if is_binary else 3}-classes"
        swaps = {"0": "=1+1", "1": "-x", "2": "@a\tb"}
        tiny.settings(folder, num_rows=48, num_classes=2 if is_binary else 3)
        for name in ("train", "val", "test"):
            with open(folder / f"{name}.csv", newline="") as stream:
                rows = list(csv.DictReader(stream))
            rows = [
                line | {"label": swaps[line["label"]], "=id": ids[index] if name == "test" else line["row_id"]}
                for index, line in enumerate(rows[: len(ids) if name == "test" else None])
            ]
            with open(folder / f"{name}.csv", "w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        labels = [line["label"] for line in rows]
        run = trained(folder, num_classes=2 if is_binary else 3, id_name="=id", max_epochs=1)
        tables = {}
        for words in ((), ("--sheet_safe",)):
            output = folder / f"out{len(words)}.tsv"
            outcome = Outcome("predict", run, folder / "test.csv", output, *words)
            if not figures.count(outcome.code == 0, f"predict {words}: {outcome}"):
                return figures
            with open(output, newline="", encoding="utf-8") as stream:
                tables[bool(words)] = list(csv.reader(stream, delimiter="\t"))
        with open(next(run.glob("multimodal_bert-*")) / "test_result_0.tsv", newline="", encoding="utf-8") as stream:
            figures.count(
                list(csv.reader(stream, delimiter="\t")) == tables[False],
                "the test stage's file differs from the plain one",
            )
        compare_cells(figures, tables[False], tables[True], ids, labels, swaps)
    return figures


def compare_cells(
    figures: Figures,
    plain: list[list[str]],
    safe: list[list[str]],
    ids: Sequence[str],
    labels: Sequence[str],
    swaps: dict[str, str],
) -> None:
    label, pred, calibrated = (len(plain[0]) - offset for offset in (3, 2, 1))  # probabilities are before the label
    figures.rows_lost += max(0, len(ids) - len(plain) + 1)
    figures.count([line[0] for line in plain[1:]] == list(ids), f"plain ids: {[line[0] for line in plain[1:]]}")
    figures.count([line[label] for line in plain[1:]] == list(labels), "plain labels")
    figures.count({line[pred] for line in plain[1:]} <= set(swaps.values()), "plain predicted classes")
    figures.count(plain[0][0] == "=id" and safe[0][0] == "'=id", f"header: {plain[0]} and {safe[0]}")
    for cells, safe_cells in zip(plain[1:], safe[1:], strict=True):
        for columns in (slice(1, label), slice(calibrated, None)):
            figures.count(
                cells[columns] == safe_cells[columns],
                f"probabilities {cells[columns]} became {safe_cells[columns]}",
            )
        for index in (0, label, pred):
            expected = cells[index] if cells[index] in (*PLAIN_TEXTS, *NUMBERS) else "'" + cells[index]
            figures.count(safe_cells[index] == expected, f"{cells[index]!r} became {safe_cells[index]!r}")


# ---- S5: secrets ----


@row(
    "S5",
    "secrets in the environment of a training on 2 processes, of one that fails, and of a prediction",
    "none of them in any file of the run or of the launcher, or in the output",
)
def test_S5_secrets_stay_in_the_environment(tmp_path: Path) -> Figures:
    figures = Figures()
    names = (
        "AWS_SECRET_ACCESS_KEY HF_TOKEN WANDB_API_KEY DATABASE_PASSWORD GITHUB_TOKEN HTTPS_PROXY "
        "MMBERT_SECRET SLURM_JWT"
    ).split()
    secrets = {name: f"canary-{hashlib.sha256(name.encode()).hexdigest()[:24]}" for name in names}
    secrets["HTTPS_PROXY"] = f"http://user:{secrets['HTTPS_PROXY']}@127.0.0.1:9"
    scratch, out = tmp_path / "scratch", tmp_path / "out.tsv"
    scratch.mkdir()
    config = write_config(tmp_path, max_epochs=1)
    environment = {**secrets, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    done = {"train": tiny.torchrun(2, ["train.py", str(config)], **environment)}
    figures.count(done["train"].returncode == 0, done["train"].stderr[-2000:])
    infinite = ["train.py", str(config), "--model_path", str(tmp_path / "fails"), "--lr", "1e30", "--warmup_steps", "0"]
    done["a training that fails"] = tiny.torchrun(2, infinite, **environment)
    figures.count(
        done["a training that fails"].returncode != 0, "the training with an absurd learning rate did not fail"
    )
    done["predict"] = tiny.run_command(
        ["-m", "mmbert_core", "predict", str(tmp_path / "run"), str(tmp_path / "test.csv"), str(out)], **environment
    )
    done["a prediction that fails"] = tiny.run_command(
        ["-m", "mmbert_core", "predict", str(tmp_path / "no"), str(tmp_path / "test.csv"), str(out)], **environment
    )
    texts = {f"{name}, printed": (process.stdout + process.stderr).encode() for name, process in done.items()}
    files = {str(path): path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    figures.count(any(path.startswith(str(tmp_path / "run")) for path in files) and out.exists(), "nothing was written")
    for source, content in {**texts, **files}.items():
        for name, secret in secrets.items():
            forms = (
                secret.encode(),
                secret.encode().hex().encode(),
                base64.b64encode(secret.encode()).rstrip(b"="),
                secret[::-1].encode(),
                secret.encode("utf-16-le"),
            )
            figures.count(not any(form in content for form in forms), f"{name} is in {source}")
    megabytes = sum(map(len, files.values())) / 2**20
    figures.notes.append(
        f"{len(files)} files of {megabytes:.1f} MB and {len(texts)} outputs searched for {len(secrets)} secrets"
    )
    return figures
