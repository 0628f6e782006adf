"""Means and spread of the runs, paired differences to the best peer, as Markdown and as a picture."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table
from benchmarks.quality_runs import load_predictions
from benchmarks.quality_scores import LOWER_IS_BETTER, METRICS, Predictions, differences, interval
from benchmarks.quality_sets import FILES, GROUP, read_cells

Runs = list[dict[str, Any]]
Grouped = dict[str, dict[str, Runs]]  # set -> candidate -> runs in the order of resample and seed


def grouped(runs: Iterable[dict[str, Any]]) -> Grouped:
    """Raises `SystemExit` where runs cannot be compared: other rows, or two configs under one name."""
    found: Grouped = defaultdict(lambda: defaultdict(list))
    for record in sorted(runs, key=lambda record: (record["resample"], record["seed"])):
        found[record["set"]][record["candidate"]].append(record)
    for name, candidates in found.items():
        if len({record["rows"] for each in candidates.values() for record in each}) > 1:
            raise SystemExit(f"{name}: runs on different rows: compare those of one set file and one size")
        for candidate, records in candidates.items():
            if len({(record["resample"], record["seed"]) for record in records}) < len(records):
                raise SystemExit(f"{name}: {candidate}: several configs under one name: rename one")
    return {name: dict(candidates) for name, candidates in found.items()}


def best_peer(candidates: dict[str, Runs], metric: str) -> str | None:
    """The peer with the best mean, out of those that have run as often as any."""
    peers = {name: runs for name, runs in candidates.items() if runs[0]["is_peer"]}
    if not peers:
        return None
    full = max(len(runs) for runs in peers.values())
    means = {name: mean(runs, metric) for name, runs in peers.items() if len(runs) == full}
    return (min if metric in LOWER_IS_BETTER else max)(means, key=means.__getitem__)


def mean(runs: Runs, metric: str) -> float:
    return statistics.mean(run[metric] for run in runs)


# ---- Markdown ----


def quality_table(
    runs: Runs, folder: Path, candidates: Sequence[str], *, num_draws: int, against: str | None = None
) -> str:
    """All candidates of each set; then for each of `candidates` its paired differences to one, or to the best peer."""
    by_set = grouped(runs)
    sections = [_set_table(name, by_set[name], folder) for name in by_set]
    sections.append(_mean_table(by_set))
    ours = {run["candidate"]: None for run in runs if not run["is_peer"]}
    for candidate in candidates or ours:
        if candidate != against:
            sections.append(_difference_table(candidate, against, by_set, folder, num_draws))
    return "\n\n".join(sections)


def _set_table(name: str, candidates: dict[str, Runs], folder: Path) -> str:
    best = {metric: best_peer(candidates, metric) for metric in METRICS}
    lines = []
    for candidate, runs in candidates.items():
        cells = []
        for metric in METRICS:
            values = [run[metric] for run in runs]
            text = f"{mean(runs, metric):.4f} ({min(values):.4f} - {max(values):.4f})"
            cells.append(f"**{text}**" if candidate == best[metric] else text)
        calibrated = f"{mean(runs, 'log_loss_calibrated'):.4f}" if "log_loss_calibrated" in runs[0] else ""
        seconds = statistics.mean(run["seconds"] for run in runs)
        lines.append([candidate, str(len(runs)), *cells, calibrated, f"{seconds:.0f}"])
    first = next(iter(candidates.values()))[0]
    sizes = json.loads((folder / "rows" / name / f"resample-{first['resample']}" / "rows.json").read_text())["rows"]
    header = ["", "runs", *METRICS.values(), "log loss, calibrated", "seconds"]
    title = f"**{name}**: {' / '.join(f'{sizes[file]:,}' for file in FILES)} rows (training / validation / test)"
    return f"{title}\n\n{table(header, lines)}"


def _mean_table(by_set: Grouped) -> str:
    """Candidates that have run on every set."""
    names = [name for name in next(iter(by_set.values())) if all(name in each for each in by_set.values())]
    lines = [
        [name, *(f"{statistics.mean(mean(each[name], metric) for each in by_set.values()):.4f}" for metric in METRICS)]
        for name in names
    ]
    return f"**Mean of {len(by_set)} sets**\n\n{table(['', *METRICS.values()], lines)}"


def _difference_table(candidate: str, against: str | None, by_set: Grouped, folder: Path, num_draws: int) -> str:
    """Rows are sets, with the mean over them last. The best peer is chosen for each metric, on the test rows.

    All sets have the same seed, so that sets of the same test rows have the same draws.
    """
    lines, points, draws = [], defaultdict(list), defaultdict(list)
    for name, candidates in by_set.items():
        if candidate not in candidates:
            continue
        cells = [name]
        for metric in METRICS:
            other = against or best_peer({key: runs for key, runs in candidates.items() if key != candidate}, metric)
            if other not in candidates or len(candidates[other]) != len(candidates[candidate]):
                cells += [other or "", "runs are missing"]
                continue
            pair = (_predictions(candidates[key], folder) for key in (candidate, other))
            point, drawn = differences(metric, *pair, num_draws=num_draws)
            points[metric].append(point)
            draws[metric].append(drawn)
            cells += [other, _difference(point, drawn)]
        lines.append(cells)
    last = ["mean of the sets"]
    for metric in METRICS:
        last += ["", _difference(np.mean(points[metric]), np.mean(draws[metric], axis=0)) if points[metric] else ""]
    header = ["set"] + [
        cell for label in METRICS.values() for cell in (f"compared with, {label}", f"{label}, difference")
    ]
    title = f"**{candidate}** minus {against or 'the best peer of each set'}, with the 95 % interval of paired draws"
    counts = ", ".join(_count(metric, points[metric], draws[metric]) for metric in METRICS if points[metric])
    return f"{title}\n\n{table(header, [*lines, last])}\n\n{counts}."


def _count(metric: str, points: Sequence[float], draws: Sequence[np.ndarray]) -> str:
    """In how many sets the candidate is as good or better, and in how many the whole interval is."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    as_good = sum(sign * point >= 0 for point in points)
    better = sum(min(sign * bound for bound in interval(drawn)) > 0 for drawn in draws)
    return (
        f"{METRICS[metric]}: as good or better in {as_good} of {len(points)} sets, with the whole interval in {better}"
    )


def _difference(point: float, draws: np.ndarray) -> str:
    low, high = interval(draws)
    return f"{point:+.4f} ({low:+.4f} to {high:+.4f})"


def _predictions(runs: Runs, folder: Path) -> list[Predictions]:
    found = []
    for run in runs:
        stored = load_predictions(run, folder)
        path = folder / "rows" / run["set"] / f"resample-{run['resample']}" / "test.csv"
        units = np.array(read_cells(path, [GROUP])[GROUP])
        found.append(Predictions(stored["test"], stored["predicted"], stored["labels"], units))
    return found


# ---- a picture ----


def draw(runs: Runs, metric: str, path: Path) -> None:
    """A panel for each set: every run a dot, the mean a line; peers grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_set = grouped(runs)
    names = list(dict.fromkeys(run["candidate"] for run in sorted(runs, key=lambda run: run["is_peer"])))[::-1]
    across = min(3, len(by_set))
    down = -(-len(by_set) // across)
    size = (4.2 * across + 1.5, down * (0.3 * len(names) + 1.1))
    figure, panels = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
    for panel in panels.flat[len(by_set) :]:
        panel.set_visible(False)
    for panel, (title, candidates) in zip(panels.flat, by_set.items()):
        for height, name in enumerate(names):
            if name not in candidates:
                continue
            values = [run[metric] for run in candidates[name]]
            color = "#7a8591" if candidates[name][0]["is_peer"] else "#1f6feb"
            panel.plot([min(values), max(values)], [height, height], color=color, linewidth=1, alpha=0.5)
            panel.plot(values, [height] * len(values), "o", color=color, markersize=4, alpha=0.5, markeredgewidth=0)
            panel.plot([statistics.mean(values)], [height], "|", color=color, markersize=12, markeredgewidth=2)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(METRICS[metric], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
