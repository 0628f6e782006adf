"""Disks that are full, or will not be written to. Small ones of their own: nothing here touches the machine's.

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
KILOBYTES = 8000  # room for several checkpoints of a third of a megabyte, and for the megabyte beside that is asked for


def count_refusal(
    figures: Figures, case: str, job: Job, since: float | None, *expected: str, exit_code: int = 1
) -> None:
    """The job ends in time with one line that has the expected words; no rank ends with 0."""
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
    own = job.output().split("Exception in thread")[0]  # TensorBoard's thread has one of its own
    figures.count("Traceback" not in own or job.num_processes > 0, f"{case}: {job.output()[-4000:]}")


def count_whole(figures: Figures, case: str, run: Path, *, steps: list[int] | None = None) -> None:
    """Every checkpoint there is whole, and nothing of the one that failed is left."""
    saved, left = steps_saved(run), [str(path) for path in run.rglob(".tmp-*")]
    invalid = {step: why_invalid(step_folder(run / "checkpoints", step)) for step in saved}
    figures.count(bool(saved) and not any(invalid.values()) and not left, f"{case}: checkpoints {invalid}, {left} left")
    figures.count(steps is None or saved == steps, f"{case}: expected checkpoints {steps}, found {saved}")


def goes_on(
    figures: Figures, case: str, job: Job, words: list[str], run: Path, expected: Path, *, prefix: tuple[str, ...] = ()
) -> None:
    """With place on the disk again the run goes on from the last whole checkpoint, to the bits of `expected`."""
    step = steps_saved(run)[-1]
    code, output = run_job(job.num_processes, words, prefix=prefix)
    figures.count(code == 0 and f"step-{step:08d}" in output, f"{case}: resumed: exit code {code}: {output[-3000:]}")
    figures.count(code == 0 and digest(run) == digest(expected), f"{case}: resumed: other bits than an undisturbed run")


def straight_runs(figures: Figures, folder: Path, counts: set[int], config: Path) -> dict[int, Path]:
    """Undisturbed runs by number of processes."""
    runs = {}
    for num_processes in sorted(counts):
        runs[num_processes] = folder / f"straight{num_processes}"
        code, output = run_job(num_processes, ["train", str(config), "--model_path", str(runs[num_processes])])
        figures.count(code == 0, f"straight: exit code {code}: {output[-3000:]}")
    return runs


# ---- F10: a full disk ----


def fill_in_mid_run(disk: Disk, run: Path, job: Job) -> float:
    """Another user takes the disk between two checkpoints."""
    job.wait_until(lambda: len(steps_saved(run)) >= 2)
    disk.fill(left=2**19)
    return time.monotonic()


# when the disk is full, the share of a checkpoint that still finds place
WAYS = (
    ("before", 0.0),
    *(("within", share) for share in (0.0, 0.1, 0.3, 0.4, 0.7, 0.95, 1.0)),
    *(("too long", share) for share in (0.0, 0.2, 0.5)),
)


@row(
    "F10",
    "the disk of the run is full: before a checkpoint is written, in the middle of each of its files (tmpfs, ENOSPC), or a file gets too long (RLIMIT_FSIZE, EFBIG)",
    "exit other than 0; one line: need X MB, have Y MB at PATH; the checkpoints before it are whole, nothing of the failed one is left; with place again the run goes on to the same bits",
    full={"cases": tuple((count, *way) for count in (0, 2) for way in WAYS)},
)
def test_F10_no_place_for_a_checkpoint(
    tmp_path: Path,
    cases: tuple[tuple[int, str, float], ...] = ((0, "before", 0.0), (0, "within", 0.1), (0, "too long", 0.5)),
) -> Figures:
    """`cases`: processes and one of WAYS. A third of a checkpoint is weights, the rest moments."""
    figures = Figures()
    config = write_config(tmp_path, save_every=1, timeout_seconds=120)
    straight = straight_runs(figures, tmp_path, {case[0] for case in cases}, config)
    for num_processes, way, share in cases:
        case, folder = (
            f"{way} a checkpoint, {share:.0%} of it fits, {num_processes} processes",
            tmp_path / f"{num_processes}-{way.replace(' ', '-')}-{share}",
        )
        with small_disk(folder / "disk", KILOBYTES) as disk:
            run, seen = disk.place / "run", disk.seen / "run"
            words = ["train", str(config), "--model_path", str(run)]
            faults = {
                "before": {"slow_step": 0.2},
                "within": {"fill": [str(disk.place), 4, share]},
                "too long": {"file_limit": [4, share]},
            }[way]
            job = Job(num_processes, words, faults=faults, exit_code_file=folder / "ends.txt", prefix=disk.prefix)
            since = fill_in_mid_run(disk, seen, job) if way == "before" else None
            said = (
                "no place for the checkpoint of step"
                if way == "before"
                else "the checkpoint of step 4 could not be written"
            )
            rank = "rank 0, " if num_processes > 1 else ""
            count_refusal(
                figures,
                case,
                job,
                since,
                f"error: {rank}save: {said}",
                "need ",
                " MB, have ",
                f" MB at {run / 'checkpoints'}",
            )
            figures.notes.append(
                f"{case}: {error_lines(job.output())[0].replace(str(folder), '')}"
                if error_lines(job.output())
                else case
            )
            count_whole(figures, case, seen, steps=None if way == "before" else [2, 3])
            (disk.seen / "of-another-user").unlink(missing_ok=True)
            goes_on(figures, case, job, words, seen, straight[num_processes], prefix=disk.prefix)
    return figures


@row(
    "F10",
    "the disk of the run or of the cache is full when another file is written: cache, log, model, test predictions, results",
    "exit 1; one line with the path and what is left there; nothing torn is left; with place again the run goes on to the same bits",
    full={
        "cases": tuple(
            (count, place)
            for count in (0, 2)
            for place in ("cache", "metrics", "model", "test", "results")
            if (count, place) != (2, "cache")
        )
    },
)
def test_F10_no_place_for_another_file(
    tmp_path: Path, cases: tuple[tuple[int, str], ...] = ((0, "cache"), (0, "metrics"), (0, "model"))
) -> Figures:
    """`cases`: processes, the file."""
    figures = Figures()
    values = {
        "timeout_seconds": 120,
        "max_epochs": 4,
        "val_check_interval": 32,
    }  # no checkpoint before the last of 32 steps
    config = write_config(tmp_path, **values)
    straight = straight_runs(figures, tmp_path, {case[0] for case in cases}, config)
    expected = {
        "cache": "disk/cache",
        "metrics": "disk/run/metrics.jsonl",
        "model": "MB at {run}",
        "test": "test_result_0.tsv",
        "results": "train_results.json",
    }
    for num_processes, place in cases:
        case, folder = f"{place}, {num_processes} processes", tmp_path / f"{num_processes}-{place}"
        with small_disk(folder / "disk", KILOBYTES) as disk:
            run, seen = disk.place / "run", disk.seen / "run"
            words = ["train", str(config), "--model_path", str(run), "--cache_path", str(disk.place / "cache")]
            job = Job(
                num_processes,
                words,
                faults={"full": [str(disk.place), place]},
                exit_code_file=folder / "ends.txt",
                prefix=disk.prefix,
            )
            count_refusal(figures, case, job, None, "No space left on device", expected[place].format(run=run), " MB")
            figures.notes.append(
                f"{case}: {error_lines(job.output())[0].replace(str(folder), '')}"
                if error_lines(job.output())
                else case
            )
            left = [str(path) for path in disk.seen.rglob(".tmp-*")]
            figures.count(
                not left and not (seen / "train_results.json").exists(),
                f"{case}: {left} left, or results of an unfinished run",
            )
            (disk.seen / "of-another-user").unlink()
            code, output = run_job(num_processes, words, prefix=disk.prefix)
            figures.count(
                code == 0 and digest(seen) == digest(straight[num_processes]),
                f"{case}: resumed: exit code {code}: {output[-3000:]}",
            )
    return figures


@row(
    "F10",
    "the disk of the prediction file is full, the target is /dev/full",
    "exit other than 0; one line with the path; an older file of that name is as it was; nothing torn is left",
    full={"counts": (0, 2, 3)},
)
def test_F10_no_place_for_predictions(tmp_path: Path, counts: tuple[int, ...] = (2,)) -> Figures:
    figures = Figures()
    config = write_config(tmp_path, max_epochs=1)
    code, output = run_job(0, ["train", str(config)])
    figures.count(code == 0, f"training: {output[-3000:]}")
    table = tiny.write_table(tmp_path / "many.csv", 10_000, seed=7, labels=False)  # 200 KB of predictions
    for num_processes in counts:
        case = f"{num_processes} processes"
        with small_disk(tmp_path / f"disk{num_processes}", 1000) as disk:
            (disk.seen / "predictions.tsv").write_text("older\n")
            disk.fill(left=50_000)
            words = ["predict", str(tmp_path / "run"), str(table)]
            job = Job(
                num_processes,
                [*words, str(disk.place / "predictions.tsv")],
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
                str(disk.place / "predictions.tsv"),
            )
            figures.notes.append(
                f"{case}: {error_lines(job.output())[0].replace(str(tmp_path), '')}"
                if error_lines(job.output())
                else case
            )
            files = {path.name for path in disk.seen.iterdir()}
            figures.count(
                files == {"predictions.tsv", "of-another-user"}
                and (disk.seen / "predictions.tsv").read_text() == "older\n",
                f"{case}: {files} left",
            )
        job = Job(num_processes, [*words, "/dev/full"], exit_code_file=tmp_path / "ends.txt")
        count_refusal(
            figures, f"/dev/full, {case}", job, None, "error: /dev/full: expected a file to write", exit_code=2
        )
    return figures


# ---- F11: a folder that will not be written to, or is gone ----

# no longer allowed to write where the file's mode forbids it, as root is
AS_OTHERS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner") if not os.geteuid() else ()


@row(
    "F11",
    "the run's folder lies on a read-only disk, or its mode forbids to write, before the start",
    "exit 2 and one line before step 1; nothing is written",
    full={"counts": (0, 2, 3)},
)
def test_F11_unwritable_from_the_start(tmp_path: Path, counts: tuple[int, ...] = (2,)) -> Figures:
    figures = Figures()
    config = write_config(tmp_path)
    for num_processes in counts:
        with small_disk(tmp_path / f"disk{num_processes}", KILOBYTES) as disk:
            (disk.seen / "there").mkdir()
            disk.run("mount", "-o", "remount,ro", str(disk.place))
            for name in ("there", "new"):
                case = f"read-only disk, {name}, {num_processes} processes"
                job = Job(
                    num_processes,
                    ["train", str(config), "--model_path", str(disk.place / name)],
                    exit_code_file=tmp_path / "ends.txt",
                    prefix=disk.prefix,
                )
                count_refusal(
                    figures, case, job, None, f"error: model_path: {disk.place}", "cannot be written to", exit_code=2
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
    "the run's folder is removed in mid-run, or its mode forbids to write from then on",
    "exit 1 and one line at the next checkpoint; the folder does not come back; what was there is whole",
    full={"cases": tuple((count, way) for count in (0, 2, 3) for way in ("removed", "moved", "closed"))},
)
def test_F11_gone_in_mid_run(
    tmp_path: Path, cases: tuple[tuple[int, str], ...] = ((2, "removed"), (0, "closed"))
) -> Figures:
    """`cases`: processes, what happens to the folder."""
    figures = Figures()
    config = write_config(tmp_path, save_every=1, timeout_seconds=120)
    straight = straight_runs(figures, tmp_path, {count for count, way in cases if way != "removed"}, config)
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
            shutil.rmtree(run, ignore_errors=True)  # a checkpoint may have been under way
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
            figures.count(not run.exists(), f"{case}: {[*run.rglob('*')]} is there again")
            continue
        figures.count(way == "closed" or not run.exists(), f"{case}: {[*run.rglob('*')]} is there again")
        if way == "closed":
            (run / "checkpoints").chmod(0o755)
        else:
            run.with_name("moved").rename(run)
        count_whole(figures, case, run)
        goes_on(figures, case, job, words, run, straight[num_processes])
    return figures
