"""Every key of a run's config, once: name, type, default, meaning, range, and whether it may change on resume.

Names and defaults are those of the original module, except for the metric that chooses the best step of two classes.
`config_reader` turns files and flags into a `Config`.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mmbert_core.config_checks import COLUMN_KEYS, check_values
from mmbert_core.config_metrics import ORIGINAL_DEFAULTS, RANKING_DEFAULTS, default_metrics
from mmbert_core.config_setting import Setting, setting, setting_of

MANY = 10**9  # steps or validations: more than any run has, and small enough for every counter


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run, the same on every rank.

    Raises `InputError` when a value is out of its range or two values contradict. Configs of the original module call
    `encoder` `tokenizer`; `config_reader` reads both names.
    """

    # ---- data ----
    train_path: tuple[str, ...] = setting(
        (), "training rows: a file, several files, or a quoted glob (.csv .tsv .jsonl .parquet, .gz)", group="data"
    )
    val_path: tuple[str, ...] = setting(
        (), "validation rows, for best step and early stop; none: val_fraction of the training rows", group="data"
    )
    test_path: tuple[str, ...] = setting(
        (), "test rows, scored after training with the best step's weights; the label may be absent", group="data"
    )
    text_name: tuple[str, ...] = setting(
        ..., "text columns, joined in order with one space; [] (as a flag: no word): a columns-only model", group="data"
    )
    label_name: str = setting(..., "label column; its cells are read as text", group="data")
    id_name: str | None = setting(None, "id column, copied to the predictions byte for byte", group="data")
    tab_field_list: tuple[str, ...] = setting((), "numeric columns; none: a text-only model", group="data")
    cat_field_list: tuple[str, ...] = setting((), "categorical columns", group="data")
    date_field_list: tuple[str, ...] = setting(
        (),
        "date columns (2019-09-24, 2019/9/24, with a time, 24 Sep 2019): read as age in days to the newest training "
        "date, month, weekday and, where there are times, hour",
        group="data",
    )
    date_order: Literal["unambiguous", "day_first", "month_first"] = setting(
        "unambiguous",
        "order in dates that end with the year, as 24/09/2019; unambiguous: 03/04/2019 is refused",
        group="data",
    )
    group_name: str | None = setting(
        None, "column whose groups are never split between training and validation", group="data"
    )
    val_fraction: float = setting(
        0.1,
        "share of the training rows used for validation when val_path is not set, 0..0.9; 0: no validation",
        group="data",
        at_least=0,
        at_most=0.9,
    )
    max_train_rows: int | None = setting(
        None, "train on a seeded random sample of so many rows", group="data", at_least=2, at_most=10**12
    )
    cache_path: str | None = setting(
        None,
        "folder of the token cache; none: MODEL_PATH/cache",
        group="data",
        may_change_on_resume=True,
        may_differ_between_nodes=True,
    )
    tsv_quoting: Literal["auto", "standard", "none"] = setting(
        "auto",
        "quotes in .tsv files: standard: a cell may be quoted and then hold tabs and line breaks; none: a quote is a "
        "quote; auto: standard, refused where a quoted cell may be rows of their own",
        group="data",
    )
    # ---- task ----
    is_binary: bool = setting(
        True, "two classes, one probability (of class 1); false: num_classes probabilities", group="task"
    )
    num_classes: int = setting(2, "number of classes, at least 2", group="task", at_least=2, at_most=10**6)
    positive_label: str | None = setting(
        None, "label that is class 1 of a binary task; none: the second in order", group="task"
    )
    class_weights: tuple[float, ...] | Literal["balanced"] | None = setting(
        None,
        "one loss weight per class in label order, or balanced: rows / (classes x rows of the class)",
        group="task",
        at_least=0,
        at_most=10**6,
    )
    metric_choices: tuple[str, ...] = setting(  # None is resolved in __post_init__
        None,
        "metrics of each validation: accuracy f1_score f1_macro auroc average_precision precision recall mcc log_loss "
        "ece and more",
        group="task",
        default_in_words=f"{' '.join(ORIGINAL_DEFAULTS['metric_choices'])}; two classes, where early_stop_metric is "
        f"not set either: {' '.join(RANKING_DEFAULTS['metric_choices'])}",
    )
    # ---- model ----
    encoder: str = setting(
        "bert-base-cased", "pretrained encoder and tokenizer: a folder, or a name on Hugging Face's hub", group="model"
    )
    pooling: Literal["auto", "pooler", "cls", "mean", "last"] = setting(
        "auto",
        "text vector: the encoder's pooler, its first token (cls), the mean of its tokens, or its last token; auto: as "
        "a sentence encoder was trained, else last for decoders, pooler if it has stored weights, else cls",
        group="model",
    )
    hidden_common_dim: int = setting(
        100,
        "width of the text vector and of the column vector before they are joined",
        group="model",
        at_least=1,
        at_most=10**5,
    )
    fusion: Literal["concat", "gate", "cross_attention", "moe", "tabm"] = setting(
        "concat", "how text and columns are joined: concat adds up what they say, the others combine it", group="model"
    )
    column_encoding: Literal["standard", "piecewise_linear"] = setting(
        "standard",
        "numbers as inputs of the model: standard: standardised; piecewise_linear: scaled by their quartiles, and "
        "one feature per bin between quantiles of the training rows; then also smaller embeddings of categories",
        group="model",
    )
    min_category_count: int = setting(
        1,
        "categories of fewer training rows share one learned weight, which an unseen category has too; 1: each has its "
        "own, and an unseen one adds nothing",
        group="model",
        at_least=1,
        at_most=10**6,
    )
    wide_columns: bool = setting(
        False,
        "add a linear path from the columns to the logits: scaled numbers, their bins between quantiles of the "
        "training rows, and one weight per category and class",
        group="model",
    )
    blend: Literal["none", "auto"] = setting(
        "none",
        "auto: predict a weighted mean of the probabilities of the trained network and of logistic regressions on "
        "words and columns, with weights fitted after training; needs validation rows",
        group="model",
        may_change_on_resume=True,
    )
    reinit_pooler: bool = setting(False, "initialise the pooler's weights at random before training", group="model")
    reinit_layers: int = setting(
        0,
        "initialise the weights of the last so many encoder layers at random before training",
        group="model",
        at_least=0,
        at_most=1_000,
    )
    max_length: int = setting(
        256, "tokens of one chunk of text, special tokens included", group="model", at_least=4, at_most=10**6
    )
    max_chunks: int = setting(
        1,
        "most chunks of one text; each is encoded, and the vectors are averaged; longer texts are truncated",
        group="model",
        at_least=1,
        at_most=10**4,
    )
    # ---- optimisation ----
    recipe: Literal["original", "recommended"] | None = setting(
        None,
        "recommended: every key that is not set gets the value that was measured best, printed; original: the default "
        "in this table; none: recommended, in JSON and with keys of the original: original. For config files and flags",
        group="optimisation",
        may_change_on_resume=True,
    )
    max_epochs: int = setting(10, "passes over the training rows", group="optimisation", at_least=1, at_most=10**6)
    batch_size: int = setting(
        32, "rows of one optimizer step over all processes", group="optimisation", at_least=1, at_most=10**7
    )
    # May change although dropout differs then: a run that ran out of memory must be able to raise it.
    microbatches_per_step: int | Literal["auto"] = setting(
        "auto",
        "micro-batches of a step, each of similar text lengths, computed one at a time (more: less memory); auto is "
        "resolved before step 1 and printed",
        group="optimisation",
        at_least=1,
        at_most=10**6,
        may_change_on_resume=True,
    )
    lr: float | Literal["auto"] = setting(
        2e-5,
        "peak learning rate of AdamW; small encoders need about 2e-4; auto: by the encoder's hidden size, printed",
        group="optimisation",
        at_least=0,
        at_most=100,
    )
    head_lr: float | Literal["auto"] | None = setting(
        None,
        "peak learning rate of all but the encoder; none: lr; auto: printed",
        group="optimisation",
        at_least=0,
        at_most=100,
    )
    layer_decay: float = setting(
        1.0,
        "learning rate of each encoder layer relative to the layer after it; that of the embeddings is the smallest",
        group="optimisation",
        at_least=0.01,
        at_most=1,
    )
    head_first: Literal["never", "auto", "always"] = setting(
        "never",
        "before step 1, fit all but the encoder to the encoder's vectors and start from there; that model is kept "
        "unless fine-tuning beats it; auto: where there are validation rows and at least 50 training rows",
        group="optimisation",
    )
    weight_decay: float = setting(
        0.0, "AdamW weight decay; never on biases and normalisation", group="optimisation", at_least=0, at_most=1_000
    )
    adam_epsilon: float = setting(
        1e-8, "AdamW epsilon, added to the denominator", group="optimisation", at_least=0, at_most=1_000
    )
    run_scheduler: bool = setting(
        True,
        "true: linear decay of the learning rate to 0 after warm-up; false: constant after warm-up",
        group="optimisation",
    )
    schedule: Literal["linear", "cosine", "constant"] | None = setting(
        None,
        "learning rate after warm-up: linear or cosine decay to 0, or constant; none: as run_scheduler says",
        group="optimisation",
    )
    warmup_steps: int | float = setting(
        0,
        "optimizer steps of linear warm-up; below 1: a share of all steps, such as 0.1",
        group="optimisation",
        at_least=0,
        at_most=MANY,
    )
    aux_loss_weight: float = setting(
        0.0,
        "weight of the losses of two further heads in training, one on the text alone, one on the columns alone, which "
        "are not part of the saved model; 0: none",
        group="optimisation",
        at_least=0,
        at_most=100,
    )
    ema_decay: float = setting(
        0.0,
        "moving average of the weights, validated and saved as the model: the share kept at each step, such as 0.99, "
        "less at first; 0: none",
        group="optimisation",
        at_least=0,
        at_most=0.99999,
    )
    gradient_clip_val: float = setting(
        0.0, "largest gradient norm; 0: no clipping", group="optimisation", at_least=0, at_most=10**9
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "when a loss or gradient is not finite: stop before the step, or skip the step (fp16 overflows are always "
        "skipped)",
        group="optimisation",
        may_change_on_resume=True,
    )
    memory_limit_mb: int | None = setting(
        None,
        "on the CPU: resident memory of a process that the trial of the largest micro-batch before step 1 may reach; "
        "none: no limit",
        group="optimisation",
        at_least=1,
        at_most=10**9,
        may_change_on_resume=True,
    )
    # ---- validation ----
    val_check_interval: int | float = setting(
        1.0,
        "1.0, 0.5: validate every such share of an epoch; 1, 200: every so many optimizer steps",
        group="validation",
        at_least=0,
        at_most=MANY,
    )
    early_stop_metric: str = setting(  # None is resolved in __post_init__
        None,
        "decides which step is the best and when to stop: val_loss or val/<metric>; of equal values the one with the "
        "lower val_loss counts",
        group="validation",
        default_in_words=f"{ORIGINAL_DEFAULTS['early_stop_metric']}; two classes, where metric_choices is not set "
        f"either: {RANKING_DEFAULTS['early_stop_metric']}",
    )
    early_stop_patience: int = setting(
        10, "stop after so many validations without a better step", group="validation", at_least=1, at_most=MANY
    )
    threshold_rule: str = setting(
        "best_f1",
        "which probability counts as class 1 (two classes), chosen on the validation rows: best_f1, half, "
        "recall_at_precision=X, precision_at_recall=X, alerts_per_1000=X",
        group="validation",
        may_change_on_resume=True,
    )
    slice_columns: tuple[str, ...] = setting(
        (),
        "columns for whose values or quarters the report gives metrics; none: every numeric and categorical column",
        group="validation",
        may_change_on_resume=True,
    )
    # ---- run ----
    model_path: str = setting(
        ...,
        "folder of everything this run writes",
        group="run",
        may_change_on_resume=True,
        may_differ_between_nodes=True,
    )
    resume: Literal["auto", "never"] | int = setting(
        "auto",
        "auto: continue from the newest checkpoint, if any; never: start a new run, refused where there are "
        "checkpoints; or the step of one. A restart by torchrun always continues",
        group="run",
        at_least=0,
        at_most=10**12,
        may_change_on_resume=True,
    )
    save_every: int = setting(
        500, "optimizer steps between checkpoints", group="run", at_least=1, at_most=MANY, may_change_on_resume=True
    )
    keep_checkpoints: int = setting(
        2,
        "newest checkpoints to keep, besides the best",
        group="run",
        at_least=1,
        at_most=MANY,
        may_change_on_resume=True,
    )
    log_every: int = setting(
        10,
        "optimizer steps between lines of metrics.jsonl",
        group="run",
        at_least=1,
        at_most=MANY,
        may_change_on_resume=True,
    )
    seed: int = setting(
        0, "decides order, dropout, initial weights, sampling and split", group="run", at_least=0, at_most=2**63 - 1
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 where the GPU has it, else fp16; fp32 on the CPU; bf16 by name there, too", group="run"
    )
    deterministic: bool = setting(False, "bit-equal reruns on CUDA too, slower", group="run")
    timeout_seconds: int = setting(
        600,
        "seconds that a process waits for the others before it gives up",
        group="run",
        at_least=1,
        at_most=10**6,
        may_change_on_resume=True,
    )
    num_threads: int | Literal["auto"] = setting(
        "auto",
        "CPU threads of a process, at most 32 a core; auto: cores divided by the processes of the node",
        group="run",
        at_least=1,
        at_most=1_024,
        may_change_on_resume=True,
        may_differ_between_nodes=True,
    )

    def __post_init__(self) -> None:
        self._resolve_metrics()
        check_values(vars(self), SETTINGS)
        if self.schedule is not None:  # so that the stored config does not contradict itself
            object.__setattr__(self, "run_scheduler", self.schedule != "constant")

    def _resolve_metrics(self) -> None:
        """Replace metrics that are None by the defaults, so that the stored config names the metrics that were used."""
        has_no_metric = self.metric_choices is None and self.early_stop_metric is None
        for name, default in default_metrics(has_no_metric=has_no_metric, is_binary=self.is_binary).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    @property
    def task(self) -> str:
        """'binary' or 'multiclass', as torchmetrics and the original call it."""
        return "binary" if self.is_binary else "multiclass"

    @property
    def has_columns(self) -> bool:
        """Whether the model reads any column that is no text."""
        return any(getattr(self, key) for key in COLUMN_KEYS)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `Config(**config_reader.coerce_all(d))` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


SETTINGS: dict[str, Setting] = {item.name: setting_of(item) for item in fields(Config)}  # by key, in the order above
# Keys that may differ between a checkpoint and the run that resumes from it. None changes what a training step
# computes, except for microbatches_per_step (dropout).
FREE_ON_RESUME = frozenset(name for name, item in SETTINGS.items() if item.may_change_on_resume)
FREE_BETWEEN_NODES = frozenset(name for name, item in SETTINGS.items() if item.may_differ_between_nodes)
