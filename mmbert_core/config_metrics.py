"""The metrics of a config that names none: which are computed at a validation, and which one chooses the best step."""

from typing import Any

# Defaults for two classes when neither key is set: with few rows or positives, F1 is the same at many steps, often 0,
# and a ranking metric is not. In all other cases the defaults are the original's.
RANKING_DEFAULTS: dict[str, Any] = {
    "metric_choices": ("auroc", "average_precision", "f1_score", "accuracy"),
    "early_stop_metric": "val/auroc",
}
ORIGINAL_DEFAULTS: dict[str, Any] = {"metric_choices": ("accuracy", "f1_score"), "early_stop_metric": "val/f1_score"}


def default_metrics(*, has_no_metric: bool, is_binary: bool) -> dict[str, Any]:
    """The default of each key. `has_no_metric`: neither is set."""
    return RANKING_DEFAULTS if is_binary and has_no_metric else ORIGINAL_DEFAULTS
