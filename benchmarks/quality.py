"""How good the predictions are: sets x resamples x candidates x seeds, continued after an interruption.

    python -m benchmarks.quality run sets.yaml quality.jsonl --encoder models/all-MiniLM-L6-v2 --candidates peers
    python -m benchmarks.quality run sets.yaml quality.jsonl --encoder models/all-MiniLM-L6-v2 \\
        --configs candidates.yaml --candidates ours no_blend
    python -m benchmarks.quality table quality.jsonl --candidate ours --output table.md
    python -m benchmarks.quality plot quality.jsonl quality.png

Sets: see benchmarks/quality_sets.py. `candidates.yaml` has settings of train.py by the candidate's name:

    ours: {}
    no_blend: {blend: none}

Each finished run is a line of quality.jsonl; rows, vectors and probabilities are in quality.jsonl.files.
"""

import argparse
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from benchmarks.peers import MEAN, PEERS, Vectors
from benchmarks.quality_runs import ROOT, Candidate, Setup, key_of, run, version_of
from benchmarks.quality_sets import Limits, read_sets, write_rows
from benchmarks.quality_table import draw, quality_table

ALL_PEERS = "peers"  # a candidate's name that means all of them
UNFINISHED = 75  # exit code: --max_minutes are over, the same command continues


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, example = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    limits = Limits()

    each = commands.add_parser("run", help="run what is not yet in the output")
    each.add_argument("sets", type=Path)
    each.add_argument("output", type=Path, help="a line of JSON for each run (.jsonl)")
    each.add_argument("--encoder", required=True, help="folder of a pretrained encoder")
    each.add_argument("--candidates", nargs="+", default=[ALL_PEERS], help="peers, a peer's name, names of --configs")
    each.add_argument("--configs", type=Path, help="candidates of ours: a YAML file of settings by name")
    each.add_argument("--sets", nargs="+", dest="only", metavar="NAME", help="only these sets")
    each.add_argument("--tree", type=Path, default=ROOT, help="another version of the project, for --configs")
    each.add_argument("--num_threads", type=int, default=1, help="CPU threads of a run (%(default)s)")
    each.add_argument("--max_minutes", type=float, help=f"start no run after so many; exit code {UNFINISHED}")
    each.add_argument("--small", type=int, default=limits.small, help="fewer rows are resampled (%(default)s)")
    each.add_argument("--resamples", type=int, default=limits.resamples, help="of a small set (%(default)s)")
    each.add_argument("--seeds", type=int, default=limits.seeds, help="of a larger set (%(default)s)")
    each.add_argument("--max_train_rows", type=int, default=limits.max_train_rows, help="(%(default)s)")

    each = commands.add_parser("table", help="means, spread and paired differences as Markdown")
    each.add_argument("output", type=Path, metavar="runs")
    each.add_argument("--candidate", nargs="+", default=[], help="compare these (all that are ours)")
    each.add_argument("--against", help="with this candidate (the best peer of each set)")
    each.add_argument("--draws", type=int, default=2000, help="of the bootstrap (%(default)s)")
    each.add_argument("--write", type=Path, help="into this file too")

    each = commands.add_parser("plot", help="a panel for each set")
    each.add_argument("output", type=Path, metavar="runs")
    each.add_argument("picture", type=Path)
    each.add_argument("--metric", default="auroc", choices=("auroc", "log_loss", "f1_macro"))
    return parser.parse_args(arguments)


# ---- the file of runs ----


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line that a kill left unfinished is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append_run(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def remove_unfinished_line(path: Path) -> None:
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with open(path, "r+b") as stream:
            stream.truncate(data.rfind(b"\n") + 1)


# ---- the commands ----


def candidates_of(names: Sequence[str], configs: Path | None) -> list[Candidate]:
    known = yaml.safe_load(configs.read_text(encoding="utf-8")) if configs else {}
    known = {str(name): overrides or {} for name, overrides in known.items()}
    found: list[Candidate] = []
    for name in names:
        if name in known:
            found.append(Candidate(name, known[name]))
        elif name == ALL_PEERS:
            found += [Candidate(peer, None) for peer in (*PEERS, MEAN)]
        elif name in PEERS or name == MEAN:
            found.append(Candidate(name, None))
        else:
            choices = ", ".join([ALL_PEERS, *map(repr, PEERS), repr(MEAN), *known])
            raise SystemExit(f"--candidates: expected one of {choices}; found {name!r}")
    return found


def run_all(arguments: argparse.Namespace) -> int:
    sets = read_sets(arguments.sets)
    if unknown := set(arguments.only or []) - set(sets):
        raise SystemExit(f"--sets: expected names out of {', '.join(sets)}; found {', '.join(sorted(unknown))}")
    folder = Path(f"{arguments.output}.files").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    vectors = Vectors(folder / "vectors", arguments.encoder, num_threads=arguments.num_threads)
    encoder = str(Path(arguments.encoder).resolve())
    setup = Setup(encoder, arguments.num_threads, arguments.tree.resolve(), folder, vectors)
    limits = Limits(arguments.small, arguments.resamples, arguments.seeds, arguments.max_train_rows)
    candidates = candidates_of(arguments.candidates, arguments.configs)
    started, num_failed = time.monotonic(), 0
    with open(folder / "lock", "w") as lock:
        _wait_for(lock, arguments.output)
        remove_unfinished_line(arguments.output)
        for name in arguments.only or sets:
            for rows in write_rows(sets[name], limits, folder / "rows"):
                for candidate in candidates:
                    if not candidate.fits(rows) or _is_finished(candidate, rows, setup, arguments.output):
                        continue
                    if arguments.max_minutes and time.monotonic() - started > 60 * arguments.max_minutes:
                        return UNFINISHED
                    num_failed += not _run_one(candidate, rows, setup, arguments.output)
    return 1 if num_failed else 0


def _wait_for(lock: TextIO, output: Path) -> None:
    """Two benchmarks with the same output run one after the other."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{output}: waiting for another benchmark that writes to it", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is_finished(candidate: Candidate, rows: Any, setup: Setup, output: Path) -> bool:
    key = (rows.table_set.name, rows.resample, candidate.name, rows.seed, candidate.sha(setup), rows.sha)
    same = [record for record in read_runs(output) if key_of(record) == key]
    if same and candidate.overrides is not None and same[0]["version"] != (version := version_of(setup.tree)):
        versions = f"is of version {same[0]['version']}, now {version}"
        print(f"{rows.table_set.name} {rows.resample} {candidate.name}: the stored run {versions}", file=sys.stderr)
    return bool(same)


def _run_one(candidate: Candidate, rows: Any, setup: Setup, output: Path) -> bool:
    """Whether the run ended without an error."""
    prefix = f"{rows.table_set.name} {rows.resample} {candidate.name}"
    try:
        record = run(candidate, rows, setup, read_runs(output))
    except RuntimeError as error:
        print(f"{prefix}: failed: {error}", file=sys.stderr, flush=True)
        return False
    append_run(output, record)
    figures = f"AUROC {record['auroc']:.4f}  log loss {record['log_loss']:.4f}  macro F1 {record['f1_macro']:.4f}"
    print(f"{prefix}: {figures}  {record['seconds']:.1f} s", file=sys.stderr, flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.command == "run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the process of a run too
        return run_all(options)
    runs, folder = read_runs(options.output), Path(f"{options.output}.files")
    if not runs:
        raise SystemExit(f"{options.output}: no runs yet")
    if options.command == "plot":
        draw(runs, options.metric, options.picture)
        return 0
    text = quality_table(runs, folder, options.candidate, num_draws=options.draws, against=options.against)
    print(text)
    if options.write:
        options.write.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
