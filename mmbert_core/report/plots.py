"""ROC, precision-recall and confusion pictures, where matplotlib is installed. N rows, K classes."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbert_core.evaluation.metrics import functional
from mmbert_core.evaluation.thresholds import BINARY_THRESHOLD, predicted_classes
from mmbert_core.report.curves import MAX_CURVES
from mmbert_core.report.thinning import evenly_spaced

MAX_POINTS = 2000  # of a curve: more than a picture has pixels in width
MAX_CLASSES = 100  # of the confusion picture: with more, the most frequent ones
MAX_NUMBERED = 20  # with more classes the confusion cells have no numbers


def write_plots(
    preds: np.ndarray,
    labels: np.ndarray,
    folder: str | Path,
    *,
    class_names: Sequence[str],
    threshold: float = BINARY_THRESHOLD,
) -> list[str]:
    """Write roc.png, precision_recall.png and confusion.png into `folder`, which is created; returns their paths.

    `preds` [N] (binary: probability of class 1) or [N, K], `labels` int [N]. A binary task has the curve of class 1
    only. A class that no row or every row has gets no curve; a picture without curves, or of no rows, is not written.
    Without matplotlib (extra `plots`) nothing is written and the list is empty.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display, no window backend
    except ImportError:
        return []
    preds, labels = np.asarray(preds), np.asarray(labels)
    if len(labels) == 0:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any], bool]] = {
        "roc.png": lambda axes: _draw_roc(axes, preds, labels, class_names),
        "precision_recall.png": lambda axes: _draw_precision_recall(axes, preds, labels, class_names),
        "confusion.png": lambda axes: _draw_confusion(axes, preds, labels, class_names, threshold),
    }
    written = []
    for name, draw in pictures.items():
        figure = Figure(figsize=(6, 5), dpi=120, layout="constrained")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class name in a script that the font lacks is drawn as boxes
            if draw(figure.subplots()):
                # No Software entry: it names the version of matplotlib, and the bytes would differ between versions.
                figure.savefig(folder / name, format="png", metadata={"Software": None})
                written.append(str(folder / name))
    return written


def _draw_roc(axes: Any, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> bool:
    curves = _curve_classes(preds, labels)
    for index, scores in curves:
        false_rate, true_rate, _ = functional().binary_roc(scores, torch.from_numpy((labels == index).astype(np.int64)))
        axes.plot(*_thinned(false_rate, true_rate), label=_text(class_names[index]))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC", xlim=(0, 1), ylim=(0, 1.01))
    if curves:
        axes.legend(loc="lower right", title="class")
    return bool(curves)


def _draw_precision_recall(axes: Any, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> bool:
    curves = _curve_classes(preds, labels)
    for index, scores in curves:
        target = torch.from_numpy((labels == index).astype(np.int64))
        precision, recall, _ = functional().binary_precision_recall_curve(scores, target)
        x, y = _thinned(recall, precision)
        # Steps, as average precision sums them: no threshold gives a point on the line between two points.
        axes.step(x, y, where="post", label=f"{_text(class_names[index])} ({(labels == index).mean():.1%} of rows)")
    axes.set(xlabel="recall", ylabel="precision", title="Precision and recall", xlim=(0, 1), ylim=(0, 1.01))
    if curves:
        axes.legend(loc="lower left", title="class")
    return bool(curves)


def _draw_confusion(
    axes: Any, preds: np.ndarray, labels: np.ndarray, class_names: Sequence[str], threshold: float
) -> bool:
    labels, chosen = labels.astype(np.int64), predicted_classes(preds, threshold=threshold)
    of_label, title = np.bincount(labels, minlength=len(class_names)), "Confusion"
    drawn = np.arange(len(class_names))
    if len(class_names) > MAX_CLASSES:
        drawn = np.sort(np.argsort(-of_label, kind="stable")[:MAX_CLASSES])
        title = f"Confusion of the {MAX_CLASSES} most frequent of {len(class_names):,} classes"
    num_classes, position = len(drawn), np.full(len(class_names), -1)
    position[drawn] = np.arange(num_classes)
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)  # [label, chosen]
    is_drawn = (position[labels] >= 0) & (position[chosen] >= 0)
    np.add.at(counts, (position[labels[is_drawn]], position[chosen[is_drawn]]), 1)
    shares = counts / np.maximum(of_label[drawn][:, None], 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes, label="share of the label's rows")
    axes.set(xlabel="predicted", ylabel="label", title=title)
    if num_classes > MAX_NUMBERED:
        return True
    names = [_text(name) for name in class_names]
    axes.set_xticks(range(num_classes), names, rotation=45, ha="right")
    axes.set_yticks(range(num_classes), names)
    for row, column in np.ndindex(*counts.shape):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    return True


def _curve_classes(preds: np.ndarray, labels: np.ndarray) -> list[tuple[int, torch.Tensor]]:
    """(class, its probabilities [N]) of every curve: class 1 when binary, else the most frequent, in class order."""
    if preds.ndim == 1:
        classes, columns = [1], {1: preds}
    else:
        counts = np.bincount(labels.astype(np.int64), minlength=preds.shape[1])
        classes = sorted(np.argsort(-counts, kind="stable")[:MAX_CURVES].tolist())
        columns = {index: preds[:, index] for index in classes}
    drawable = [index for index in classes if 0 < (labels == index).sum() < len(labels)]
    return [(index, torch.from_numpy(columns[index].astype(np.float64))) for index in drawable]


def _thinned(x: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    kept = evenly_spaced(len(x), MAX_POINTS)
    return x.numpy()[kept], y.numpy()[kept]


def _text(name: str) -> str:
    """A class name for matplotlib, where "$" would start a formula and a leading "_" hide it from the legend."""
    text = (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text
