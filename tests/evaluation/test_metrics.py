"""Every metric against scikit-learn, or undefined with a reason.   pytest tests/evaluation/test_metrics.py"""

import warnings

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics

from mmbert_core.data import leaks
from mmbert_core.evaluation import metrics
from mmbert_core.evaluation.intervals import weighted_metric
from mmbert_core.evaluation.metrics import EPS, METRICS, VALIDATION_ONLY, compute_metrics, lower_is_better, within_range
from mmbert_core.runtime.errors import InputError

BINARY = (*METRICS, *VALIDATION_ONLY, "average_precision_class_no", "average_precision_class_yes")
SEVERAL = (*METRICS, *VALIDATION_ONLY, *(f"average_precision_class_{name}" for name in "abcd"))


def binary_rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(kind))
    num_rows = {"two rows": 2, "large and rare": 60_000}.get(kind, 397)
    labels = (rng.random(num_rows) < (0.003 if kind == "large and rare" else 0.3)).astype(np.int64)
    labels[:2] = 0, 1
    preds = 1 / (1 + np.exp(-rng.normal(size=num_rows) - 2 * labels + 1))
    if kind == "tied":
        preds = preds.round(1)
    if kind == "constant":
        preds = np.full(num_rows, 0.5)
    if kind == "extreme":
        preds = preds**40  # down to 1e-50: 1 - p would tie them all
    if kind == "perfect":
        preds = labels * 0.9 + 0.05
    return preds.astype(np.float32), labels


def sklearn_counts(labels, chosen, average):
    return sklearn_metrics.precision_recall_fscore_support(labels, chosen, average=average, zero_division=0)[:3]


def loss_after_temperature(table: np.ndarray, labels: np.ndarray) -> float:
    """Of probabilities [N, K], at the temperature from 0.05 to 20 with the least loss of smoothed labels."""
    num_rows, num_classes = table.shape
    logits = np.log(np.maximum(table, [2.0**-25, 2.0**-150] if num_classes == 2 else 2.0**-150))  # rounded to 1, to 0
    targets = np.eye(num_classes)[labels] * (1 - 1 / (num_rows + 1)) + 1 / (num_rows + 1) / num_classes

    def loss(inverse: float, targets: np.ndarray) -> float:
        calibrated = log_softmax(inverse * logits, axis=1)
        return -(targets * calibrated.clip(np.log(EPS) if targets.max() == 1 else None)).sum(axis=1).mean()

    best = minimize_scalar(loss, bounds=(0.05, 20), args=(targets,), method="bounded", options={"xatol": 1e-9}).x
    return loss(best, np.eye(num_classes)[labels])


def reference(preds: np.ndarray, labels: np.ndarray, class_names: str | list[str]) -> dict[str, float]:
    """The same metrics by scikit-learn, and the calibration error by its definition."""
    binary = preds.ndim == 1
    chosen = (preds > 0.5).astype(int) if binary else preds.argmax(axis=1)
    table = np.stack([1 - preds.astype(np.float64), preds], axis=1) if binary else preds.astype(np.float64)
    precision, recall, f1 = sklearn_counts(labels, chosen, "binary" if binary else "macro")
    confidence = preds.astype(np.float64) if binary else table.max(axis=1)
    hit = labels if binary else chosen == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((hit[bins == b] - confidence[bins == b]).sum()) / len(labels) for b in range(15)]
    one_hot = np.eye(len(class_names))[labels]
    scores = np.stack([-preds, preds], axis=1) if binary else preds
    of_label = table[np.arange(len(labels)), labels].clip(EPS, 1 - EPS)
    each = [sklearn_metrics.average_precision_score(one_hot[:, k], scores[:, k]) for k in range(len(class_names))]
    average = sklearn_metrics.average_precision_score
    return {
        "accuracy": sklearn_metrics.accuracy_score(labels, chosen),
        "f1_score": f1,
        "f1_macro": sklearn_counts(labels, chosen, "macro")[2],
        "f1_micro": sklearn_counts(labels, chosen, "micro")[2],
        "f1_weighted": sklearn_counts(labels, chosen, "weighted")[2],
        "precision": precision,
        "recall": recall,
        "auroc": sklearn_metrics.roc_auc_score(*((labels, preds) if binary else (one_hot, preds))),
        "average_precision": average(*((labels, preds) if binary else (one_hot, preds))),
        "mcc": sklearn_metrics.matthews_corrcoef(labels, chosen),
        "log_loss": -np.log(of_label).mean(),
        "log_loss_calibrated": loss_after_temperature(table, labels),
        "ece": sum(gaps),
        **{f"average_precision_class_{name}": each[k] for k, name in enumerate(class_names)},
    }


def assert_equal_to_reference(result, expected: dict[str, float]) -> None:
    assert result.undefined == {}
    assert set(result.values) == {f"val/{name}" for name in expected}
    for name, value in expected.items():
        assert result.values[f"val/{name}"] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "extreme", "perfect", "two rows", "large and rare"])
def test_binary_equals_scikit_learn(kind):
    preds, labels = binary_rows(kind)
    result = compute_metrics(preds, labels, BINARY, "binary", 2, "val", class_names=["no", "yes"])
    assert_equal_to_reference(result, reference(preds, labels, ["no", "yes"]))
    assert result.values["val/average_precision_class_yes"] == result.values["val/average_precision"]
    assert all(type(value) is float for value in result.values.values())


def several_rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    labels = rng.choice(4, size=503, p=[0.6, 0.25, 0.1, 0.05])
    logits = rng.normal(size=(503, 4)) + 1.5 * np.eye(4)[labels]
    if kind == "never predicted":
        logits[:, 3] = -9
    preds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if kind == "tied":
        preds = np.full_like(preds, 0.1) + 0.6 * np.eye(4)[preds.argmax(axis=1)]
        preds[::3] = 0.25
    return preds.astype(np.float32), labels


@pytest.mark.parametrize("kind", ["random", "tied", "never predicted"])
def test_several_classes_equal_scikit_learn(kind):
    preds, labels = several_rows(kind)
    result = compute_metrics(preds, labels, SEVERAL, "multiclass", 4, "val", class_names=list("abcd"))
    expected = reference(preds, labels, "abcd")
    assert_equal_to_reference(result, expected)
    one_against_rest = sklearn_metrics.roc_auc_score(np.eye(4)[labels], preds, average="macro")
    assert result.values["val/auroc"] == pytest.approx(one_against_rest, abs=1e-6)


def test_log_loss_is_scikit_learns_and_clamped_at_float32_eps():
    preds, labels = binary_rows("random")
    value = compute_metrics(preds, labels, ["log_loss"], "binary", 2, "val").values["val/log_loss"]
    assert value == pytest.approx(sklearn_metrics.log_loss(labels, preds), abs=1e-6)
    preds, labels = several_rows("random")
    value = compute_metrics(preds, labels, ["log_loss"], "multiclass", 4, "val").values["val/log_loss"]
    assert value == pytest.approx(sklearn_metrics.log_loss(labels, preds / preds.sum(1, keepdims=True)), abs=1e-6)
    for dtype in (np.float32, np.float64):  # the bound does not follow the dtype
        sure = compute_metrics(np.array([1.0, 1.0], dtype), np.array([0, 1]), ["log_loss"], "binary", 2, "val")
        assert sure.values["val/log_loss"] == pytest.approx(-(np.log(EPS) + np.log(1 - EPS)) / 2, rel=1e-9)


# ---- undefined ----


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(label):
    preds = np.array([0.2, 0.8, 0.6], dtype=np.float32)
    result = compute_metrics(preds, np.full(3, label), BINARY, "binary", 2, "val", class_names=["no", "yes"])
    ranking = {f"val/{n}" for n in BINARY if n == "auroc" or n.startswith("average_precision")}
    assert set(result.undefined) == ranking
    assert {key for key, value in result.values.items() if value is None} == ranking
    assert result.undefined["val/auroc"] == f"only one class in the labels: {['no', 'yes'][label]!r}"
    chosen = (preds > 0.5).astype(int)
    assert result.values["val/accuracy"] == pytest.approx((chosen == label).mean())
    f1 = sklearn_metrics.f1_score(np.full(3, label), chosen, zero_division=0)
    assert result.values["val/f1_score"] == pytest.approx(f1, abs=1e-6)
    assert result.values["val/mcc"] == 0.0


@pytest.mark.parametrize("labels, preds", [([1, 1], [0.9, 0.8]), ([0, 1], [0.9, 0.8]), ([0, 0], [0.9, 0.1])])
def test_mcc_with_a_zero_denominator_is_0_as_scikit_learns(labels, preds):
    labels, preds = np.array(labels), np.array(preds)
    value = compute_metrics(preds, labels, ["mcc"], "binary", 2, "val").values["val/mcc"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert value == sklearn_metrics.matthews_corrcoef(labels, preds > 0.5) == 0.0


def test_a_class_without_rows():
    preds, labels = several_rows("random")
    keep = labels != 2
    preds, labels = preds[keep], labels[keep]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchmetrics' own are not for the user
        result = compute_metrics(preds, labels, SEVERAL, "multiclass", 4, "test", class_names=list("abcd"))
    hit = ("test/auroc", "test/average_precision", "test/average_precision_class_c")
    assert result.undefined == dict.fromkeys(hit, "class 'c' has no row")
    expected = sklearn_metrics.average_precision_score(labels == 1, preds[:, 1])
    assert result.values["test/average_precision_class_b"] == pytest.approx(expected, abs=1e-6)
    f1 = sklearn_metrics.f1_score(labels, preds.argmax(axis=1), average="macro")
    assert result.values["test/f1_macro"] == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize("task, num_classes, shape", [("binary", 2, (0,)), ("multiclass", 3, (0, 3))])
def test_no_rows(task, num_classes, shape):
    result = compute_metrics(np.zeros(shape), np.zeros(0, np.int64), METRICS, task, num_classes, "val")
    assert result.values == {f"val/{name}": None for name in METRICS}
    assert result.undefined == {f"val/{name}": "no rows" for name in METRICS}


def test_predictions_that_are_not_finite():
    result = compute_metrics(np.array([0.1, np.nan, np.inf]), np.array([0, 1, 1]), METRICS, "binary", 2, "val")
    assert set(result.undefined.values()) == {"2 of 3 predictions are not finite"}
    assert set(result.values.values()) == {None}


# ---- names and arrays ----


def test_unknown_metric_names_the_choices_and_the_nearest():
    rows = (np.array([0.1, 0.9]), np.array([0, 1]))
    with pytest.raises(InputError) as caught:
        compute_metrics(*rows, ["accuracy", "auorc"], "binary", 2, "val", class_names=["no", "yes"])
    message = str(caught.value)
    assert "\n" not in message and "'auorc'" in message and "nearest: auroc" in message
    assert all(name in message for name in BINARY)
    with pytest.raises(InputError, match="average_precision_class_maybe"):
        compute_metrics(*rows, ["average_precision_class_maybe"], "binary", 2, "val", class_names=["no", "yes"])


def test_only_the_asked_metrics_under_the_stages_name():
    result = compute_metrics(np.array([0.1, 0.9]), np.array([0, 1]), ["mcc", "accuracy"], "binary", 2, "test")
    assert result.values == {"test/mcc": 1.0, "test/accuracy": 1.0}


def test_one_half_is_class_0_and_a_tie_the_first_class():
    assert compute_metrics(np.array([0.5]), np.array([0]), ["accuracy"], "binary", 2, "v").values["v/accuracy"] == 1.0
    tied = np.full((1, 3), 1 / 3)
    assert compute_metrics(tied, np.array([0]), ["accuracy"], "multiclass", 3, "v").values["v/accuracy"] == 1.0


@pytest.mark.parametrize(
    "preds, labels, task, num_classes, words",
    [
        (np.zeros(3), np.zeros(2, int), "binary", 2, "expected preds of shape"),
        (np.zeros((2, 2)), np.zeros(2, int), "binary", 2, "expected preds of shape"),
        (np.zeros(2), np.array([0, 2]), "binary", 2, "expected labels from 0 to 1, found 0 to 2"),
        (np.zeros((2, 3)), np.array([0, -1]), "multiclass", 3, "expected labels from 0 to 2"),
        (np.zeros(2), np.zeros(2, int), "binary", 3, "2 when binary"),
        (np.zeros(2), np.zeros(2, int), "regression", 2, "binary or multiclass"),
    ],
)
def test_arrays_that_do_not_fit(preds, labels, task, num_classes, words):
    with pytest.raises(ValueError, match=words):
        compute_metrics(preds, labels, ["accuracy"], task, num_classes, "val")


@pytest.mark.parametrize("seed", [32, 48, 58, 60, 126, 162])  # whose sums in float32 come to 1.0000001
def test_no_metric_leaves_its_range(seed: int) -> None:
    """A perfect ranking has an AUROC of at most 1, a reversed one of at least 0, in metrics, draws and leaks."""
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(20, 3000))
    labels = (rng.random(num_rows) < rng.random()).astype(np.int64)
    labels[:2] = 0, 1
    preds = np.where(labels == 1, 0.5 + rng.random(num_rows) / 2, rng.random(num_rows) / 2).astype(np.float32)
    weights = rng.poisson(1, num_rows).astype(np.float64)
    for scores, expected in ((preds, 1.0), (1 - preds, 0.0)):
        values = compute_metrics(scores, labels, METRICS, "binary", 2, "x").values
        assert values["x/auroc"] == pytest.approx(expected, abs=1e-6)
        assert (
            all(0 <= value <= 1 for name, value in values.items() if name not in ("x/mcc", "x/log_loss"))
            and -1 <= values["x/mcc"] <= 1
        )
        drawn = [
            weighted_metric(name, scores, labels, ["0", "1"])(weights)
            for name in ("auroc", "average_precision", "average_precision_class_0")
        ]
        assert all(0 <= value <= 1 for value in [*drawn, leaks.auroc(scores, labels == 1)])
    for name in ("auroc", "mcc", "log_loss"):
        assert np.isnan(within_range(name, float("nan")))
    assert (
        within_range("auroc", 1.0000001),
        within_range("auroc", -1e-9),
        within_range("mcc", -1.1),
        within_range("log_loss", 7.0),
    ) == (1.0, 0.0, -1.0, 7.0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_model_that_is_only_too_sure_loses_nothing_after_the_temperature(temperature: float) -> None:
    """The metric is that of the same ranking at any temperature, and not above the plain log loss."""
    preds, labels = several_rows("random")
    logits = temperature * np.log(preds.astype(np.float64))
    sharper = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = ["log_loss", "log_loss_calibrated"]
    plain, values = (compute_metrics(each, labels, names, "multiclass", 4, "val").values for each in (preds, sharper))
    assert values["val/log_loss_calibrated"] == pytest.approx(plain["val/log_loss_calibrated"], abs=1e-5)
    assert values["val/log_loss_calibrated"] <= values["val/log_loss"] + 1e-4
    assert lower_is_better("val/log_loss_calibrated")


# ---- many classes ----


@pytest.mark.parametrize("kind", ["distinct", "tied", "constant", "perfect"])
def test_many_classes_equal_scikit_learn_without_torchmetrics(kind, monkeypatch):
    monkeypatch.setattr(metrics, "functional", None)  # whose matrices and curves of hundreds of classes take minutes
    rng, names = np.random.default_rng(5), [f"code {index}" for index in range(41)]
    labels = rng.permutation(np.arange(300) % 41)
    preds = rng.random((300, 41)) + np.eye(41)[labels] * (50 if kind == "perfect" else 0.5)
    preds = np.ones_like(preds) if kind == "constant" else np.round(preds, 1) if kind == "tied" else preds
    preds = (preds / preds.sum(axis=1, keepdims=True)).astype(np.float32)
    wanted = (*METRICS, *VALIDATION_ONLY, *(f"average_precision_class_{name}" for name in names))
    result = compute_metrics(preds, labels, wanted, "multiclass", 41, "val", class_names=names)
    assert_equal_to_reference(result, reference(preds, labels, names))
    if kind == "perfect":
        assert result.values["val/auroc"] == result.values["val/average_precision"] == 1.0


def test_many_classes_without_rows_are_undefined_with_their_reason():
    names = [f"c{index}" for index in range(40)]
    preds = np.random.default_rng(0).random((50, 40)).astype(np.float32)
    wanted = ["auroc", "average_precision_class_c1", "average_precision_class_c39", "f1_macro"]
    some = compute_metrics(preds, np.arange(50) % 39, wanted, "multiclass", 40, "val", class_names=names)
    assert some.undefined == dict.fromkeys(["val/auroc", "val/average_precision_class_c39"], "class 'c39' has no row")
    one = compute_metrics(preds, np.ones(50, np.int64), wanted, "multiclass", 40, "val", class_names=names)
    assert one.undefined["val/average_precision_class_c1"] == "class 'c1' has all rows"
    assert one.undefined["val/auroc"] == "only one class in the labels: 'c1'"
