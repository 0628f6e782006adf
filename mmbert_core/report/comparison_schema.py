"""The sections of compare.json: one declaration for writing, reading and checking.

R runs, the reference among them, by their names; K classes. A section that does not exist for a task is `Missing`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from mmbert_core.report.report_schema import FORMAT_VERSION, Bin, Count, Curves, Interval, Number
from mmbert_core.report.typed_json import Missing, check_of, from_json, left_out
from mmbert_core.storage.schema import Check, anything, array, constant, nullable, record, text, whole


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    name: str
    folder: str
    test_folder: str
    other_tests: Count = 0  # older test folders of this run, which are not compared
    threshold: Number = None  # None with several classes


@dataclass(frozen=True, kw_only=True)
class ComparedValue:
    """A metric of one run, its difference to the reference with the paired interval, and why one of them is missing."""

    value: Number = None
    difference: Number = left_out(None)
    interval: Interval = left_out(None)  # of the difference
    reason: str | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class ComparedMetrics:
    main: str  # the metric of the verdicts
    names: list[str]
    runs: dict[str, dict[str, ComparedValue]]  # by run and metric
    verdicts: list[str] = field(default_factory=list)  # on each run but the reference


@dataclass(frozen=True, kw_only=True)
class ComparedSetting:
    """A setting that is not the same in all runs, as text."""

    key: str
    values: dict[str, str]  # by run


@dataclass(frozen=True, kw_only=True)
class ComparedBins:
    """The calibration of each run: bins of the probability that was predicted, and the share found."""

    bins: dict[str, list[Bin]]  # by run


@dataclass(frozen=True, kw_only=True)
class ClassOfRun:
    """One class as one run predicts it."""

    predicted: Count
    right: Count
    precision: Number = None
    recall: Number = None
    f1: Number = None
    average_precision: ComparedValue = ComparedValue()


@dataclass(frozen=True, kw_only=True)
class ComparedClass:
    name: str
    rows: Count
    runs: dict[str, ClassOfRun]


@dataclass(frozen=True, kw_only=True)
class ComparedClasses:
    rows: list[ComparedClass]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Rows that the reference and another run predict right or wrong."""

    both_right: Count
    only_reference: Count  # right
    only_this: Count  # right
    both_wrong: Count
    other_class: Count  # predicted as different classes


@dataclass(frozen=True, kw_only=True)
class DisputedRow:
    """A row whose label has very different probabilities in the runs; text and columns where the test file has them."""

    row: Count  # from 1, in the order of the test file
    id: str | None = None
    label: str
    probabilities: dict[str, Number]  # of the row's own label, by run
    preds: dict[str, str]  # by run
    location: str | None = left_out(None)
    text: str | None = left_out(None)
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DisputedRows:
    rows: list[DisputedRow]
    without_texts: str | None = None  # why the rows have neither text nor columns


@dataclass(frozen=True, kw_only=True)
class Comparison:
    format_version: Annotated[int, constant(FORMAT_VERSION)] = FORMAT_VERSION
    title: str
    created: str | None = None
    task: str
    class_names: list[str]
    label_name: str | None = None
    num_rows: Annotated[int, whole(1)]
    reference: str  # a name in `runs`
    runs: list[ComparedRun]
    notes: list[str] = field(default_factory=list)
    metrics: ComparedMetrics
    settings: list[ComparedSetting]
    roc: Curves | Missing = left_out(Missing())  # two classes
    precision_recall: Curves | Missing = left_out(Missing())  # two classes
    calibration: ComparedBins
    classes: ComparedClasses | Missing = left_out(Missing())  # several classes
    agreement: dict[str, Agreement]  # by run, without the reference
    disputed_rows: DisputedRows | Missing = Missing()

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]

    @property
    def others(self) -> list[str]:
        """The runs but the reference."""
        return [name for name in self.names if name != self.reference]


def check_comparison(value: Any) -> None:
    """A check for `schema.check_structure`: the sections, and that each has the figures of all runs."""
    record({"format_version": constant(FORMAT_VERSION)}, others=True)(value)
    check_of(Comparison)(value)
    names = [run["name"] for run in value["runs"]]
    of_runs = _with_keys(names)
    of_others = _with_keys([name for name in names if name != value["reference"]])
    rows_of_classes = array(_containing(runs=of_runs))
    disputed = array(_containing(probabilities=of_runs, preds=of_runs))
    _containing(
        reference=text(choices=names),
        metrics=_containing(runs=of_runs),
        settings=array(_containing(values=of_runs)),
        calibration=_containing(bins=of_runs),
        agreement=of_others,
    )(value)
    optional = {"classes": _rows(rows_of_classes), "disputed_rows": _rows(disputed)}
    record({}, optional, others=True)(value)


def comparison_of(value: dict[str, Any]) -> Comparison:
    """The comparison from the values of a compare.json that has passed `check_comparison`."""
    return from_json(Comparison, value)


def _with_keys(keys: list[str]) -> Check:
    """An object that has all of `keys`, and may have more."""
    return _containing(**dict.fromkeys(keys, anything))


def _containing(**checks: Check) -> Check:
    """An object that has these keys, and may have more."""
    return record(checks, others=True)


def _rows(rows: Check) -> Check:
    """A section with rows; one that has only a reason has none."""
    return nullable(record({}, {"rows": rows}, others=True))
