"""Pictures where matplotlib is there, an empty list where not.   pytest tests/report/test_plots.py"""

import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmbert_core.report.plots import write_plots

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 5000)
PREDS = (LABELS * 0.2 + RNG.random(5000) * 0.8).astype(np.float32)
ALL = ["roc.png", "precision_recall.png", "confusion.png"]


def names(paths):
    return [path.rsplit("/", 1)[1] for path in paths]


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # import fails
    assert write_plots(PREDS, LABELS, tmp_path / "plots", class_names=["a", "b"]) == []
    assert not (tmp_path / "plots").exists()


def test_binary_pictures_are_png_and_repeat_byte_for_byte(tmp_path):
    first = write_plots(PREDS, LABELS, tmp_path / "one" / "plots", class_names=["$5 or $6", "_hidden"])
    second = write_plots(PREDS, LABELS, str(tmp_path / "two"), class_names=["$5 or $6", "_hidden"])
    assert names(first) == ALL
    pyplot = sys.modules.get("matplotlib.pyplot")  # torchmetrics imports it
    assert pyplot is None or pyplot.get_fignums() == []
    for one, two in zip(first, second):
        data = open(one, "rb").read()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
        assert data == open(two, "rb").read()


@pytest.mark.parametrize("num_classes", [3, 30])
def test_several_classes(tmp_path, num_classes):
    labels = RNG.integers(0, num_classes, 400)
    preds = RNG.dirichlet(np.ones(num_classes), 400)
    paths = write_plots(preds, labels, tmp_path, class_names=[f"class {k} 文" for k in range(num_classes)])
    assert names(paths) == ALL


def test_one_class_only_leaves_the_curves_out_and_no_rows_everything(tmp_path):
    assert names(write_plots(PREDS, LABELS * 0, tmp_path, class_names=["a", "b"])) == ["confusion.png"]
    assert write_plots(PREDS[:0], LABELS[:0], tmp_path / "none", class_names=["a", "b"]) == []


def test_the_confusion_of_very_many_classes_is_that_of_the_most_frequent(monkeypatch, tmp_path):
    shapes, titles, plain = [], [], Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, shares, **options: shapes.append(shares.shape) or plain(axes, shares, **options)
    )
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.append(figure.axes[0].get_title()))
    labels = np.arange(2500) % 1200
    write_plots(
        RNG.random((2500, 1200)).astype(np.float32), labels, tmp_path, class_names=[str(index) for index in range(1200)]
    )
    assert shapes == [(100, 100)] and titles[-1] == "Confusion of the 100 most frequent of 1,200 classes"
