"""The demo: writes the sample and a small encoder, then trains a model of text only, of columns only and of both.

The encoder is trained from scratch on the sample: the metrics show that the program works, not what a pretrained BERT
reaches.
"""

import logging
import time
from pathlib import Path

import pandas as pd

from mmbert_core.config import Config
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
from mmbert_core.training.results import Results
from mmbert_core.training.train import run_training

logger = logging.getLogger(__name__)

RUNS = Path("runs")
VARIANTS = ("text only", "columns only", "both")
METRICS = ("auroc", "average_precision", "f1_score", "accuracy")


def run_demo(context: DistContext) -> int:
    """Collective. Train the three models on the sample into `runs/demo-<time>/` and print their test metrics."""
    ranks.set_threads("auto", context)
    started = time.monotonic()
    with workers.process_group(context):
        folder = distributed.on_main(make_folder)
        results = {variant: train_variant(variant, folder, context) for variant in VARIANTS}
    if context.is_main:
        print_table(results, folder, time.monotonic() - started)
    return 0


def make_folder() -> Path:
    """Rank 0 only. Write the sample's files and its encoder into a new folder."""
    folder = make_folder_by_time(RUNS, "demo")
    paths = write_sample(folder / "data")
    texts = pd.read_csv(paths["train"], dtype=str, keep_default_na=False)[TEXT_COLUMN]
    write_small_encoder(folder / "encoder_from_scratch", texts)
    logger.info("sample of buyer-seller messages and an encoder that is not pretrained: %s", folder)
    return folder


def variant_config(variant: str, folder: Path) -> Config:
    """The config of a variant: all have the same settings, except for their inputs."""
    has_text, has_columns = variant != "columns only", variant != "text only"
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
        model_path=str(folder / variant.replace(" ", "_")),
        cache_path=str(folder / "cache"),
        metric_choices=("auroc", "f1_score"),
        early_stop_metric="val/auroc",
        pooling="mean",  # an untrained pooler learns slower
        batch_size=32,
        max_epochs=2,
        lr=2e-3,
        head_lr=5e-3,
        warmup_steps=0.1,
        gradient_clip_val=1.0,
        max_length=96,
    )


def train_variant(variant: str, folder: Path, context: DistContext) -> Results:
    """Collective. Train and test one model."""
    logger.info("---- %s ----", variant)
    return run_training(variant_config(variant, folder), context)


def print_table(results: dict[str, Results], folder: Path, seconds: float) -> None:
    """One line for each variant."""
    print(f"\n{'model':<14}" + "".join(f"{name:>19}" for name in METRICS))
    for variant, result in results.items():
        print(f"{variant:<14}" + "".join(f"{result.metrics[name]:>19.3f}" for name in METRICS))
    num_rows = results["both"].test_rows
    from_scratch = "The encoder was trained from scratch on the sample: it is not pretrained."
    print(f"\nTest figures over {num_rows} rows. {from_scratch}")
    print(f"{seconds:.0f} s in all. Model folders, predictions and metrics: {folder}")
