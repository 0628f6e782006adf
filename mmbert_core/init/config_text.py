"""The text of a first config: YAML whose comments say why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mmbert_core.config import SETTINGS
from mmbert_core.config_file import MAX_BYTES, yaml_scalar
from mmbert_core.config_metrics import RANKING_DEFAULTS
from mmbert_core.config_recipe import METRICS_OF_SEVERAL, RECOMMENDED_VALUES
from mmbert_core.data.class_messages import format_share
from mmbert_core.data.column_roles import CONFIG_KEYS, GROUP, ID, INPUTS, LEFT_OUT, TEXT, ProposedRoles
from mmbert_core.data.label_column import Task, imbalance_words
from mmbert_core.init.encoder_lengths import TextLengths
from mmbert_core.runtime.errors import format_for_message

BALANCED_SHARE = 0.3  # of the rarer of two classes, from which accuracy says something
LARGE_SHARE, SMALL_SHARE = 0.5, 0.1  # of the most and the least frequent of several classes, beyond which it does not
RARE_METRICS = ("average_precision", "auroc", "f1_score", "recall", "precision", "mcc")
UNEVEN_METRICS = ("f1_macro", "auroc", "mcc", "log_loss")
MAX_LEFT_OUT_LINES = 20
COMMENT_COLUMN = 32  # where the comments of short lines begin
ENCODER_NEEDS = "a folder with config.json, model.safetensors and a tokenizer, or a name on the hub"


@dataclass(frozen=True, kw_only=True)
class FirstConfig:
    """What a first config says."""

    train_path: str
    num_rows: int
    num_unlabelled: int
    label: str
    task: Task
    roles: ProposedRoles
    model_path: str
    output: str
    encoder: str | None = None  # None: not named
    encoder_folders: Sequence[str] = field(default_factory=list)  # that could be one
    lengths: TextLengths | None = None  # None: not measured
    tsv_quoting: str | None = None

    def to_yaml(self) -> str:
        """The file; without the reasons of single columns where it would be too large for a config file."""
        for has_reasons in (True, False):
            text = "\n".join(self._lines(has_reasons)) + "\n"
            if len(text.encode("utf-8")) <= MAX_BYTES:
                break
        return text

    def _lines(self, has_reasons: bool) -> Iterator[str]:
        yield comment(f"Proposed by `mmbert init` from the {self.num_rows:,} rows of {self.train_path}.")
        yield comment("Every line is a proposal: the comments say why, and what you change here is what counts.")
        yield "#"
        yield comment(f"  python train.py {self.output} --check    # reads config, data and encoder, and stops")
        yield comment(f"  ./torchrun.sh {self.output}              # trains")
        yield from ("", "# ---- data ----", f"train_path: {yaml_scalar(self.train_path)}")
        yield line("# val_path: FILE", "validation rows; without a file val_fraction, 0.1 of the training rows")
        yield line("# test_path: FILE", "test rows, scored after the training")
        if self.tsv_quoting is not None:
            yield f"tsv_quoting: {self.tsv_quoting}"
        yield from self._label_lines()
        for role in INPUTS:
            yield from self._role_lines(role, has_reasons)
        yield from self._id_lines()
        yield from self._left_out_lines(has_reasons)
        yield from ("", "# ---- model ----")
        yield from self._encoder_lines()
        yield line(f"model_path: {yaml_scalar(self.model_path)}", "folder of everything that the run writes")
        yield from ("", "# ---- all else ----")
        yield comment("The recommended recipe, which the run prints; `python train.py --help` lists every key.")

    def _label_lines(self) -> Iterator[str]:
        task = self.task
        yield ""
        yield line(f"label_name: {yaml_scalar(self.label)}", imbalance_words(task))
        if self.num_unlabelled:
            yield comment(f"rows without a label: {self.num_unlabelled:,}; remove them: a training refuses them")
        if task.is_binary:
            other = next(name for name in task.counts if name != task.rarest)
            rarer = f"class 1 (prob, F1, threshold): the rarer of the two, {format_share(task.share(task.rarest))}"
            choice = f"positive_label: {yaml_scalar(task.rarest)}"
            yield line(choice, f"{rarer}; if {format_for_message(other)} is the class of interest, write it here")
        else:
            yield "is_binary: false"
            yield f"num_classes: {len(task.counts)}"
        names, reason = metrics_for(task)
        if reason is None:
            yield comment(
                f"metric_choices: the recipe's, {' '.join(names)}: the classes are balanced enough for accuracy"
            )
        else:
            yield line(f"metric_choices: [{', '.join(names)}]", reason)

    def _role_lines(self, role: str, has_reasons: bool) -> Iterator[str]:
        columns, key = self.roles.columns(role), CONFIG_KEYS[role]
        if columns:
            yield from ("", f"{key}:")
            yield from (line(f"  - {yaml_scalar(name)}", reason * has_reasons) for name, reason in columns.items())
        elif role == TEXT:
            yield from ("", line(f"{key}: []", "no column looks like a text: a model of columns only, without encoder"))
        if role == "date" and self.roles.date_order != "unambiguous":
            yield line(f"date_order: {self.roles.date_order}", "as dates show in which only one order is possible")

    def _id_lines(self) -> Iterator[str]:
        for role, use in (
            (ID, "copied to the predictions"),
            (GROUP, "rows of one value stay together, in training or in validation"),
        ):
            for name, reason in self.roles.columns(role).items():
                yield from ("", line(f"{CONFIG_KEYS[role]}: {yaml_scalar(name)}", f"{reason}; {use}"))

    def _left_out_lines(self, has_reasons: bool) -> Iterator[str]:
        columns = self.roles.columns(LEFT_OUT)
        if columns:
            yield from ("", "# Left out. To use one, add it to a list above:")
        for name, reason in columns.items():
            yield comment(f"  {yaml_scalar(name)}: {reason}" if has_reasons else f"  {yaml_scalar(name)}")

    def _encoder_lines(self) -> Iterator[str]:
        if not self.roles.columns(TEXT):
            return
        if self.encoder is None:
            default = SETTINGS["encoder"].default
            yield line("# encoder: FOLDER", f"{ENCODER_NEEDS}; without this line {default}")
            for folder in self.encoder_folders:
                yield line(f"# encoder: {yaml_scalar(folder)}", "found here")
        else:
            yield f"encoder: {yaml_scalar(self.encoder)}"
        if self.lengths is not None:
            yield from length_lines(self.lengths)


def length_lines(lengths: TextLengths) -> Iterator[str]:
    """`max_length`, where the recipe's does not suit, and what the token counts say."""
    recipe = RECOMMENDED_VALUES["max_length"]
    texts = f"median {lengths.median} tokens, 95 % have at most {lengths.high}"
    counted = f"of {lengths.num_texts:,} sampled texts: {texts}"
    if lengths.max_length < recipe:
        yield line(f"max_length: {lengths.max_length}", f"the encoder reads no more; {counted}")
    elif lengths.max_length > recipe:
        yield line(f"max_length: {lengths.max_length}", f"the encoder reads as many; {counted}")
    else:
        yield comment(f"max_length: the recipe's {recipe} tokens; {counted}")
    if lengths.longer > 0:
        chunks = min(8, -(-lengths.high // lengths.max_length))
        longer = f"{format_share(lengths.longer)} of the texts are longer and will be truncated"
        advice = f"; `max_chunks: {chunks}` reads them in pieces, at the price of time" if chunks > 1 else ""
        yield comment(f"{longer}{advice}")


def metrics_for(task: Task) -> tuple[tuple[str, ...], str | None]:
    """Metrics that suit the shares of the classes, and why they are not the recipe's; None: they are."""
    shares: Mapping[str, float] = {name: task.share(name) for name in task.counts}
    largest = max(shares, key=lambda name: shares[name])
    alone = f"always predicting {format_for_message(largest)} has an accuracy of {format_share(shares[largest])}"
    if task.is_binary:
        is_balanced = shares[task.rarest] >= BALANCED_SHARE
        return (RANKING_DEFAULTS["metric_choices"], None) if is_balanced else (RARE_METRICS, alone)
    is_balanced = shares[largest] <= LARGE_SHARE and min(shares.values()) >= min(SMALL_SHARE, 0.5 / len(shares))
    return (METRICS_OF_SEVERAL, None) if is_balanced else (UNEVEN_METRICS, alone)


def line(text: str, reason: str) -> str:
    """A line of YAML with a comment."""
    return f"{text:<{COMMENT_COLUMN - 1}} {comment(reason)}" if reason else text


def comment(text: str) -> str:
    """One line, whatever the text holds."""
    return f"# {printable(text)}"


def printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def summary_lines(config: FirstConfig) -> Iterator[str]:
    """What was proposed, in lines for the terminal."""
    task = config.task
    kind = "two classes" if task.is_binary else f"{len(task.counts)} classes"
    yield printable(f"{config.num_rows:,} rows; label {config.label}: {kind}, {imbalance_words(task)}")
    for role in (*INPUTS, ID, GROUP):
        if columns := config.roles.columns(role):
            yield printable(f"{role}: {', '.join(columns)}")
    left_out = config.roles.columns(LEFT_OUT)
    for name, reason in list(left_out.items())[:MAX_LEFT_OUT_LINES]:
        yield printable(f"{LEFT_OUT}: {name}: {reason}")
    if len(left_out) > MAX_LEFT_OUT_LINES:
        yield f"{LEFT_OUT}: {len(left_out) - MAX_LEFT_OUT_LINES} more columns, see {config.output}"
