"""Ranks and collectives: on two real gloo processes, and as identities in one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbert_core.config import Config
from mmbert_core.runtime import ddp, distributed, ranks, workers
from mmbert_core.runtime.errors import InputError
from tests.support import tiny
from tests.support.distributed_worker import DTYPES, tensors_of_all_kinds
from tests.training.conftest import save_encoder

WORKER = str(tiny.ROOT / "tests/support/distributed_worker.py")


# ---- two processes ----


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Config]:
    """What both ranks train: fewer micro-batches than ranks; an encoder with parameters that no loss reaches."""
    folder = tmp_path_factory.mktemp("two")
    values = tiny.settings(
        folder,
        num_rows=27,
        test_path=(),
        max_epochs=1,
        microbatches_per_step=1,
        class_weights=(1.0, 2.0),
        model_path=str(folder / "few"),
    )
    few = Config(**values)
    luke = save_encoder("Luke", folder / "luke", folder)
    return {
        "few micro-batches": few,
        "unused parameters": replace(
            few, encoder=str(luke), microbatches_per_step=2, model_path=str(folder / "unused")
        ),
    }


@pytest.fixture(scope="module")
def both_ranks(configs) -> list[dict]:
    """What each of two ranks reports."""
    folder = Path(configs["few micro-batches"].model_path).parent
    (folder / "configs.json").write_text(json.dumps({name: config.to_dict() for name, config in configs.items()}))
    done = tiny.torchrun(2, [WORKER, str(folder)], timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_lists_of_unequal_length_are_gathered_in_bounded_rounds(both_ranks):
    expected = [[[rank, index, [rank] * index] for index in range(count)] for rank, count in ((0, 8), (1, 2))]
    assert [rank["collectives"]["gathered"] for rank in both_ranks] == [expected, expected]
    assert [rank["collectives"]["sizes"] for rank in both_ranks] == [[0, 3, 3, 2], [0, 2, 0, 0]]  # first the lengths
    assert [rank["collectives"]["nothing"] for rank in both_ranks] == [[[], []]] * 2


def test_objects_and_sums_are_the_same_on_every_rank(both_ranks):
    for rank in both_ranks:
        assert rank["collectives"]["from 0"] == {"rank": 0} and rank["collectives"]["from 1"] == {"rank": 1}
        assert rank["collectives"]["sum"] == [pytest.approx(1.2, abs=1e-15), 1e300, 2**41 + 1]  # in float64
        assert rank["collectives"]["is_distributed"]


def test_tensors_of_every_kind_arrive(both_ranks):
    expected = {name: [str(value.dtype), value.double().tolist()] for name, value in tensors_of_all_kinds().items()}
    assert len(expected) == len(DTYPES) + 4
    for rank in both_ranks:
        assert rank["collectives"]["tensors"] == expected
        assert rank["collectives"]["from 1 only"] == [1.0, 1.0]


def test_an_error_of_rank_0_reaches_every_rank_as_what_it_is(both_ranks):
    assert both_ranks[0]["errors"]["ran"] == [0] * 4 and both_ranks[1]["errors"]["ran"] == []
    assert [rank["errors"]["input"] for rank in both_ranks] == [["InputError", "train.csv row 3: no label"]] * 2
    assert [rank["errors"]["value"] for rank in both_ranks] == [
        ["ValueError", "a bug"],
        ["PeerError", "rank 0: ValueError: a bug"],
    ]
    assert both_ranks[1]["errors"]["disk"] == ["PeerError", "rank 0: OSError: [Errno 28] No space left on device"]
    assert [rank["errors"]["value after"] for rank in both_ranks] == ["made on rank 0"] * 2
    assert [rank["errors"]["value kept"] for rank in both_ranks] == ["not pickled", None]


@pytest.mark.parametrize("name", ("few micro-batches", "unused parameters"))
def test_two_processes_train_as_one(both_ranks, configs, tmp_path, name):
    """Also when a rank has no micro-batch, and when a rank would wait for gradients that never come."""
    two, one = configs[name], replace(configs[name], model_path=str(tmp_path / "one"))
    results = tiny.train(one)
    losses = [
        [line["train_loss"] for line in tiny.metrics_lines(config.model_path) if "train_loss" in line]
        for config in (one, two)
    ]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = [load_file(Path(config.model_path) / "model.safetensors") for config in (one, two)]
    worst = max((weights[0][key] - value).abs().max().item() for key, value in weights[1].items())
    print(f"{name}: largest difference of a weight, 1 and 2 processes: {worst:.1e}")
    assert worst < 1e-6
    found = json.loads((Path(two.model_path) / "train_results.json").read_text())
    assert found["world_size"] == 2 and (found["steps"], found["rows"], found["best_step"]) == (
        results.steps,
        results.rows,
        results.best_step,
    )


def test_a_bad_loss_of_one_rank_stops_all_before_the_step(both_ranks):
    rank_0, rank_1 = (rank["poisoned"] for rank in both_ranks)
    assert rank_0 == ["PeerError", "a loss of step 3 is not finite on another rank"]
    kind, message = rank_1
    assert kind == "RunError" and "micro-batch of step 3 is nan" in message
    assert "train.csv row" in message and "stopped before the optimizer step" in message


def test_a_failure_of_any_rank_is_one_of_all(both_ranks):
    assert [rank["errors"]["all"] for rank in both_ranks] == [
        ["PeerError", "rank 1: ValueError: only here"],
        ["ValueError", "only here"],
    ]
    assert [rank["errors"]["all after"] for rank in both_ranks] == [["rank 0", "rank 1"]] * 2


def test_a_flag_of_one_rank_is_read_by_all_at_the_same_call(both_ranks):
    assert (
        both_ranks[0]["async flag"] == both_ranks[1]["async flag"] == [False] * 5 + [True]
    )  # raised by rank 1 at the fourth


def test_the_used_rows_of_an_embedding_are_summed_alone_and_the_gradients_are_the_same(both_ranks):
    every, used = (both_ranks[0]["embedding"][name] for name in ("all", "used"))
    assert used["gradients"] == every["gradients"] == both_ranks[1]["embedding"]["used"]["gradients"]
    assert [row for row, gradient in enumerate(used["gradients"][0]) if any(gradient)] == [1, 2, 7, 90]
    assert used["sent"] == 4 * 4 + 4 * 3 + 3 and every["sent"] in (
        0,
        100 * 4 + 4 * 3 + 3,
    )  # 0: torch's own, not through Python


def test_ranks_wait_for_long_work_of_rank_0_and_no_longer_for_any_other(tmp_path):
    done = tiny.torchrun(2, [WORKER, str(tmp_path), "long timeout"], timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    results = json.loads((tmp_path / "long_timeout1.json").read_text())
    assert results[0] == "done" and results[1].startswith("lost contact with another rank")


# ---- one process ----


@pytest.fixture
def environment(monkeypatch):
    for name in ranks.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_helpers_are_identities_in_one_process(environment):
    context = ranks.read_context()
    assert (context.rank, context.local_rank, context.world_size, context.local_world_size, context.is_main) == (
        0,
        0,
        1,
        1,
        True,
    )
    with workers.process_group(context) as same:
        assert same is context and not distributed.is_distributed()
        distributed.barrier()
        item = object()
        assert distributed.broadcast_object(item) is item
        assert distributed.all_gather_objects((item, 2)) == [[item, 2]] and distributed.all_gather_objects([]) == [[]]
        assert distributed.all_reduce_sum([1, 2.5]) == [1.0, 2.5]
        tensor = torch.ones(2)
        assert distributed.broadcast_tensors({"a": tensor})["a"] is tensor and distributed.broadcast_tensors(None) == {}
        assert distributed.on_main(lambda: item) is item
        with pytest.raises(InputError, match="^as it is$"):
            distributed.on_main(lambda: (_ for _ in ()).throw(InputError("as it is")))
        model = torch.nn.Linear(2, 2)
        assert ddp.wrap_ddp(model, context) is model
        with ddp.no_sync(model, enabled=True):
            pass
