"""Example reports (format 1) for tests: binary, several classes, nothing but reasons, big, hostile."""

import math
import random
from collections.abc import Callable
from typing import Any

METRICS = ["auroc", "average_precision", "f1_score", "accuracy", "log_loss", "ece", "mcc", "precision", "recall"]
TYPICAL = dict(zip(METRICS, (0.9575, 0.9904, 0.9503, 0.9178, 0.2042, 0.02, 0.7142, 0.9466, 0.954)))
SECTIONS = """
    metrics warnings baselines blend threshold calibration roc precision_recall confusion scores training slices
    importance errors config data versions
""".split()
HOSTILE = (
    """<script>document.title='hit'</script>"'&</style></title></svg>--><img src=x onerror=alert(1)>"""
    "\x00\x1b\ud800\u202e http://example.org/x.js"
    "{{ 7 * 7 }}{% include 'page.html' %}{# note #}"
)
COMMENT = (
    "I love, love, love this dress. the dress runs small but the fabric feels great and never wrinkles "
    "sadly the zipper broke again after one week so back it went"
)


def metric_values(*, shift: float = 0.0, interval: bool = True) -> dict[str, dict[str, Any]]:
    """Every metric of METRICS, worse by `shift`."""
    values = {name: TYPICAL[name] + shift * (1 if name in ("log_loss", "ece") else -1) for name in METRICS}
    return {
        name: {"value": value, "interval": [value - 0.011, value + 0.009] if interval else None, "reason": None}
        for name, value in values.items()
    }


def curve(power: float, points: int = 60) -> dict[str, Any]:
    """A ROC curve x, y = x ** power."""
    x = [(index / (points - 1)) ** 2 for index in range(points)]
    return {"x": x, "y": [value**power for value in x], "area": 1 / (1 + power)}


def recall_curve(power: float, share: float, points: int = 60) -> dict[str, Any]:
    recall = [index / (points - 1) for index in range(points)]
    return {
        "x": recall,
        "y": [1 - (1 - share) * value**power for value in recall],
        "area": 1 - (1 - share) / (power + 1),
        "share": share,
    }


def bins(bend: float, count: int = 15) -> list[dict[str, Any]]:
    """Calibration bins, one of them without rows."""
    found: list[dict[str, Any]] = []
    for index in range(count):
        mean = (index + 0.5) / count
        rows = 0 if index == 4 else 20 + 9 * abs(index - count // 2) ** 2
        found.append(
            {
                "low": index / count,
                "high": (index + 1) / count,
                "rows": rows,
                "mean": mean if rows else None,
                "share": mean**bend if rows else None,
            }
        )
    return found


def slice_rows(names: list[str], columns: list[str], values: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    rows = []
    for column in columns:
        for value in range(values):
            auroc, share = 0.85 + 0.13 * draw.random(), draw.random()
            shares = [1 - share, *[share / (len(names) - 1)] * (len(names) - 1)]
            rows.append(
                {
                    "column": column,
                    "value": f"{column.split()[0]} {value}",
                    "rows": draw.randint(30, 900),
                    "share_of_classes": shares,
                    "metrics": {"auroc": auroc, "f1_score": auroc - 0.04},
                    "intervals": {"auroc": [auroc - 0.05, min(1.0, auroc + 0.03)], "f1_score": None},
                    "undefined": {},
                }
            )
    rows.sort(key=lambda row: row["metrics"]["auroc"])
    rows.append(
        {
            "column": columns[0],
            "value": "(missing)",
            "rows": 31,
            "share_of_classes": [0.0] * (len(names) - 1) + [1.0],
            "metrics": {"auroc": None, "f1_score": 0.9},
            "intervals": {"auroc": None, "f1_score": None},
            "undefined": {"auroc": "only one class in the labels"},
        }
    )
    return rows


def training(steps: int = 300) -> dict[str, Any]:
    draw = random.Random(1)
    all_steps = list(range(1, steps + 1))
    loss = [0.65 * math.exp(-step / 90) + 0.16 + 0.07 * draw.random() for step in all_steps]
    far = {step: abs(step - 240) / steps for step in range(60, steps + 1, 60)}
    validations = [
        {"step": step, "val_loss": 0.21 + away / 3, "val/auroc": 0.955 - away / 10, "val/f1_score": 0.95}
        for step, away in far.items()
    ]
    rates = [2e-4 * min(step / 30, (steps - step + 1) / (steps - 29)) for step in all_steps]
    return {
        "steps": all_steps,
        "train_loss": loss,
        "lr": rates,
        "validations": validations,
        "best_step": 240,
        "metric": "val/auroc",
    }


def error_row(index: int, label: str, pred: str, *, repeats: int = 1) -> dict[str, Any]:
    words = (COMMENT.split(" ") * repeats)[: 30 * repeats]
    tokens = [
        [word if position == 0 else f" {word}", round(math.sin(1.7 * position + index) ** 3, 3)]
        for position, word in enumerate(words)
    ]
    return {
        "place": f"test.csv, row {18 + index}",
        "id": str(15900 + index),
        "label": label,
        "pred": pred,
        "prob": 0.998 - index / 100,
        "columns": {"Age": "39", "Division Name": "General Petite", "Department Name": "Dresses"},
        "tokens": tokens,
        "method": "gradient x input",
    }


def quality_sections(names: list[str], counts: list[list[int]]) -> dict[str, Any]:
    """Metrics, baselines and curves. `counts`: the confusion matrix."""
    total = sum(map(sum, counts))
    shares = [sum(row) / total for row in counts]
    drawn = names[:10] if len(names) > 2 else names[-1:]
    return {
        "metrics": {"names": METRICS, "model": metric_values()},
        "baselines": {
            "rows": [
                {
                    "name": "most frequent class",
                    "how": "shares of the classes in the training rows",
                    "metrics": metric_values(shift=0.3, interval=False),
                },
                {"name": "columns only", "how": "logistic regression", "metrics": metric_values(shift=0.19)},
                {"name": "text only", "how": "bag of words", "metrics": metric_values(shift=0.0151)},
            ],
            "verdict": "The model is above all baselines in auroc: 0.958 against 0.942 (text only).",
        },
        "blend": {
            "rows": [
                {"name": "the blend", "val_log_loss": 0.2021, "metrics": metric_values(interval=False)},
                {
                    "name": "network",
                    "how": "the trained network",
                    "weight": 0.71,
                    "val_log_loss": 0.22,
                    "metrics": metric_values(shift=0.01, interval=False),
                },
                {"name": "columns", "how": "logistic regression", "weight": 0.0, "val_log_loss": 0.46, "metrics": {}},
            ],
            "metrics": METRICS[:2],
            "val_rows": 2349,
        },
        "threshold": {"reason": "several classes: the class with the highest probability is chosen"},
        "calibration": {
            "temperature": 1.3812,
            "rows": 2349,
            "ece_before": 0.0412,
            "ece_after": 0.0118,
            "reason": None,
            "bins": bins(1.3),
            "calibrated_bins": bins(1.05),
        },
        "roc": {"curves": {name: curve(0.03 + 0.03 * index) for index, name in enumerate(drawn)}},
        "precision_recall": {
            "curves": {
                name: recall_curve(6 - 0.5 * index, shares[names.index(name)]) for index, name in enumerate(drawn)
            }
        },
        "confusion": {"counts": counts},
        "scores": {
            "edges": [index / 20 for index in range(21)],
            "counts": {
                "right": [int(1.35**index) for index in range(20)],
                "wrong": [3 + index % 5 for index in range(20)],
            },
        },
    }


def model_sections(names: list[str]) -> dict[str, Any]:
    """Training, slices, importance and errors."""
    columns = ["Age", "Division Name", "Department Name", "Class Name"]
    return {
        "training": training(),
        "slices": {"metric": "auroc", "rows": slice_rows(names, columns, 5)},
        "importance": {
            "metric": "auroc",
            "rows": 1000,
            "repeats": 5,
            "items": [
                {"name": "Review Text", "kind": "text", "drop": 0.3112, "spread": 0.0121},
                {"name": "Age", "kind": "numeric", "drop": 0.0063, "spread": 0.0021},
                {"name": "Department Name", "kind": "categorical", "drop": -0.0004, "spread": 0.0008},
            ],
        },
        "errors": {"rows": [error_row(index, names[0], names[-1]) for index in range(4)]},
    }


def run_sections(names: list[str], counts: list[list[int]]) -> dict[str, Any]:
    """Config, data and versions."""
    split = {"rows": sum(map(sum, counts)), "classes": dict(zip(names, map(sum, counts))), "mean_tokens": 81.24}
    return {
        "config": {
            "train_path": ["data/womens_reviews/train.csv"],
            "text_name": ["Title", "Review Text"],
            "lr": 2e-4,
            "head_lr": None,
            "is_binary": len(names) == 2,
        },
        "resolved": {"microbatches_per_step": 4, "pooling": "pooler (BertModel has a stored pooler)"},
        "data": {
            "train": split,
            "val": split,
            "test": split,
            "files": {
                "data/womens_reviews/train.csv": {"bytes": 7_345_678, "sha256": "9f86d081884c7d659a2feaa0c55ad015" * 2}
            },
        },
        "versions": {"mmbert_core": "1.0.0", "torch": "2.13.0", "transformers": "5.3.0", "python": "3.11.7"},
    }


def report(names: list[str], counts: list[list[int]]) -> dict[str, Any]:
    """What reports of two and of several classes have in common. `counts`: the confusion matrix."""
    total = sum(map(sum, counts))
    head = {
        "format_version": 1,
        "title": f"womens_reviews: {total:,} rows of test.csv",
        "created": "2026-11-23 07:10",
        "model_path": "runs/womens_reviews",
        "input": ["data/womens_reviews/test.csv"],
        "num_rows": total,
        "has_labels": True,
        "task": "multiclass",
        "class_names": names,
        "label_name": "Recommended IND",
        "warnings": [
            "column 'Clothing ID' alone reaches auroc 0.97 on the training rows: does it leak the label?",
            "31 of 2,349 texts were truncated to 162 tokens",
        ],
    }
    return head | quality_sections(names, counts) | model_sections(names) | run_sections(names, counts)


def binary_report() -> dict[str, Any]:
    example = report(["0", "1"], [[315, 101], [92, 1841]])
    table = [
        {
            "threshold": at / 20,
            "precision": 0.8 + at / 110,
            "recall": 1 - (at / 20) ** 4,
            "f1": 0.9 - (at / 20 - 0.5) ** 2,
            "alerts_per_1000": 1000 - 30 * at,
            "false_alerts_per_1000": 170 - 8 * at,
        }
        for at in range(19, 0, -1)
    ]
    example |= {
        "task": "binary",
        "threshold": {
            "value": 0.62,
            "rule": "best_f1",
            "chosen_on": "2,349 validation rows",
            "precision": 0.9466,
            "recall": 0.954,
            "f1": 0.9503,
            "alerts_per_1000": 826.7,
            "reason": None,
            "table": table,
        },
        "scores": {
            "edges": [index / 20 for index in range(21)],
            "counts": {"0": [90 - 4 * index for index in range(20)], "1": [int(1.45**index) for index in range(20)]},
        },
    }
    return example


def multiclass_report(num_classes: int = 5) -> dict[str, Any]:
    draw = random.Random(2)
    names = ["very poor", "poor", "fair", "good", "excellent"] + [
        f"class number {index}" for index in range(5, num_classes)
    ]
    counts = [
        [draw.randint(200, 700) if row == column else max(0, draw.randint(-40, 50)) for column in range(num_classes)]
        for row in range(num_classes)
    ]
    return report(names[:num_classes], counts)


def empty_report() -> dict[str, Any]:
    """Every section has only a reason: rows without labels, a model without a log."""
    example = binary_report() | {name: {"reason": f"no {name} without labels"} for name in SECTIONS}
    return example | {"has_labels": False, "label_name": None, "input": [], "class_names": []}


def big_report() -> dict[str, Any]:
    """30 classes, 100 columns with 20 values each, long texts, many steps."""
    example = multiclass_report(30)
    names, columns = example["class_names"], [f"column_with_a_long_name_{index}" for index in range(100)]
    example["roc"]["curves"] = {name: curve(0.1, 300) for name in names[:10]}
    example["slices"]["rows"] = slice_rows(names, columns, 20)
    example["importance"]["items"] = [
        {"name": name, "kind": "numeric", "drop": 0.1 / (1 + index), "spread": 0.001}
        for index, name in enumerate(columns)
    ]
    example["errors"]["rows"] = [
        error_row(index, names[0], names[1], repeats=60) | {"columns": dict.fromkeys(columns, "a cell")}
        for index in range(100)
    ]
    example["training"] = training(20_000)
    example["config"] = {f"key_{index}": "value " * 20 for index in range(100)}
    return example


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with every string changed, except the keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [changed(item, change) for item in value]
    return {key: changed(item, change) for key, item in value.items()} if isinstance(value, dict) else value


def hostile_report(hostile: str = HOSTILE) -> dict[str, Any]:
    """A binary report with a text added to every string, and to every key that the data or the config name."""
    plain = binary_report()
    plain["metrics"]["model"]["ece"] = {"value": None, "interval": None, "reason": "too few rows"}
    for name in ("threshold", "calibration"):
        plain[name]["reason"] = "too few rows"
    example = changed(plain, lambda value: value + hostile) | {"task": "binary"}
    metrics = example["metrics"]
    metrics["model"] = {name + hostile: value for name, value in metrics["model"].items()}
    for row in example["baselines"]["rows"]:
        row["metrics"] = {name + hostile: value for name, value in row["metrics"].items()}
    for name in ("roc", "precision_recall"):
        example[name]["curves"] = {key + hostile: value for key, value in example[name]["curves"].items()}
    example["scores"]["counts"] = {key + hostile: value for key, value in example["scores"]["counts"].items()}
    for row in example["slices"]["rows"]:
        for name in ("metrics", "intervals", "undefined"):
            row[name] = {key + hostile: value for key, value in row[name].items()}
    for row in example["training"]["validations"]:
        row[f"val/{hostile}"] = 0.5
    for row in example["errors"]["rows"]:
        row["columns"] = {key + hostile: value for key, value in row["columns"].items()}
    for name in ("config", "resolved", "versions"):
        example[name] = {key + hostile: value for key, value in example[name].items()}
    example["data"]["files"] = {key + hostile: value for key, value in example["data"]["files"].items()}
    for name in ("train", "val", "test"):
        example["data"][name] = example["data"][name] | {
            "classes": {key + hostile: value for key, value in example["data"][name]["classes"].items()}
        }
    return example


EXAMPLES = {
    "binary": binary_report,
    "multiclass": multiclass_report,
    "reasons": empty_report,
    "big": big_report,
    "hostile": hostile_report,
}
