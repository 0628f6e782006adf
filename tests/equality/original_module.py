"""The original Lightning module, rewritten over this project's network: the reference of the equality tests.

What each hook computes, logs and stores is the original's: cross entropy as torch's mean, weight decay by parameter
name, lists filled batch by batch, a TSV. It differs where the original cannot run or its code is not known:

* the network is an argument, so that both sides start from the same weights;
* `torch.optim.AdamW` replaces `transformers.AdamW`, which no longer exists;
* validation gathers Python objects as the test does: the original's tensor all-gather fails in a single process;
* scikit-learn computes the metrics, which the original leaves to a file of its own;
* the stage of a test batch comes from `in`, not from catching KeyError, and a loss that is None is not logged.
"""

# B rows of a batch, F numeric inputs, K classes

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

NO_DECAY = ("bias", "LayerNorm.weight")


class OriginalMultimodalBert(pl.LightningModule):
    """`network(input_ids, attention_mask, tab_data)` -> logits [B, K], trained and evaluated on batches that are dicts.

    A batch has the tensors `<text_name>_input_ids`, `<text_name>_attention_mask`, one per name of `tab_field_list` and,
    where known, `<label_name>`; and the list `<id_name>`.
    """

    model_class = "multimodal_bert"

    def __init__(self, network: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.text_name = config["text_name"] + "_input_ids"
        self.text_attention_mask = config["text_name"] + "_attention_mask"
        self.label_name, self.id_name = config["label_name"], config["id_name"]
        self.is_binary = config["is_binary"]
        class_weights = config.get("class_weights")
        self.loss_op = nn.CrossEntropyLoss(weight=None if class_weights is None else torch.tensor(class_weights))
        self.test_has_label = False
        self.clear_lists()

    def clear_lists(self) -> None:
        self.id_lst: list[str] = []
        self.pred_lst: list[Any] = []
        self.label_lst: list[int] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tab_data: torch.Tensor) -> torch.Tensor:
        return self.network(input_ids, attention_mask, tab_data.float())

    # ---- training ----

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        decayed, undecayed = [], []
        for name, parameter in self.named_parameters():
            (undecayed if any(pattern in name for pattern in NO_DECAY) else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.config["weight_decay"]},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.config["lr"], eps=self.config["adam_epsilon"])
        warmup = self.config["warmup_steps"]
        if self.config["run_scheduler"]:
            total = self.trainer.estimated_stepping_batches
            schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=warmup, num_training_steps=total)
        else:
            schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=warmup)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]

    def run_epoch(
        self, batch: dict[str, Any], stage: str
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """One batch (the original's name): loss, probabilities [B] or [B, K], labels [B]."""
        tab_data = torch.stack([batch[name] for name in self.config["tab_field_list"]], dim=1)  # [B, F]
        logits = self(batch[self.text_name], batch[self.text_attention_mask], tab_data)
        labels = None if stage == "pred" else batch[self.label_name]
        loss = None if labels is None else self.loss_op(logits, labels)
        probabilities = torch.softmax(logits, dim=1)
        return loss, probabilities[:, 1] if self.is_binary else probabilities, labels

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        loss, _, _ = self.run_epoch(batch, "train")
        self.log("train_loss", loss, sync_dist=True, prog_bar=True)
        return {"loss": loss}

    # ---- validation ----

    def on_validation_epoch_start(self) -> None:
        self.clear_lists()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, preds, labels = self.run_epoch(batch, "val")
        self.log("val_loss", loss, sync_dist=True, prog_bar=True)
        self.pred_lst.extend(preds.detach().cpu().tolist())
        self.label_lst.extend(labels.detach().cpu().tolist())

    def on_validation_epoch_end(self) -> None:
        preds, labels = np.asarray(gathered(self.pred_lst)), np.asarray(gathered(self.label_lst))
        chosen = preds > 0.5 if self.is_binary else preds.argmax(axis=1)
        average = "binary" if self.is_binary else "macro"
        values = {
            "val/accuracy": accuracy_score(labels, chosen),
            "val/f1_score": f1_score(labels, chosen, average=average),
        }
        self.log_dict({name: float(value) for name, value in values.items()}, prog_bar=True)

    # ---- test and prediction ----

    def stage_of(self, batch: dict[str, Any]) -> str:
        return "test" if self.label_name in batch else "pred"

    def on_test_epoch_start(self) -> None:
        self.clear_lists()
        self.test_has_label = False
        self.test_output_folder = (
            Path(self.config["model_path"]) / f"{self.model_class}-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
        )
        if self.trainer.is_global_zero:
            self.test_output_folder.mkdir(parents=True, exist_ok=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, preds, labels = self.run_epoch(batch, self.stage_of(batch))
        self.pred_lst.extend(preds.detach().cpu().tolist())
        self.test_has_label = labels is not None
        if labels is not None:
            self.label_lst.extend(labels.detach().cpu().tolist())
            self.log("test_loss", loss, sync_dist=True, prog_bar=True)
        if self.id_name:
            self.id_lst.extend(batch[self.id_name])

    def on_test_epoch_end(self) -> None:
        columns = {self.id_name: gathered(self.id_lst)} if self.id_name else {}
        columns["prob"] = gathered(self.pred_lst)
        if self.test_has_label:
            columns["label"] = gathered(self.label_lst)
        if self.global_rank == 0:
            pd.DataFrame(columns).to_csv(self.test_output_folder / "test_result_0.tsv", sep="\t", index=False)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        stage = self.stage_of(batch)
        _, preds, labels = self.run_epoch(batch, stage)
        return preds if stage == "pred" else (preds, labels)


def gathered(values: list[Any]) -> list[Any]:
    """Collective. The lists of all processes, one after the other."""
    if not torch.distributed.is_initialized():
        return list(values)
    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, values)
    return [value for of_rank in by_rank for value in of_rank]
