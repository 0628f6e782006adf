"""D1 to D3: every row predicted once, in order, with the same figures, on any number of processes. Real processes."""

import atexit
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mmbert_core.storage.files import read_json
from tests.faults.inputs import command, predictions_of, read_tsv, rows_of, trained, write_config, write_rows
from tests.support import tiny
from tests.support.bad_tables import read_rows
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault

WORKER = str(tiny.ROOT / "tests/faults/rows_worker.py")
MODELS = {"two": 2, "three": 3}
SIZES = (0, 1, 2, 3, 4, 5, 97)  # with W - 1, W and W + 1 for W of 1 to 4
BATCHES = (1, 2, 5)
MANY, BATCH = 1501, 256  # a table of several batches of the default size


def launch(num_processes: int, arguments: list[str]) -> CompletedProcess[str]:
    """One process is started plainly, without torchrun. A job that hangs counts as one that failed."""
    start = (
        tiny.run_command
        if num_processes == 1
        else lambda words, **options: tiny.torchrun(num_processes, words, **options)
    )
    try:
        return start(arguments, timeout=240)
    except subprocess.TimeoutExpired as expired:
        return CompletedProcess(arguments, 124, "", f"no end within {expired.timeout:.0f} s")


@lru_cache
def results_of(num_processes: int) -> tuple[Path, str]:
    """FOLDER/by<processes> of one launch over all tables and batch sizes, and its problem or ""; launched once."""
    folder = tables()
    pairs = [*((num_rows, max_rows) for num_rows in SIZES for max_rows in BATCHES), (MANY, BATCH)]
    done = launch(num_processes, [WORKER, str(folder), *(f"{num_rows}x{max_rows}" for num_rows, max_rows in pairs)])
    problem = f"{num_processes} processes: exit code {done.returncode}: {done.stderr[-1500:]}"
    return folder / f"by{num_processes}", problem if done.returncode else ""


@lru_cache
def tables() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mmbert-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, num_classes in MODELS.items():
        shutil.copytree(trained(num_classes) / "run", folder / name)
    for num_rows in (*SIZES, MANY):
        tiny.write_table(folder / f"rows{num_rows}.csv", num_rows, seed=100 + num_rows)
    return folder


def count_rows(figures: Figures, case: str, file: Path, table: Path) -> list[dict[str, str]]:
    """Every row of the table is in the file once, in the table's order, with its label. Returns the file's rows."""
    expected = [(line[0], line[-1]) for line in read_rows(table)[1:]]
    rows = read_tsv(file)
    found = [(line["row_id"], line["label"]) for line in rows]
    figures.rows_lost += len(set(expected) - set(found))
    figures.rows_repeated += len(found) - len(set(found))
    figures.count(found == expected, f"{case}: {len(found)} rows, expected {len(expected)} in their order")
    return rows


@row(
    "D1",
    "tables of 0, 1, 2, 3, W - 1, W, W + 1 and 97 rows, in batches of 1, 2 and 5, validated, tested and predicted on W "
    "processes",
    "every row once, in input order; figures equal to those of one process and to the counts",
    full={"processes": (1, 2, 3, 4)},
)
def test_D1_rows_that_the_processes_do_not_share_evenly(tmp_path: Path, processes: tuple[int, ...] = (1, 4)) -> Figures:
    figures = Figures()
    alone, _ = results_of(1)
    for num_processes in processes:
        folder, problem = results_of(num_processes)
        if not figures.count(not problem, problem):
            continue
        for model in MODELS:
            for num_rows in SIZES:
                for max_rows in BATCHES:
                    name = f"{model}-rows{num_rows}-batch{max_rows}"
                    case = f"{num_processes} processes, {name}"
                    rows = count_rows(figures, case, folder / name / "predicted.tsv", tables() / f"rows{num_rows}.csv")
                    if num_rows == 0:
                        continue
                    figures.count(
                        len({line["prob" if model == "two" else "prob_0"] for line in rows}) > num_rows // 2,
                        f"{case}: rows have the same score",
                    )
                    test, validation = (
                        read_json(folder / name / file) for file in ("test_metrics.json", "validation.json")
                    )
                    counted = sum(line["label"] == line["pred"] for line in rows)
                    found = [round(test["test/accuracy"] * num_rows, 4), test["test/num_rows"]]
                    figures.count(found == [counted, num_rows], f"{case}: {counted} are right, found {found}")
                    same = [validation["val/accuracy"], validation["val_loss"]] == [
                        test["test/accuracy"],
                        test["test_loss"],
                    ]
                    figures.count(same, f"{case}: validation and test differ")
                    for file in ("predicted.tsv", "test_result_0.tsv", "test_metrics.json", "validation.json"):
                        same = (folder / name / file).read_bytes() == (alone / name / file).read_bytes()
                        figures.count(same, f"{case}: {file} differs from that of one process")
    return figures


def count_training_of_one_row(figures: Figures, case: str, run: Path, test_table: Path) -> None:
    """Figures of validations and test over one row each."""
    predictions = predictions_of(run)
    [line] = count_rows(figures, f"{case}: test stage", predictions, test_table)
    metrics = read_json(predictions.with_name("test_metrics.json"))
    found = [metrics["test/accuracy"], metrics["test/num_rows"], metrics["test/auroc"]]
    expected = [float(line["label"] == line["pred"]), 1, None]
    figures.count(found == expected, f"{case}: test figures {found} for {line}")
    validations = [values for values in tiny.metrics_lines(run) if "val_loss" in values]
    are_right = all(values["val/accuracy"] in (0.0, 1.0) and values["val_loss"] > 0 for values in validations)
    figures.count(bool(validations) and are_right, f"{case}: validations {validations}")


def count_predictions(
    figures: Figures, case: str, num_processes: int, folder: Path, source: Path, num_rows: int
) -> None:
    """`predict` on new rows; on those of the test stage its file is the same."""
    output = folder / "out.tsv"
    words = ["-m", "mmbert_core", "predict", str(folder / "run"), str(source), str(output), "--num_threads", "1"]
    done = launch(num_processes, words)
    figures.count(done.returncode == 0, f"{case}: exit code {done.returncode}: {done.stderr[-1500:]}")
    count_rows(figures, case, output, source)
    if num_rows:
        same = output.read_bytes() == predictions_of(folder / "run").read_bytes()
        figures.count(same, f"{case}: predict and test stage differ")


@row(
    "D2",
    "fewer rows than processes: validation, test and new rows of 1 row (and none) on 4 processes",
    "no hang; the row's figures are right",
    full={"processes": (2, 3, 4), "sizes": (1, 0)},
)
def test_D2_processes_without_rows(
    tmp_path: Path, processes: tuple[int, ...] = (4,), sizes: tuple[int, ...] = (1,)
) -> Figures:
    figures = Figures()
    one = {f"{name}_path": write_rows(tmp_path / f"{name}.csv", rows_of(name)[:2]) for name in ("val", "test")}
    new = {num_rows: write_rows(tmp_path / f"new{num_rows}.csv", rows_of("test")[: num_rows + 1]) for num_rows in sizes}
    for num_processes in processes:
        case, folder = f"{num_processes} processes", tmp_path / f"by{num_processes}"
        folder.mkdir()
        # steps of fewer rows than processes, too
        changes = {"max_train_rows": 16, "batch_size": 2, "microbatches_per_step": 2}
        config = write_config(folder, trained(), model_path=folder / "run", **one, **changes)
        started = time.monotonic()
        done = launch(num_processes, ["train.py", str(config)])
        seconds = time.monotonic() - started
        figures.notes.append(f"{case}: {seconds:.0f} s for a training with 1 validation and 1 test row")
        if figures.count(done.returncode == 0, f"{case}: training: exit code {done.returncode}: {done.stderr[-1500:]}"):
            count_training_of_one_row(figures, case, folder / "run", one["test_path"])
            for num_rows, source in new.items():
                count_predictions(figures, f"{case}: {num_rows} new rows", num_processes, folder, source, num_rows)
    return figures


@row(
    "D3",
    f"a table of {MANY:,} rows, several batches of up to {BATCH}, scored by test stage and predict on 1 to 4 processes",
    "the files are the same, byte for byte",
    full={"processes": (1, 2, 3, 4)},
)
def test_D3_the_same_file_on_any_number_of_processes(tmp_path: Path, processes: tuple[int, ...] = (1, 4)) -> Figures:
    figures = Figures()
    for model in MODELS:
        name, table = f"{model}-rows{MANY}-batch{BATCH}", tables() / f"rows{MANY}.csv"
        # the command itself, in this process
        done = command("predict", tables() / model, table, tmp_path / f"{model}.tsv", "--num_threads", 1)
        figures.count(done.code == 0, f"{model}: exit code {done.code}: {done.err[-600:]}")
        for num_processes in processes:
            folder, problem = results_of(num_processes)
            if not figures.count(not problem, problem):
                continue
            count_rows(figures, f"{num_processes} processes, {name}", folder / name / "predicted.tsv", table)
            for file in ("predicted.tsv", "test_result_0.tsv"):
                same = (folder / name / file).read_bytes() == (tmp_path / f"{model}.tsv").read_bytes()
                figures.count(
                    same, f"{num_processes} processes, {name}: {file} differs from that of the command on one process"
                )
    return figures
