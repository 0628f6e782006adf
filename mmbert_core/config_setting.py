"""Everything declared about one key of the config: default, meaning, range, and when it may change."""

from dataclasses import MISSING, Field, dataclass, field
from typing import Any

from mmbert_core.runtime.errors import InputError, format_for_message


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything about a key except its name and type, which the fields of `Config` have."""

    default: Any  # MISSING: the key is required
    meaning: str
    group: str  # title in --help and in the documentation
    at_least: float | None  # bounds of its numbers, both included; None: it holds no numbers
    at_most: float | None
    may_change_on_resume: bool  # between a checkpoint and the run that resumes from it
    may_differ_between_nodes: bool
    default_in_words: str  # for --help and the documentation

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def range_in_words(self) -> str:
        """For example "1 to 1,000"; "" for a key without numbers."""
        return "" if self.at_most is None else f"{self.at_least} to {self.at_most:,}"

    def check_range(self, name: str, value: float) -> None:
        """Raise `InputError` for a number outside of the range, and for NaN."""
        if self.at_least is None or self.at_most is None:
            return
        if not value >= self.at_least:
            raise InputError(
                f"{name}: expected a number of at least {self.at_least}, found {format_for_message(value)}"
            )
        if value > self.at_most:
            raise InputError(
                f"{name}: expected a number of at most {self.at_most:,}, found {format_for_message(value)}"
            )


def setting(
    default: Any,
    meaning: str,
    *,
    group: str,
    at_least: float | None = None,
    at_most: float | None = None,
    may_change_on_resume: bool = False,
    may_differ_between_nodes: bool = False,
    default_in_words: str | None = None,
) -> Any:
    """A dataclass field for one key; the default `...` means that the key is required.

    `at_least` and `at_most` bound numbers only, not words such as auto.
    `default_in_words`: for a default that depends on other keys.
    """
    declared = Setting(
        default=MISSING if default is ... else default,
        meaning=meaning,
        group=group,
        at_least=at_least,
        at_most=at_most,
        may_change_on_resume=may_change_on_resume,
        may_differ_between_nodes=may_differ_between_nodes,
        default_in_words=default_in_words or in_words(default),
    )
    return field(default=declared.default, metadata={"setting": declared})


def setting_of(item: Field) -> Setting:
    """The `Setting` of a field that `setting` has created."""
    return item.metadata["setting"]


def in_words(default: Any) -> str:
    """A default as --help and the documentation write it."""
    if default is ...:
        return "required"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return str(default).lower() if isinstance(default, bool) else "none" if default is None else str(default)
