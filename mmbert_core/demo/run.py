"""The built-in sample, whole: data, a small encoder from scratch, text only, columns only, both.

The encoder has never seen other text: the figures show that the parts work
together, not what a pretrained BERT reaches.
"""

import logging
import time
from pathlib import Path
from typing import Any

import pandas as pd

from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.demo.sample import (
    CATEGORY_COLUMNS,
    ID_COLUMN,
    LABEL_COLUMN,
    NUMBER_COLUMNS,
    TEXT_COLUMN,
    write_sample,
    write_small_encoder,
)
from mmbert_core.runtime import distributed, ranks, workers
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import make_folder_by_time
from mmbert_core.training.loop import fit
from mmbert_core.training.start import prepare_model

logger = logging.getLogger(__name__)

RUNS = Path("runs")
PARTS = ("text only", "columns only", "both")
SHOWN = ("auroc", "average_precision", "f1_score", "accuracy")


def run_demo(context: DistContext) -> int:
    """Collective. Train the three models on the sample into `runs/demo-<time>/` and print their test figures."""
    ranks.set_threads("auto", context)
    started = time.monotonic()
    with workers.process_group(context):
        folder = distributed.on_main(make_folder)
        rows = {part: run_part(part, folder, context) for part in PARTS}
    if context.is_main:
        print_table(rows, folder, time.monotonic() - started)
    return 0


def make_folder() -> Path:
    """Rank 0 only. The sample's files and its encoder in a new folder."""
    folder = make_folder_by_time(RUNS, "demo")
    paths = write_sample(folder / "data")
    texts = pd.read_csv(paths["train"], dtype=str, keep_default_na=False)[TEXT_COLUMN]
    write_small_encoder(folder / "encoder_from_scratch", texts)
    logger.info("sample of buyer-seller messages and an encoder that is not pretrained: %s", folder)
    return folder


def config_of(part: str, folder: Path) -> Config:
    """The same settings for the three models, but for the inputs they see."""
    has_text, has_columns = part != "columns only", part != "text only"
    return Config(
        train_path=(str(folder / "data/train.csv"),),
        val_path=(str(folder / "data/val.csv"),),
        test_path=(str(folder / "data/test.csv"),),
        text_name=(TEXT_COLUMN,) if has_text else (),
        tab_field_list=NUMBER_COLUMNS if has_columns else (),
        cat_field_list=CATEGORY_COLUMNS if has_columns else (),
        label_name=LABEL_COLUMN,
        id_name=ID_COLUMN,
        encoder=str(folder / "encoder_from_scratch"),
        model_path=str(folder / part.replace(" ", "_")),
        cache_path=str(folder / "cache"),
        metric_choices=("auroc", "f1_score"),
        early_stop_metric="val/auroc",
        pooling="mean",  # the pooler of an encoder without pretraining is random too, and slower to learn
        batch_size=32,
        max_epochs=2,
        lr=2e-3,
        head_lr=5e-3,
        warmup_steps=0.1,
        gradient_clip_val=1.0,
        max_length=96,
    )


def run_part(part: str, folder: Path, context: DistContext) -> dict[str, Any]:
    """Collective. Train and test one of the three models; returns its train_results.json."""
    logger.info("---- %s ----", part)
    config = config_of(part, folder)
    data = prepare(config)
    model = prepare_model(config, data)
    return fit(config, data, model, context)


def print_table(rows: dict[str, dict[str, Any]], folder: Path, seconds: float) -> None:
    """The three models beside each other."""
    print(f"\n{'model':<14}" + "".join(f"{name:>19}" for name in SHOWN))
    for part, results in rows.items():
        print(f"{part:<14}" + "".join(f"{results['test_metrics'][f'test/{name}']:>19.3f}" for name in SHOWN))
    num_rows = rows["both"]["test_metrics"]["test/num_rows"]
    print(
        f"\nTest figures over {num_rows} rows. The encoder was trained from scratch on the sample: it is not pretrained."
    )
    print(f"{seconds:.0f} s in all. Model folders, predictions and metrics: {folder}")
