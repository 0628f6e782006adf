"""Models to export, with random weights, and tables for them."""

import csv
from pathlib import Path

import torch

from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.evaluation.calibration import Calibration
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.thresholds import Threshold
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder, save_model_folder
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training.start import prepare_model
from tests.support import tiny

CASES = {  # what a model may have and lack
    "both": {},
    "columns only": {"text_name": ()},
    "numbers only": {"text_name": (), "cat_field_list": ()},
    "categories only": {"text_name": (), "tab_field_list": (), "id_name": None},
    "three classes": {"num_classes": 3},
    "two texts in chunks": {
        "text_name": ("text", "kind"),
        "cat_field_list": (),
        "max_chunks": 3,
        "max_length": 9,
        "pooling": "mean",
    },
}
COLUMNS = ["row_id", "text", "age", "amount", "kind"]


def build(folder: Path, **changes) -> LoadedModel:
    """An untrained model whose probabilities are far from equal, as a folder and loaded from it."""
    config = Config(**tiny.settings(folder, **changes))
    data = prepare(config)
    model = prepare_model(config, data)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.eval().modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.weight.normal_(0, 0.3)  # as drawn they are so small that texts hardly differ
        batch, last = data.train.batch(range(64)), model.final_merge_network.linear_layer_final
        logits = model(batch.input_ids, batch.attention_mask, batch.numbers, batch.categories)
        last.weight /= logits.std(dim=0)[:, None]
        last.bias.copy_((last.bias - logits.mean(dim=0)) / logits.std(dim=0))
    run = Path(config.model_path)
    run.mkdir()
    resolved = {"pooling": model.pooling, "precision": "fp32"}
    decision = Decision(Threshold(0.45, "given"), Calibration(1.7, 300))
    save_model_folder(
        run,
        model.state_dict(),
        LoadedModel(model, config, data.features, data.labels, data.tokenizer, resolved, decision),
    )
    return load_model_folder(run)


def cpu_predictor(loaded: LoadedModel) -> Predictor:
    return Predictor(loaded, DistContext(0, 0, 1, 1, torch.device("cpu")), precision="fp32")


def write_csv(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path
