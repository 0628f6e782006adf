"""The sections of report.json: one declaration for writing, reading and checking.

K classes. A section that is absent or null is `Missing`: reports of other versions have fewer or more sections.
`Number` may be null, and an interval may lack an end.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from mmbert_core.report.typed_json import Missing, check_of, from_json, json_key, left_out
from mmbert_core.storage.schema import Check, Mismatch, array, constant, describe, nullable, number, record, whole

FORMAT_VERSION = 1
LARGEST = 1e39  # above any float32, the type of the model's numbers; charts can subtract and divide without overflow

Finite = Annotated[float, number(-LARGEST, LARGEST)]
Number = Annotated[float | None, nullable(number(-LARGEST, LARGEST))]
Count = Annotated[int, whole(0)]
Interval = Annotated[list[float | None] | None, nullable(array(nullable(number(-LARGEST, LARGEST)), length=2))]


# ---- quality of the model ----


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric: its value with the interval, or why it has none."""

    value: Number = None
    interval: Interval = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Metrics:
    names: list[str]
    model: dict[str, Cell | None]
    classes_left_out: Count = left_out(0)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    name: str
    how: str | None = None
    metrics: dict[str, Cell | None]


@dataclass(frozen=True, kw_only=True)
class Baselines:
    rows: list[Baseline]
    verdict: str | None = None


@dataclass(frozen=True, kw_only=True)
class BlendMember:
    """A member with its metrics alone, or the blend itself, which has no weight."""

    name: str
    how: str | None = left_out(None)
    weight: Number = left_out(None)
    val_log_loss: Number = None
    metrics: dict[str, Cell | None]


@dataclass(frozen=True, kw_only=True)
class Blend:
    rows: list[BlendMember]
    metrics: list[str]
    val_rows: Number = None


@dataclass(frozen=True, kw_only=True)
class ThresholdRow:
    """The metrics of the report's rows at one threshold."""

    threshold: Number = None
    precision: Number = None
    recall: Number = None
    f1: Number = None
    alerts_per_1000: Number = None
    false_alerts_per_1000: Number = None


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The chosen threshold with its metrics on the validation rows; `table` has metrics of the report's rows."""

    value: Number = None
    rule: str | None = None
    precision: Number = None
    recall: Number = None
    f1: Number = None
    alerts_per_1000: Number = None
    rows: Number = None  # validation rows
    reason: str | None = None
    chosen_on: str | None = None
    table: list[ThresholdRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Rows whose predicted probability is between `low` and `high`."""

    low: Number = None
    high: Number = None
    rows: Count
    mean: Number  # of the predicted probabilities
    share: Number  # of rows that have the class


@dataclass(frozen=True, kw_only=True)
class Calibration:
    temperature: Number = None
    rows: Number = None  # validation rows
    ece_before: Number = None
    ece_after: Number = None
    reason: str | None = None
    method: str | None = None
    bins: list[Bin] = field(default_factory=list)
    calibrated_bins: list[Bin] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Curve:
    x: list[Number]
    y: list[Number]
    area: Number = None
    share: Number = left_out(None)  # of rows that have the class


@dataclass(frozen=True, kw_only=True)
class Curves:
    curves: dict[str, Curve]  # by class name


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """With few classes `counts` [K, K] (label, predicted); with many, three counts [K] and the frequent mistakes."""

    counts: list[list[Count]] | None = left_out(None)
    mistakes: list[list[Count]] | None = left_out(None)  # label, predicted class, rows
    right: list[Count] | None = left_out(None)
    labelled: list[Count] | None = left_out(None)
    predicted: list[Count] | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Histograms: `edges` [bins + 1] of the probability, `counts` [bins] by class name, or by "right" and "wrong"."""

    edges: Annotated[list[float], array(number(-LARGEST, LARGEST), min_length=2)]
    counts: dict[str, list[Count]]


# ---- training, slices, wrong rows, data ----


@dataclass(frozen=True, kw_only=True)
class Training:
    steps: list[Number] = field(default_factory=list)
    train_loss: list[Number] = field(default_factory=list)
    lr: list[Number] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best_step: Number = None
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    column: str
    value: str
    rows: Count
    share_of_classes: list[Number] | None = left_out(None)
    metrics: dict[str, Number]
    intervals: dict[str, Interval] = field(default_factory=dict)
    undefined: dict[str, str | None] = field(default_factory=dict)
    largest_classes: list[Any] | None = left_out(None)  # with many classes: [index, share] of the largest


@dataclass(frozen=True, kw_only=True)
class Slices:
    metric: str
    rows: list[Slice]


@dataclass(frozen=True, kw_only=True)
class Column:
    """How much the metric drops when the cells of this column are permuted."""

    name: str
    kind: str | None = None
    drop: Number
    spread: Number = None


@dataclass(frozen=True, kw_only=True)
class Importance:
    metric: str
    rows: Number = None
    repeats: Number = None
    items: list[Column]


@dataclass(frozen=True, kw_only=True)
class WrongRow:
    location: str | None = json_key("place", None)  # file and row
    id: Any = None
    label: str
    pred: str
    prob: Number = None
    columns: dict[str, Any] = field(default_factory=dict)
    tokens: Annotated[list[list[Any]], array(array(check_of(Any), length=2))] = field(default_factory=list)
    method: str | None = None


@dataclass(frozen=True, kw_only=True)
class Errors:
    rows: list[WrongRow]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    bytes: Number = left_out(None)  # not known for a tokenizer
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    rows: Count | None = None
    classes: dict[str, Count] | None = None
    mean_tokens: Number = None
    classes_left_out: Count | None = left_out(None)
    rows_left_out: Count | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    files: dict[str, DataFile] = field(default_factory=dict)
    train: Split | Missing = left_out(Missing())
    val: Split | Missing = left_out(Missing())
    test: Split | Missing = left_out(Missing())


# ---- the report ----


@dataclass(frozen=True, kw_only=True)
class Report:
    format_version: Annotated[int, constant(FORMAT_VERSION)] = FORMAT_VERSION
    title: str
    created: str | None = None
    model_path: str | None = None
    input: list[str] = field(default_factory=list)
    num_rows: Number = None
    has_labels: bool = False
    task: str | None = None
    class_names: list[str]
    label_name: str | None = None
    warnings: list[str] | Missing = Missing()
    metrics: Metrics | Missing = Missing()
    baselines: Baselines | Missing = Missing()
    blend: Blend | Missing = left_out(Missing())
    threshold: Threshold | Missing = Missing()
    calibration: Calibration | Missing = Missing()
    roc: Curves | Missing = Missing()
    precision_recall: Curves | Missing = Missing()
    confusion: Confusion | Missing = Missing()
    scores: Scores | Missing = Missing()
    training: Training | Missing = Missing()
    slices: Slices | Missing = Missing()
    importance: Importance | Missing = Missing()
    errors: Errors | Missing = Missing()
    config: dict[str, Any] | Missing = Missing()
    resolved: dict[str, Any] = field(default_factory=dict)
    data: DataSummary | Missing = Missing()
    versions: dict[str, Any] | Missing = Missing()


def check_report(value: Any) -> None:
    """A check for `schema.check_structure`: the sections, and that counts and indices fit the number of classes."""
    record({"format_version": constant(FORMAT_VERSION)}, others=True)(value)
    check_of(Report)(value)
    num_classes = len(value["class_names"])
    slice_rows = array(record({}, {"largest_classes": nullable(array(_share_of(num_classes)))}, others=True))
    by_class = {
        "confusion": _confusion_of(num_classes),
        "slices": nullable(record({}, {"rows": slice_rows}, others=True)),
    }
    record({}, by_class, others=True)(value)


def report_of(value: dict[str, Any]) -> Report:
    """The report from the values of a report.json that has passed `check_report`."""
    return from_json(Report, value)


def _share_of(num_classes: int) -> Check:
    """A pair of class index and share."""

    def check(value: Any) -> None:
        array(check_of(Finite), length=2)(value)
        whole(0, num_classes - 1)(value[0])

    return check


def _confusion_of(num_classes: int) -> Check:
    """Counts [K, K]; with many classes, three counts of each and the most frequent mistakes."""
    of_class = array(whole(0), length=num_classes)
    grid = nullable(record({"counts": array(array(whole(0), length=num_classes), length=num_classes)}, others=True))

    def check(value: Any) -> None:
        if value is None or "counts" in value:
            return grid(value)
        if set(value) == {"reason"}:
            return None
        record({"right": of_class, "labelled": of_class, "predicted": of_class}, others=True)(value)
        return record({"mistakes": array(_mistake_among(value["labelled"]))}, others=True)(value)

    return check


def _mistake_among(labelled: list[int]) -> Check:
    """[label, predicted class, rows]; `labelled` [K]: rows of each label."""

    def check(value: Any) -> None:
        array(whole(0), length=3)(value)
        for index in value[:2]:
            whole(0, len(labelled) - 1)(index)
        if labelled[value[0]] == 0:
            raise Mismatch("a label that has rows", describe(value[0]))

    return check
