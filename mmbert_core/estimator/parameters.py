"""The parameters of an estimator in scikit-learn's protocol: arguments of its own, and any key of the config."""

from pathlib import Path
from typing import Any, ClassVar

from mmbert_core.config import SETTINGS
from mmbert_core.config_synonyms import nearest_name
from mmbert_core.runtime.errors import InputError, format_for_message

ROLE_KEYS = {  # argument -> key of the config
    "text": "text_name",
    "numbers": "tab_field_list",
    "categories": "cat_field_list",
    "dates": "date_field_list",
    "id": "id_name",
    "group": "group_name",
}
ADVICE = {key: f"name the columns by the argument {name!r}" for name, key in ROLE_KEYS.items()} | {
    "label_name": "the label is `y` or `label` of `fit`",
    "train_path": "the training rows are `X` of `fit`",
    "val_path": "the validation rows are `eval_set` of `fit`",
    "test_path": "test rows are given to `report`",
    "is_binary": "it follows from the labels",
    "num_classes": "it follows from the labels",
    "tsv_quoting": "no files are read",
}


class Parameters:
    """`get_params` and `set_params` over attributes, as scikit-learn's `clone` and searches use them.

    `NAMES` are the arguments of the constructor; any other parameter is a key of the config (`max_epochs`, `lr`, ...),
    which exists only where it was set. Values are stored unchanged and checked when the estimator is fitted.
    """

    NAMES: ClassVar[tuple[str, ...]] = ()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Every argument of the constructor, then the keys of the config that were set. `deep` changes nothing."""
        own = {name: getattr(self, name) for name in self.NAMES}
        return own | {key: vars(self)[key] for key in SETTINGS if key in vars(self) and key not in own}

    def set_params(self, **parameters: Any) -> "Parameters":
        """Set parameters, for the next `fit`. Raises `InputError` for one that does not exist."""
        check_names(parameters, self.NAMES)
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def config_values(self) -> dict[str, Any]:
        """Parameters that are keys of the config, with plain values (a search gives numpy's numbers)."""
        return {name: plain(value) for name, value in self.get_params().items() if name in SETTINGS}

    def __repr__(self) -> str:
        changed = {
            name: value for name, value in self.get_params().items() if value is not None or name not in self.NAMES
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def check_names(parameters: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raise `InputError` for a parameter that is none of `names` and no key of the config that may be set."""
    for name in parameters:
        if name in names:
            continue
        if name in ADVICE:
            raise InputError(f"{name}: {ADVICE[name]}")
        if name not in SETTINGS:
            known = [*names, *(key for key in SETTINGS if key not in ADVICE)]
            nearest = nearest_name(name, known)
            meant = f"did you mean {nearest!r}?" if nearest else f"expected one of {', '.join(known)}"
            raise InputError(f"unknown parameter {format_for_message(name)}; {meant}")


def plain(value: Any) -> Any:
    """A value of numpy, pandas or pathlib, also inside a list, as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
