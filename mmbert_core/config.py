"""Every setting of a run, once: name, type, default, meaning and range.

Names and defaults of the original module's keys are kept, but for the metric that chooses the best step of two classes. `config_reader` turns files and flags into a `Config`.
"""

from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Literal

from mmbert_core.runtime.errors import InputError, format_for_message

# Keys that may change between a checkpoint and its resume: none of them touches what is computed from sound numbers,
# but microbatches_per_step, which a run that ran out of memory must be able to raise, and whose dropout then differs.
FREE_ON_RESUME = frozenset(
    {
        "microbatches_per_step",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "num_threads",
        "model_path",
        "cache_path",
        "resume",
        "on_nonfinite",
        "memory_limit_mb",
        "timeout_seconds",
        "threshold_rule",
        "slice_columns",
    }
)
# The best step of two classes is chosen by a ranking metric: F1 is the same, often 0, for many steps where rows or positives are few.
RANKING_METRICS, ORIGINAL_METRICS = ("auroc", "average_precision", "f1_score", "accuracy"), ("accuracy", "f1_score")
RANKING_CHOICE, ORIGINAL_CHOICE = "val/auroc", "val/f1_score"
MANY = 10**9  # of steps or validations: more than any run has, and small enough for every counter


def setting(
    default: Any,
    group: str,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    default_words: str | None = None,
) -> Any:
    """A dataclass field with its help text; `...` as default means required.

    `low` and `high` bound its numbers, both included; words such as auto are beyond them. `default_words`: a default that is resolved later.
    """
    metadata = {
        "group": group,
        "meaning": meaning,
        "range": None if high is None else (low, high),
        "default_words": default_words,
    }
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. Raises `InputError` when a value is out of its range or two values contradict.

    Every rank holds the same one. `encoder` is called `tokenizer` in configs of the original module; both names are read.
    """

    # ---- data ----
    train_path: tuple[str, ...] = setting(
        (), "data", "training rows: a file, several files, or a quoted glob (.csv .tsv .jsonl .parquet, .gz)"
    )
    val_path: tuple[str, ...] = setting(
        (), "data", "validation rows, for the best step and the early stop; none: val_fraction of the training rows"
    )
    test_path: tuple[str, ...] = setting(
        (), "data", "test rows, scored after training by the best step; the label column may be absent"
    )
    text_name: tuple[str, ...] = setting(
        ..., "data", "text column(s), joined in order with one space; [] (as a flag: no word): a columns-only model"
    )
    label_name: str = setting(..., "data", "label column; its cells are read as text")
    id_name: str | None = setting(None, "data", "id column, carried through to the predictions byte for byte")
    tab_field_list: tuple[str, ...] = setting((), "data", "numeric columns; none: a text-only model")
    cat_field_list: tuple[str, ...] = setting((), "data", "categorical columns")
    group_name: str | None = setting(
        None, "data", "column whose groups are never split between training and validation"
    )
    val_fraction: float = setting(
        0.1,
        "data",
        "share of training rows for validation when val_path is not set, 0..0.9; 0: no validation",
        low=0,
        high=0.9,
    )
    max_train_rows: int | None = setting(
        None, "data", "train on a seeded random sample of so many rows", low=2, high=10**12
    )
    cache_path: str | None = setting(None, "data", "folder of the token cache; none: MODEL_PATH/cache")
    tsv_quoting: Literal["auto", "standard", "none"] = setting(
        "auto",
        "data",
        "quotes in .tsv files: standard: a cell may be quoted and then hold tabs and line breaks; none: a quote is a quote; auto: standard, refused where a quoted cell may be rows of their own",
    )
    # ---- task ----
    is_binary: bool = setting(
        True, "task", "two classes, one probability (of class 1); false: num_classes probabilities"
    )
    num_classes: int = setting(2, "task", "number of classes, at least 2", low=2, high=1_000_000)
    positive_label: str | None = setting(
        None, "task", "label that is class 1 of a binary task; none: the second in order"
    )
    class_weights: tuple[float, ...] | Literal["balanced"] | None = setting(
        None,
        "task",
        "one loss weight per class in label order, or balanced: rows / (classes x rows of the class)",
        low=0,
        high=1_000_000,
    )
    metric_choices: tuple[str, ...] = setting(  # resolved in __post_init__
        None,
        "task",
        "metrics of each validation: accuracy f1_score f1_macro auroc average_precision precision recall mcc log_loss ece and more",
        default_words=f"{' '.join(ORIGINAL_METRICS)}; two classes, where early_stop_metric is not set either: {' '.join(RANKING_METRICS)}",
    )
    # ---- model ----
    encoder: str = setting(
        "bert-base-cased", "model", "pretrained encoder and tokenizer: a folder, or a name on the Hugging Face hub"
    )
    pooling: Literal["auto", "pooler", "cls", "mean", "last"] = setting(
        "auto",
        "model",
        "text vector: the encoder's pooler, its first token (cls), the mean of its tokens, or its last token; auto: as a sentence encoder was trained, else last for decoders, pooler if it has stored weights, else cls",
    )
    hidden_common_dim: int = setting(
        100, "model", "width of the text part and of the column part before they are joined", low=1, high=100_000
    )
    reinit_pooler: bool = setting(False, "model", "draw the pooler's weights anew before training")
    reinit_layers: int = setting(
        0, "model", "draw the weights of the last so many encoder layers anew before training", low=0, high=1_000
    )
    max_length: int = setting(
        256, "model", "tokens of one chunk of text, special tokens included", low=4, high=1_000_000
    )
    max_chunks: int = setting(
        1, "model", "most chunks of one text, encoded each and averaged; what is longer is cut", low=1, high=10_000
    )
    # ---- optimisation ----
    max_epochs: int = setting(10, "optimisation", "passes over the training rows", low=1, high=1_000_000)
    batch_size: int = setting(
        32, "optimisation", "rows of one optimizer step over all processes", low=1, high=10_000_000
    )
    microbatches_per_step: int | Literal["auto"] = setting(
        "auto",
        "optimisation",
        "parts of a step, each of similar text lengths, computed one at a time (more: less memory); auto is settled before step 1 and printed",
        low=1,
        high=1_000_000,
    )
    lr: float = setting(
        2e-5, "optimisation", "peak learning rate of AdamW; small encoders need more, such as 2e-4", low=0, high=100
    )
    head_lr: float | None = setting(
        None, "optimisation", "peak learning rate of everything but the encoder; none: lr", low=0, high=100
    )
    weight_decay: float = setting(
        0.0, "optimisation", "AdamW weight decay; never on biases and normalisation weights", low=0, high=1_000
    )
    adam_epsilon: float = setting(1e-8, "optimisation", "AdamW epsilon, the guard of its division", low=0, high=1_000)
    run_scheduler: bool = setting(
        True,
        "optimisation",
        "true: linear decay of the learning rate to 0 after warm-up; false: constant after warm-up",
    )
    warmup_steps: int | float = setting(
        0,
        "optimisation",
        "optimizer steps of linear warm-up; below 1: a share of all steps, such as 0.1",
        low=0,
        high=MANY,
    )
    gradient_clip_val: float = setting(0.0, "optimisation", "largest gradient norm; 0: no clipping", low=0, high=10**9)
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "optimisation",
        "a loss or gradient that is no finite number: stop before the step, or skip the step (fp16 overflows are always skipped)",
    )
    memory_limit_mb: int | None = setting(
        None,
        "optimisation",
        "on the CPU: resident memory of a process that the trial of the largest micro-batch before step 1 may reach; none: what there is",
        low=1,
        high=10**9,
    )
    # ---- validation ----
    val_check_interval: int | float = setting(
        1.0,
        "validation",
        "1.0, 0.5: validate every such share of an epoch; 1, 200: every so many optimizer steps",
        low=0,
        high=MANY,
    )
    early_stop_metric: str = setting(  # resolved in __post_init__
        None,
        "validation",
        "decides which step is the best and when to stop: val_loss or val/<metric>; of equal values the one with the lower val_loss counts",
        default_words="val/f1_score; two classes, where metric_choices is not set either: val/auroc",
    )
    early_stop_patience: int = setting(
        10, "validation", "stop after so many validations in a row without a better step", low=1, high=MANY
    )
    threshold_rule: str = setting(
        "best_f1",
        "validation",
        "which probability counts as class 1 (two classes), chosen on the validation rows: best_f1, half, recall_at_precision=X, precision_at_recall=X, alerts_per_1000=X",
    )
    slice_columns: tuple[str, ...] = setting(
        (),
        "validation",
        "columns whose values or quarters the report looks at one by one; none: every numeric and categorical column",
    )
    # ---- run ----
    model_path: str = setting(..., "run", "folder of everything this run writes")
    resume: Literal["auto", "never"] | int = setting(
        "auto",
        "run",
        "auto: go on from the newest checkpoint, if any; never: start anew, refused where there are checkpoints; or the step of one. A restart by torchrun always goes on",
        low=0,
        high=10**12,
    )
    save_every: int = setting(500, "run", "optimizer steps between checkpoints", low=1, high=MANY)
    keep_checkpoints: int = setting(2, "run", "newest checkpoints to keep, besides the best", low=1, high=MANY)
    log_every: int = setting(10, "run", "optimizer steps between lines of metrics.jsonl", low=1, high=MANY)
    seed: int = setting(0, "run", "decides order, dropout, initial weights, sampling and split", low=0, high=2**63 - 1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "run", "auto: bf16 where the GPU has it, else fp16; fp32 on the CPU"
    )
    deterministic: bool = setting(False, "run", "bit-equal reruns on CUDA too, slower")
    timeout_seconds: int = setting(
        600, "run", "seconds that a process waits for the others before it gives up", low=1, high=1_000_000
    )
    num_threads: int | Literal["auto"] = setting(
        "auto",
        "run",
        "CPU threads of a process, at most 32 a core; auto: cores divided by the processes of the node",
        low=1,
        high=1_024,
    )

    def __post_init__(self) -> None:
        self._resolve_metrics()
        self._check_ranges()
        self._check_paths()
        self._check_columns()
        if self.is_binary and self.num_classes != 2:
            raise InputError(
                f"num_classes is {self.num_classes} but is_binary is true: set is_binary to false, or num_classes to 2"
            )
        self._check_class_weights()
        if self.early_stop_metric != "val_loss" and not self.early_stop_metric.startswith("val/"):
            raise InputError(
                f"early_stop_metric: expected val_loss or val/<metric>, found {format_for_message(self.early_stop_metric)}"
            )

    def _resolve_metrics(self) -> None:
        """The metrics that the config does not name, so that what is stored says what was used."""
        is_ranked = self.is_binary and self.metric_choices is None and self.early_stop_metric is None
        if self.metric_choices is None:
            object.__setattr__(self, "metric_choices", RANKING_METRICS if is_ranked else ORIGINAL_METRICS)
        if self.early_stop_metric is None:
            object.__setattr__(self, "early_stop_metric", RANKING_CHOICE if is_ranked else ORIGINAL_CHOICE)

    def _check_ranges(self) -> None:
        for name, item in config_fields().items():
            value = getattr(self, name)
            if item.metadata["range"] is not None and isinstance(value, (int, float)):
                _check_range(name, value, *item.metadata["range"])
        interval = self.val_check_interval
        if interval == 0 or (isinstance(interval, float) and interval > 1):
            raise InputError(
                f"val_check_interval: expected a share of an epoch above 0 and up to 1.0, or a whole number of steps, found {interval}"
            )

    def _check_paths(self) -> None:
        if not self.model_path.strip():
            raise InputError("model_path: expected a folder, found an empty value")
        for name in ("model_path", "cache_path", "encoder"):
            if "\0" in (getattr(self, name) or ""):
                raise InputError(f"{name}: expected a path, found a NUL character in it")
        for name in ("model_path", "cache_path", "encoder", "train_path", "val_path", "test_path"):
            value = getattr(self, name) or ()
            for path in (value,) if isinstance(value, str) else value:
                try:
                    path.encode("utf-8")  # model folders and reports hold paths as JSON
                except UnicodeEncodeError:
                    raise InputError(
                        f"{name}: expected a path in UTF-8, found other bytes in it: {format_for_message(path)}: rename it"
                    ) from None

    def _check_class_weights(self) -> None:
        if not isinstance(self.class_weights, tuple):
            return
        if len(self.class_weights) != self.num_classes:
            raise InputError(
                f"class_weights: expected {self.num_classes} weights (num_classes), found {len(self.class_weights)}"
            )
        low, high = config_fields()["class_weights"].metadata["range"]
        if not all(low <= weight <= high for weight in self.class_weights) or sum(self.class_weights) == 0:
            found = format_for_message(list(self.class_weights))
            raise InputError(
                f"class_weights: expected finite weights of at least {low} and at most {high:,}, not all 0, found {found}"
            )

    def _check_columns(self) -> None:
        if not self.text_name and not self.tab_field_list and not self.cat_field_list:
            raise InputError(
                "text_name is empty and there are no tab_field_list or cat_field_list: there is nothing to learn from"
            )
        roles: dict[str, str] = {}
        for key in ("text_name", "tab_field_list", "cat_field_list", "label_name"):
            value = getattr(self, key)
            for column in (value,) if isinstance(value, str) else value:
                if column in roles:
                    raise InputError(
                        f"column {format_for_message(column)} stands in {roles[column]} and in {key}: expected one role for each column"
                    )
                roles[column] = key
        if self.id_name in ("prob", "label", "pred", "prob_calibrated", self.label_name):
            raise InputError(
                f"id_name: {self.id_name!r} is a column that the prediction file has already: expected another column"
            )

    @property
    def task(self) -> str:
        """'binary' or 'multiclass', as torchmetrics and the original call it."""
        return "binary" if self.is_binary else "multiclass"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `Config(**config_reader.coerce_all(d))` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _check_range(name: str, value: int | float, low: float, high: float) -> None:
    """Raise `InputError` for a number outside of low..high, NaN among them."""
    if not value >= low:
        raise InputError(f"{name}: expected a number of at least {low}, found {format_for_message(value)}")
    if value > high:
        raise InputError(f"{name}: expected a number of at most {high:,}, found {format_for_message(value)}")


def config_fields() -> dict[str, Field]:
    """The settings by name, in the order of this file."""
    return {item.name: item for item in fields(Config)}
