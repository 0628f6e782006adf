"""Disks that are full or cannot be written to. They are small disks of their own, not the machine's.

pytest tests/faults/test_disk.py -s
"""

import os
import shutil
import time
from pathlib import Path

import pytest

from mmbert_core.training.checkpoint import step_folder, why_invalid
from tests.faults.disks import Disk, small_disk
from tests.support import tiny
from tests.support.fault_matrix import MAX_SECONDS, Figures, row
from tests.support.jobs import Job, digest, error_lines, run_job, steps_saved, write_config

pytestmark = pytest.mark.fault
KILOBYTES = 8000  # space for several checkpoints of a third of a megabyte and for the megabyte that must remain free


def count_refusal(
    figures: Figures, case: str, job: Job, since: float | None, *expected: str, exit_code: int = 1
) -> None:
    """The job ends in time with one error line that has the expected words; no rank exits with 0."""
    code = job.wait(seconds=MAX_SECONDS)
    if since is not None:
        figures.seconds.append(time.monotonic() - since)
    figures.count(code == (1 if job.num_processes else exit_code), f"{case}: exit code {code}: {job.output()[-4000:]}")
    figures.count(0 not in job.exit_codes().values(), f"{case}: exit codes {job.exit_codes()}: {job.output()[-4000:]}")
    lines = error_lines(job.output())
    figures.count(
        len(lines) == 1 and all(words in lines[0] for words in expected),
        f"{case}: expected one line with {expected}, found {lines}: {job.output()[-4000:]}",
    )
    own = job.output().split("Exception in thread")[0]  # TensorBoard's thread prints a traceback of its own
    figures.count("Traceback" not in own or job.num_processes > 0, f"{case}: {job.output()[-4000:]}")


def count_complete(figures: Figures, case: str, run: Path, *, steps: list[int] | None = None) -> None:
    """Every checkpoint is complete, and no file of the one that failed is left."""
    saved, left = steps_saved(run), [str(path) for path in run.rglob(".tmp-*")]
    invalid = {step: why_invalid(step_folder(run / "checkpoints", step)) for step in saved}
    figures.count(bool(saved) and not any(invalid.values()) and not left, f"{case}: checkpoints {invalid}, {left} left")
    figures.count(steps is None or saved == steps, f"{case}: expected checkpoints {steps}, found {saved}")


def count_resume(
    figures: Figures, case: str, job: Job, words: list[str], run: Path, expected: Path, *, prefix: tuple[str, ...] = ()
) -> None:
    """After the fault is removed the run resumes from the last complete checkpoint and ends bit-equal to `expected`."""
    step = steps_saved(run)[-1]
    code, output = run_job(job.num_processes, words, prefix=prefix)
    figures.count(code == 0 and f"step-{step:08d}" in output, f"{case}: resumed: exit code {code}: {output[-3000:]}")
    figures.count(code == 0 and digest(run) == digest(expected), f"{case}: resumed: other bits than the reference run")


def reference_runs(figures: Figures, folder: Path, counts: set[int], config: Path) -> dict[int, Path]:
    """Runs without faults, by number of processes."""
    runs = {}
    for num_processes in sorted(counts):
        runs[num_processes] = folder / f"reference{num_processes}"
        code, output = run_job(num_processes, ["train", str(config), "--model_path", str(runs[num_processes])])
        figures.count(code == 0, f"reference: exit code {code}: {output[-3000:]}")
    return runs


# ---- F10: a full disk ----


def fill_between_checkpoints(disk: Disk, run: Path, job: Job) -> float:
    """Fill the disk, as another user would, between two checkpoints; returns the time."""
    job.wait_until(lambda: len(steps_saved(run)) >= 2)
    disk.fill(left=2**19)
    return time.monotonic()


# when the disk is full, and the share of a checkpoint for which there is space
WAYS = (
    ("before", 0.0),
    *(("within", share) for share in (0.0, 0.1, 0.3, 0.4, 0.7, 0.95, 1.0)),
    *(("too long", share) for share in (0.0, 0.2, 0.5)),
)


@row(
    "F10",
    "the disk of the run is full: before a checkpoint is written, in the middle of each of its files (tmpfs, ENOSPC), "
    "or a file gets too long (RLIMIT_FSIZE, EFBIG)",
    "exit other than 0; one line: need X MB, have Y MB at PATH; the checkpoints before it are complete, no file of the "
    "failed one is left; with space again the run resumes to the same bits",
    full={"cases": tuple((count, *way) for count in (0, 2) for way in WAYS)},
)
def test_F10_no_space_for_a_checkpoint(
    tmp_path: Path,
    cases: tuple[tuple[int, str, float], ...] = ((0, "before", 0.0), (0, "within", 0.1), (0, "too long", 0.5)),
) -> Figures:
    """`cases`: processes and one of WAYS. A third of a checkpoint is weights, the rest moments."""
    figures = Figures()
    config = write_config(tmp_path, save_every=1, timeout_seconds=120)
    reference = reference_runs(figures, tmp_path, {case[0] for case in cases}, config)
    for num_processes, way, share in cases:
        case = f"{way} a checkpoint, {share:.0%} of it fits, {num_processes} processes"
        folder = tmp_path / f"{num_processes}-{way.replace(' ', '-')}-{share}"
        with small_disk(folder / "disk", KILOBYTES) as disk:
            run, seen = disk.path / "run", disk.host_path / "run"
            words = ["train", str(config), "--model_path", str(run)]
            faults = {
                "before": {"slow_step": 0.2},
                "within": {"fill": [str(disk.path), 4, share]},
                "too long": {"file_limit": [4, share]},
            }[way]
            job = Job(num_processes, words, faults=faults, exit_code_file=folder / "ends.txt", prefix=disk.prefix)
            since = fill_between_checkpoints(disk, seen, job) if way == "before" else None
            message = (
                "no space for the checkpoint of step"
                if way == "before"
                else "the checkpoint of step 4 could not be written"
            )
            rank = "rank 0, " if num_processes > 1 else ""
            count_refusal(
                figures,
                case,
                job,
                since,
                f"error: {rank}save: {message}",
                "need ",
                " MB, have ",
                f" MB at {run / 'checkpoints'}",
            )
            figures.notes.append(
                f"{case}: {error_lines(job.output())[0].replace(str(folder), '')}"
                if error_lines(job.output())
                else case
            )
            count_complete(figures, case, seen, steps=None if way == "before" else [2, 3])
            (disk.host_path / "of-another-user").unlink(missing_ok=True)
            count_resume(figures, case, job, words, seen, reference[num_processes], prefix=disk.prefix)
    return figures


@row(
    "F10",
    "the disk of the run or of the cache is full when another file is written: cache, log, model, test predictions, "
    "results",
    "exit 1; one line with the path and the free space; no torn file is left; with space again the run resumes to the "
    "same bits",
    full={
        "cases": tuple(
            (count, file)
            for count in (0, 2)
            for file in ("cache", "metrics", "model", "test", "results")
            if (count, file) != (2, "cache")
        )
    },
)
def test_F10_no_space_for_another_file(
    tmp_path: Path, cases: tuple[tuple[int, str], ...] = ((0, "cache"), (0, "metrics"), (0, "model"))
) -> Figures:
    """`cases`: processes, the file."""
    figures = Figures()
    # no checkpoint before the last of 32 steps
    config = write_config(tmp_path, timeout_seconds=120, max_epochs=4, val_check_interval=32)
    reference = reference_runs(figures, tmp_path, {case[0] for case in cases}, config)
    expected = {
        "cache": "disk/cache",
        "metrics": "disk/run/metrics.jsonl",
        "model": "MB at {run}",
        "test": "test_result_0.tsv",
        "results": "train_results.json",
    }
    for num_processes, file in cases:
        case, folder = f"{file}, {num_processes} processes", tmp_path / f"{num_processes}-{file}"
        with small_disk(folder / "disk", KILOBYTES) as disk:
            run, seen = disk.path / "run", disk.host_path / "run"
            words = ["train", str(config), "--model_path", str(run), "--cache_path", str(disk.path / "cache")]
            job = Job(
                num_processes,
                words,
                faults={"full": [str(disk.path), file]},
                exit_code_file=folder / "ends.txt",
                prefix=disk.prefix,
            )
            count_refusal(figures, case, job, None, "No space left on device", expected[file].format(run=run), " MB")
            figures.notes.append(
                f"{case}: {error_lines(job.output())[0].replace(str(folder), '')}"
                if error_lines(job.output())
                else case
            )
            left = [str(path) for path in disk.host_path.rglob(".tmp-*")]
            figures.count(
                not left and not (seen / "train_results.json").exists(),
                f"{case}: {left} left, or results of an unfinished run",
            )
            (disk.host_path / "of-another-user").unlink()
            code, output = run_job(num_processes, words, prefix=disk.prefix)
            figures.count(
                code == 0 and digest(seen) == digest(reference[num_processes]),
                f"{case}: resumed: exit code {code}: {output[-3000:]}",
            )
    return figures


@row(
    "F10",
    "the disk of the prediction file is full, the target is /dev/full",
    "exit other than 0; one line with the path; an older file of that name is unchanged; no torn file is left",
    full={"counts": (0, 2, 3)},
)
def test_F10_no_space_for_predictions(tmp_path: Path, counts: tuple[int, ...] = (2,)) -> Figures:
    figures = Figures()
    config = write_config(tmp_path, max_epochs=1)
    code, output = run_job(0, ["train", str(config)])
    figures.count(code == 0, f"training: {output[-3000:]}")
    table = tiny.write_table(tmp_path / "many.csv", 10_000, seed=7, labels=False)  # 200 KB of predictions
    for num_processes in counts:
        case = f"{num_processes} processes"
        with small_disk(tmp_path / f"disk{num_processes}", 1000) as disk:
            (disk.host_path / "predictions.tsv").write_text("older\n")
            disk.fill(left=50_000)
            words = ["predict", str(tmp_path / "run"), str(table)]
            job = Job(
                num_processes,
                [*words, str(disk.path / "predictions.tsv")],
                exit_code_file=tmp_path / "ends.txt",
                prefix=disk.prefix,
            )
            rank = "rank 0, " if num_processes > 1 else ""
            count_refusal(
                figures,
                case,
                job,
                None,
                f"error: {rank}prediction: ",
                "No space left on device",
                str(disk.path / "predictions.tsv"),
            )
            figures.notes.append(
                f"{case}: {error_lines(job.output())[0].replace(str(tmp_path), '')}"
                if error_lines(job.output())
                else case
            )
            files = {path.name for path in disk.host_path.iterdir()}
            figures.count(
                files == {"predictions.tsv", "of-another-user"}
                and (disk.host_path / "predictions.tsv").read_text() == "older\n",
                f"{case}: {files} left",
            )
        job = Job(num_processes, [*words, "/dev/full"], exit_code_file=tmp_path / "ends.txt")
        count_refusal(
            figures, f"/dev/full, {case}", job, None, "error: /dev/full: expected a file to write", exit_code=2
        )
    return figures


# ---- F11: a folder that cannot be written to, or is gone ----

# takes root's right to write against a file's mode
AS_OTHERS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner") if not os.geteuid() else ()


@row(
    "F11",
    "the run's folder is on a read-only disk, or its mode forbids writing, before the start",
    "exit 2 and one line before step 1; nothing is written",
    full={"counts": (0, 2, 3)},
)
def test_F11_unwritable_from_the_start(tmp_path: Path, counts: tuple[int, ...] = (2,)) -> Figures:
    figures = Figures()
    config = write_config(tmp_path)
    for num_processes in counts:
        with small_disk(tmp_path / f"disk{num_processes}", KILOBYTES) as disk:
            (disk.host_path / "there").mkdir()
            disk.run("mount", "-o", "remount,ro", str(disk.path))
            for name in ("there", "new"):
                case = f"read-only disk, {name}, {num_processes} processes"
                job = Job(
                    num_processes,
                    ["train", str(config), "--model_path", str(disk.path / name)],
                    exit_code_file=tmp_path / "ends.txt",
                    prefix=disk.prefix,
                )
                count_refusal(
                    figures, case, job, None, f"error: model_path: {disk.path}", "cannot be written to", exit_code=2
                )
        closed = tmp_path / f"closed{num_processes}"
        closed.mkdir(mode=0o555)
        for key in ("model_path", "cache_path"):
            case = f"mode 0555, {key}, {num_processes} processes"
            job = Job(
                num_processes,
                ["train", str(config), f"--{key}", str(closed / "new")],
                exit_code_file=tmp_path / "ends.txt",
                prefix=AS_OTHERS,
            )
            count_refusal(figures, case, job, None, f"error: {key}: {closed}: cannot be written to", exit_code=2)
        figures.count(
            not [*closed.iterdir()] and not (tmp_path / "run").exists(),
            f"{num_processes} processes: something was written",
        )
    return figures


@row(
    "F11",
    "the run's folder is removed during the run, or its mode forbids writing from then on",
    "exit 1 and one line at the next checkpoint; the folder is not created again; older checkpoints are complete",
    full={"cases": tuple((count, way) for count in (0, 2, 3) for way in ("removed", "moved", "closed"))},
)
def test_F11_gone_during_the_run(
    tmp_path: Path, cases: tuple[tuple[int, str], ...] = ((2, "removed"), (0, "closed"))
) -> Figures:
    """`cases`: processes, what happens to the folder."""
    figures = Figures()
    config = write_config(tmp_path, save_every=1, timeout_seconds=120)
    reference = reference_runs(figures, tmp_path, {count for count, way in cases if way != "removed"}, config)
    for num_processes, way in cases:
        case, run = f"{way}, {num_processes} processes", tmp_path / f"{num_processes}-{way}/run"
        run.parent.mkdir()
        words = ["train", str(config), "--model_path", str(run)]
        job = Job(
            num_processes, words, faults={"slow_step": 0.2}, exit_code_file=run.parent / "ends.txt", prefix=AS_OTHERS
        )
        job.wait_until(lambda: len(steps_saved(run)) >= 2)
        if way == "closed":
            (run / "checkpoints").chmod(0o555)
        elif way == "moved":
            run.rename(run.with_name("moved"))
        else:
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)  # a checkpoint may have been written meanwhile
        rank = "rank 0, " if num_processes > 1 else ""
        expected = (
            ("Permission denied", str(run / "checkpoints")) if way == "closed" else (f"the run's folder {run} is gone",)
        )
        count_refusal(figures, case, job, time.monotonic(), f"error: {rank}save: ", *expected)
        figures.notes.append(
            f"{case}: {figures.seconds[-1]:.1f} s: {error_lines(job.output())[0].replace(str(run.parent), '')}"
            if error_lines(job.output())
            else case
        )
        if way == "removed":
            figures.count(not run.exists(), f"{case}: {[*run.rglob('*')]} was created again")
            continue
        figures.count(way == "closed" or not run.exists(), f"{case}: {[*run.rglob('*')]} was created again")
        if way == "closed":
            (run / "checkpoints").chmod(0o755)
        else:
            run.with_name("moved").rename(run)
        count_complete(figures, case, run)
        count_resume(figures, case, job, words, run, reference[num_processes])
    return figures
