"""Shared by the benchmarks: a run's data and model, also in the peers' form, useful work, rounds, tables, plots."""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported: cuDNN's attention builds a plan for every new shape, which would be most of a peer's time.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset as TorchDataset

from mmbert_core.config import Config
from mmbert_core.config_arguments import add_config_arguments, overrides_from
from mmbert_core.config_reader import read_config
from mmbert_core.config_recipe import ORIGINAL
from mmbert_core.data.dataset import Dataset
from mmbert_core.data.prepare import Data, prepare
from mmbert_core.inference.model_folder import build_model
from mmbert_core.model.dropout import Dropout
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.text_encoder import TextBertBase
from mmbert_core.runtime.ranks import DistContext, read_context, set_threads
from mmbert_core.training.memory import MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD, call_glibc, keep_freed_memory

GEMM = {"cpu": (2048, 1), "cuda": (8192, 8)}  # size of the matrices, products per timing
GEMM_SECONDS = 1.0


# ---- arguments ----


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("config", help="a config of train.py, such as examples/womens_reviews.yaml")
    result.add_argument(
        "--rounds", type=int, default=5, help="how often every contender is measured, in turn (%(default)s)"
    )
    result.add_argument("--json", type=Path, help="write every measurement to this file")
    result.add_argument("--plot", type=Path, help="draw medians and spread into this file (.png or .svg)")
    add_config_arguments(result)
    return result


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[tuple[Config, Data, DistContext]]:
    """Config and data of a run in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="mmbert-benchmark-") as folder:
        named = {
            "recipe": ORIGINAL,
            **overrides_from(arguments),
        }  # the steps that the peers take, and no others
        config = read_config(arguments.config, {**named, "model_path": f"{folder}/run"})
        context = read_context()
        set_threads(config.num_threads, context)
        if config.max_chunks > 1 or not config.text_name:
            raise SystemExit("benchmarks: expected texts in one chunk (max_chunks 1), as the peers have them")
        if torch.cuda.device_count() > 1:
            raise SystemExit(
                "benchmarks: expected one GPU at most, found several, which HF Trainer would all use: "
                "set CUDA_VISIBLE_DEVICES"
            )
        yield config, prepare(config), context


def machine() -> dict[str, Any]:
    """Hardware and versions, without which figures cannot be compared."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


# ---- useful work ----


@dataclass(frozen=True)
class Work:
    """Floating point operations of an encoder on the real tokens of texts: the layers' matrix products alone."""

    layers: int
    hidden: int
    intermediate: int  # half of the columns of all feed-forward matrices: a gated layer has three, others two
    ends_at_first_tokens: bool  # the last layer computes only keys and values of the tokens after each text's first

    @classmethod
    def of(cls, text: TextBertBase) -> "Work":
        config = text.encoder.config
        intermediate = getattr(config, "intermediate_size", None) or config.hidden_dim
        gated = config.model_type == "modernbert"
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            intermediate * 3 // 2 if gated else intermediate,
            text.is_packed and text.ends_at_first_tokens,
        )

    def forward(self, lengths: np.ndarray) -> float:
        """Projections 8 n H^2, feed-forward 4 n H I, attention 4 n^2 H, per layer (a local one's too)."""
        tokens, squares = float(lengths.sum()), float((lengths.astype(np.float64) ** 2).sum())
        projection, feed_forward = 2 * self.hidden**2, 4 * self.hidden * self.intermediate  # per token
        layer = tokens * (4 * projection + feed_forward) + 4 * squares * self.hidden
        last = tokens * (2 * projection + 4 * self.hidden) + len(lengths) * (2 * projection + feed_forward)
        return (self.layers - 1) * layer + (last if self.ends_at_first_tokens else layer)

    def training(self, lengths: np.ndarray) -> float:
        """The backward pass has two products for each of the forward pass."""
        return 3 * self.forward(lengths)


def gemm_peak(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = GEMM_SECONDS) -> float:
    """FLOP/s of square matrix products, the best within some seconds."""
    size, count = GEMM[device.type]
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(one, other)
        wait(device)
        best = max(best, 2 * count * size**3 / (time.perf_counter() - started))
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the same rows and model for peers ----


class Rows(TorchDataset):
    """Rows as in the peers' datasets: dicts of token ids and columns, texts not padded."""

    def __init__(self, dataset: Dataset, positions: np.ndarray) -> None:
        self.items = [self._item(dataset, int(position)) for position in positions]
        self.lengths = np.array([len(item["input_ids"]) for item in self.items])

    @staticmethod
    def _item(dataset: Dataset, position: int) -> dict[str, Any]:
        batch = dataset.batch([position])
        return {
            "input_ids": batch.input_ids[0].tolist(),
            "numbers": batch.numbers[0],
            "categories": batch.categories[0],
            "labels": int(batch.labels[0]),
        }

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class Collator:
    """Pads each batch to its longest text, as DataCollatorWithPadding does; records the lengths of each batch."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[np.ndarray] = []

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.lengths.append(np.array([len(item["input_ids"]) for item in items]))
        texts = self.tokenizer.pad({"input_ids": [item["input_ids"] for item in items]}, return_tensors="pt")
        return {
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "numbers": torch.stack([item["numbers"] for item in items]),
            "categories": torch.stack([item["categories"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }


class PeerModel(nn.Module):
    """The same network without this project's optimisations: padded batches, SDPA, torch's dropout, in train mode."""

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__()
        self.network: MultimodalBert = build_model(config, data.features)
        text = self.network.text_subnetwork
        text.is_packed = False
        text.encoder.set_attn_implementation("sdpa")
        for parent in list(self.network.modules()):
            for name, child in parent.named_children():
                if type(child) is Dropout:
                    setattr(parent, name, nn.Dropout(child.p))
        self.train()

    def forward(
        self, input_ids: Any, attention_mask: Any, numbers: Any, categories: Any, labels: Any = None
    ) -> dict[str, torch.Tensor]:
        logits = self.network(input_ids, attention_mask, numbers, categories)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


# ---- rounds ----


@dataclass
class Contender:
    """`run(round)` does the round's work and returns its figures. `ours`: with a run's settings of the C library."""

    name: str
    run: Callable[[int], dict[str, float]]
    ours: bool = False
    rounds: list[dict[str, float]] = field(default_factory=list)

    def median(self, figure: str) -> float:
        return statistics.median(each[figure] for each in self.rounds)

    def spread(self, figure: str) -> tuple[float, float]:
        values = [each[figure] for each in self.rounds]
        return min(values), max(values)


def alternate(contenders: Sequence[Contender], rounds: int) -> None:
    """Every contender once per round, in turn, so that a slow minute of the machine affects all."""
    for number in range(rounds):
        for contender in contenders:
            (keep_freed_memory if contender.ours else use_default_malloc)()
            contender.rounds.append(contender.run(number))
            figures = "  ".join(f"{name} {value:,.3g}" for name, value in contender.rounds[-1].items())
            print(f"round {number + 1}/{rounds}  {contender.name}: {figures}", file=sys.stderr, flush=True)


def use_default_malloc() -> None:
    """The thresholds that glibc reaches by itself, as in a peer's own process: undoes `keep_freed_memory`."""
    for name, value in ((MMAP_THRESHOLD, 32 * 2**20), (TRIM_THRESHOLD, 64 * 2**20), (MMAP_MAX, 65536)):
        call_glibc("mallopt", name, value)


def ratios(ours: Contender, other: Contender, figure: str) -> list[float]:
    """Ours over the other's, round by round."""
    return [one[figure] / two[figure] for one, two in zip(ours.rounds, other.rounds, strict=True)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(
    contenders: Sequence[Contender], *, figure: str, unit: str, extra: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """Print the table; write JSON and plot where asked. The first contender is ours."""
    ours, names = contenders[0], list(contenders[0].rounds[0])
    rows = []
    for contender in contenders:
        medians = [f"{contender.median(name):,.3g}" for name in names]
        low, high = contender.spread(figure)
        factors = sorted(ratios(ours, contender, figure))
        factor = f"{statistics.median(factors):.2f} ({factors[0]:.2f} - {factors[-1]:.2f})"
        rows.append([contender.name, *medians, f"{low:,.3g} - {high:,.3g}", "" if contender is ours else factor])
    last = f"ours is faster by ({figure}, median and spread of the rounds)"
    print(table(["", *names, f"spread of {figure}", last], rows))
    record = {
        "machine": machine(),
        **extra,
        "contenders": {contender.name: contender.rounds for contender in contenders},
    }
    print(json.dumps({**record["machine"], **extra}))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        draw(contenders, figure, unit, arguments.plot)


def draw(contenders: Sequence[Contender], figure: str, unit: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(8, 0.5 * len(contenders) + 1.2))
    names = [contender.name for contender in contenders][::-1]
    medians = np.array([contender.median(figure) for contender in contenders])[::-1]
    low, high = np.array([contender.spread(figure) for contender in contenders])[::-1].T
    axes.barh(
        names,
        medians,
        xerr=[medians - low, high - medians],
        color=["#9aa5b1"] * (len(names) - 1) + ["#1f6feb"],
        capsize=3,
    )
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)
