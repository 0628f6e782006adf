"""What `test_distributed` runs on every rank under torchrun: `distributed_worker.py FOLDER`.

Each rank writes FOLDER/rank<r>.json.
"""

import json
import math
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.runtime import ddp, distributed, ranks, workers
from mmbert_core.runtime.errors import InputError, PeerError
from mmbert_core.runtime.ranks import DistContext
from tests.support import tiny

DTYPES = [getattr(torch, name) for name in "float32 float64 float16 bfloat16 int64 int32 int8 uint8 bool".split()]


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    kinds = {str(dtype): values.to(dtype) for dtype in DTYPES}
    return kinds | {
        "no dimension": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "not contiguous": values.T,
        "step": torch.tensor(7.0),
    }


def collectives(context: DistContext) -> dict[str, Any]:
    rank = context.rank
    sizes = []
    original = distributed.dist.all_gather_object

    def recording(gathered, value, **options):
        sizes.append(len(value) if isinstance(value, list) else 0)
        original(gathered, value, **options)

    distributed.dist.all_gather_object = recording
    own = [(rank, index, np.full(index, rank)) for index in range(8 if rank == 0 else 2)]
    gathered = distributed.all_gather_objects(own, per_round=3)
    distributed.dist.all_gather_object = original
    tensors = distributed.broadcast_tensors(tensors_of_all_kinds() if rank == 0 else None)
    return {
        "gathered": [[(rank, index, array.tolist()) for rank, index, array in of_rank] for of_rank in gathered],
        "sizes": sizes,
        "nothing": distributed.all_gather_objects([]),
        "from 0": distributed.broadcast_object({"rank": rank}),
        "from 1": distributed.broadcast_object({"rank": rank}, source=1),
        "sum": distributed.all_reduce_sum([rank + 0.1, 1e300 * rank, 2**40 + rank]),
        "tensors": {name: (str(value.dtype), value.double().tolist()) for name, value in tensors.items()},
        "from 1 only": distributed.broadcast_tensors(
            {"a": torch.full((2,), float(rank))} if rank == 1 else None, source=1
        )["a"].tolist(),
        "is_distributed": distributed.is_distributed(),
    }


def errors(context: DistContext) -> dict[str, list[str]]:
    """The error on each rank when rank 0's action fails; the group works afterwards."""
    ran: list[int] = []

    def failing(error: Exception):
        def action():
            ran.append(context.rank)
            raise error

        return action

    seen = {}
    for name, error in (
        ("input", InputError("train.csv row 3: no label")),
        ("value", ValueError("a bug")),
        ("disk", OSError(28, "No space left on device")),
    ):
        try:
            distributed.on_main(failing(error))
        except Exception as caught:
            seen[name] = [type(caught).__name__, str(caught)]
    try:
        distributed.on_all(failing(ValueError("only here")) if context.rank == 1 else lambda: None)
    except Exception as caught:
        seen["all"] = [type(caught).__name__, str(caught)]
    ran.pop() if context.rank == 1 else None
    seen["all after"] = distributed.on_all(lambda: f"rank {context.rank}")
    seen["value after"] = distributed.on_main(lambda: ran.append(context.rank) or "made on rank 0")
    seen["value kept"] = distributed.on_main(lambda: lambda: "not pickled", share=False)
    seen["value kept"] = seen["value kept"] and seen["value kept"]()
    seen["ran"] = ran
    return seen


def async_flag(context: DistContext) -> list[bool]:
    """What each rank reads until it reads True; rank 1 raises its flag at the fourth call."""
    flag, answers = distributed.AsyncFlag(), []
    while not any(answers):
        answers.append(flag.any_rank(context.rank == 1 and len(answers) == 3))
    flag.close()
    return answers


def embedding_gradients(context: DistContext) -> dict[str, Any]:
    """Mean gradients of an embedding and a layer after it, all-reduced over all rows and over the used rows alone."""
    ids, found = torch.tensor([[1, 7, 7], [2, 7, 90]])[context.rank], {}
    original, sent = distributed.dist.all_reduce, []

    def recording(tensor, *arguments, **options):
        sent.append(tensor.numel())
        return original(tensor, *arguments, **options)

    distributed.dist.all_reduce = recording
    for name, rows in (("all", None), ("used", torch.tensor([1, 2, 7, 90]))):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(100, 4), torch.nn.Linear(4, 3))
        used = ddp.UsedRows(model[0].weight, rows)
        ddp_model = ddp.wrap_ddp(model, context, used)
        for step in range(2):  # DDP rebuilds its buckets after the first
            ddp_model.zero_grad(set_to_none=True)
            with ddp.no_sync(ddp_model, enabled=True):
                ddp_model(ids[:1]).square().sum().backward()
            sent.clear()
            ddp_model(ids[1:]).square().sum().backward()
        found[name] = {"gradients": [parameter.grad.tolist() for parameter in model.parameters()], "sent": sum(sent)}
    distributed.dist.all_reduce = original
    return found


def stops_together(config: Config, context: DistContext) -> list[str]:
    """A loss that is not a number on rank 1 alone, at its third micro-batch."""
    original, calls = hooks.training_step, [0]

    def training_step(*arguments, **options):
        calls[0] += 1
        factor = math.nan if context.rank == 1 and calls[0] == 3 else 1.0
        return {"loss": original(*arguments, **options)["loss"] * factor}

    hooks.training_step = training_step
    try:
        tiny.train(config, context)
        return ["nothing", ""]
    except RuntimeError as error:
        return [type(error).__name__, str(error)]
    finally:
        hooks.training_step = original


def waits_for_rank_0() -> list[str]:
    """What comes of work of rank 0 that takes longer than the group's timeout: with a long timeout, then without."""

    def work() -> str:
        time.sleep(4)
        return "done"

    distributed._object_group = distributed.dist.new_group(
        backend="gloo", timeout=timedelta(seconds=2)
    )  # the start may take longer
    results = [distributed.on_main(work, long_timeout=True)]
    try:
        return [*results, distributed.on_main(work)]
    except PeerError as error:
        return [*results, str(error)]


def main() -> None:
    folder = Path(sys.argv[1])
    context = ranks.read_context()
    if sys.argv[2:] == ["long timeout"]:
        with workers.process_group(context):
            (folder / f"long_timeout{context.rank}.json").write_text(json.dumps(waits_for_rank_0()))
            workers.leave(0)  # the group is broken
    ranks.set_threads(1, context)
    configs = {
        name: config_from_dict(values) for name, values in json.loads((folder / "configs.json").read_text()).items()
    }
    with workers.process_group(context):
        result = {
            "collectives": collectives(context),
            "errors": errors(context),
            "async flag": async_flag(context),
            "embedding": embedding_gradients(context),
        }
        for name, config in configs.items():
            tiny.train(config, context)
        poisoned = replace(configs["few micro-batches"], model_path=str(folder / "poisoned"), microbatches_per_step=2)
        result["poisoned"] = stops_together(poisoned, context)
        (folder / f"rank{context.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
