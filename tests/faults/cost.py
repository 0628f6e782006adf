"""The cost of fault tolerance: the share of a training's time that goes into checkpoints and checks over all ranks.

    torchrun --standalone --nproc_per_node=2 -m tests.faults.cost examples/womens_reviews.yaml --model_path /tmp/cost

Trains as `train.py` does and measures the time of: `save` (check for finite values, writing, syncing, hashing,
rotation; the other ranks wait), `check_step_on_all_ranks` (the step's small all-reduce of rows, losses and stop
requests), the asynchronous flags of evaluations, and before step 1 the trial of the largest micro-batch. Rank 0 prints
a JSON object.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from mmbert_core import cli
from mmbert_core.runtime import distributed, ranks
from mmbert_core.training import loop, start

seconds: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)


def measure_time(owner: Any, name: str, label: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            seconds[label] += time.perf_counter() - started
            calls[label] += 1

    setattr(owner, name, timed)


def main() -> None:
    measure_time(loop, "train_one_step", "steps")
    measure_time(loop, "validate", "validations")
    measure_time(loop, "save", "checkpoints")
    measure_time(loop, "check_step_on_all_ranks", "check_on_all_ranks")
    measure_time(distributed.AsyncFlag, "any_rank", "polls")
    measure_time(start, "resolve_by_trial", "trial before step 1")
    measure_time(start, "warm_up", "warm-up of DDP")
    code = cli.main(["train", *sys.argv[1:]])
    if ranks.read_context().is_main:
        training = seconds["steps"] + seconds["validations"] + seconds["checkpoints"]
        safety = seconds["checkpoints"] + seconds["check_on_all_ranks"] + seconds["polls"]
        print(
            json.dumps(
                {
                    "seconds": dict(seconds),
                    "calls": dict(calls),
                    "share_of_training": safety / training,
                    "check_on_all_ranks_milliseconds_per_step": 1000 * seconds["check_on_all_ranks"] / calls["steps"],
                    "seconds_per_checkpoint": seconds["checkpoints"] / calls["checkpoints"],
                    "seconds_per_step": seconds["steps"] / calls["steps"],
                }
            )
        )
    sys.exit(code)


if __name__ == "__main__":
    main()
