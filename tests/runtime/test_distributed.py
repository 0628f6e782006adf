"""Ranks and collectives: on two real gloo processes, and as identities in one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmbert_core.config import Config
from mmbert_core.runtime import distributed
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
        "few parts": few,
        "unused parameters": replace(
            few, encoder=str(luke), microbatches_per_step=2, model_path=str(folder / "unused")
        ),
    }


@pytest.fixture(scope="module")
def ranks(configs) -> list[dict]:
    """What each of two ranks reports."""
    folder = Path(configs["few parts"].model_path).parent
    (folder / "configs.json").write_text(json.dumps({name: config.to_dict() for name, config in configs.items()}))
    done = tiny.torchrun(2, [WORKER, str(folder)], timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_lists_of_unequal_length_are_gathered_in_bounded_rounds(ranks):
    expected = [[[rank, index, [rank] * index] for index in range(count)] for rank, count in ((0, 8), (1, 2))]
    assert [rank["collectives"]["gathered"] for rank in ranks] == [expected, expected]
    assert [rank["collectives"]["sizes"] for rank in ranks] == [[0, 3, 3, 2], [0, 2, 0, 0]]  # first the lengths
    assert [rank["collectives"]["nothing"] for rank in ranks] == [[[], []]] * 2


def test_objects_and_sums_are_the_same_on_every_rank(ranks):
    for rank in ranks:
        assert rank["collectives"]["from 0"] == {"rank": 0} and rank["collectives"]["from 1"] == {"rank": 1}
        assert rank["collectives"]["sum"] == [pytest.approx(1.2, abs=1e-15), 1e300, 2**41 + 1]  # in float64
        assert rank["collectives"]["is_distributed"]


def test_tensors_of_every_kind_arrive(ranks):
    expected = {name: [str(value.dtype), value.double().tolist()] for name, value in tensors_of_all_kinds().items()}
    assert len(expected) == len(DTYPES) + 4
    for rank in ranks:
        assert rank["collectives"]["tensors"] == expected
        assert rank["collectives"]["from 1 only"] == [1.0, 1.0]


def test_an_error_of_rank_0_reaches_every_rank_as_what_it_is(ranks):
    assert ranks[0]["errors"]["ran"] == [0] * 4 and ranks[1]["errors"]["ran"] == []
    assert [rank["errors"]["input"] for rank in ranks] == [["InputError", "train.csv row 3: no label"]] * 2
    assert [rank["errors"]["value"] for rank in ranks] == [
        ["ValueError", "a bug"],
        ["PeerError", "rank 0: ValueError: a bug"],
    ]
    assert ranks[1]["errors"]["disk"] == ["PeerError", "rank 0: OSError: [Errno 28] No space left on device"]
    assert [rank["errors"]["value after"] for rank in ranks] == ["made on rank 0"] * 2


@pytest.mark.parametrize("name", ("few parts", "unused parameters"))
def test_two_processes_train_as_one(ranks, configs, tmp_path, name):
    """Also when a rank has no micro-batch, and when a rank would wait for gradients that never come."""
    two, one = configs[name], replace(configs[name], model_path=str(tmp_path / "one"))
    results, _ = tiny.train(one)
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
        results["steps"],
        results["rows"],
        results["best_step"],
    )


def test_a_bad_loss_of_one_rank_stops_all_before_the_step(ranks):
    [(other, heard), (guilty, told)] = [rank["poisoned"] for rank in ranks]
    assert (other, heard) == ("PeerError", "a loss of step 3 is not finite on another rank")
    assert (
        guilty == "RunError"
        and "micro-batch of step 3 is nan" in told
        and "train.csv row" in told
        and "stopped before the optimizer step" in told
    )


def test_a_failure_of_any_rank_is_one_of_all(ranks):
    assert [rank["errors"]["all"] for rank in ranks] == [
        ["PeerError", "rank 1: ValueError: only here"],
        ["ValueError", "only here"],
    ]
    assert [rank["errors"]["all after"] for rank in ranks] == [["rank 0", "rank 1"]] * 2


def test_a_flag_of_one_rank_is_heard_by_all_at_the_same_question(ranks):
    assert ranks[0]["poll"] == ranks[1]["poll"] == [False] * 5 + [True]  # raised by rank 1 at the fourth


def test_the_used_rows_of_an_embedding_are_summed_alone_and_the_gradients_are_the_same(ranks):
    every, used = (ranks[0]["embedding"][name] for name in ("all", "used"))
    assert used["gradients"] == every["gradients"] == ranks[1]["embedding"]["used"]["gradients"]
    assert [row for row, gradient in enumerate(used["gradients"][0]) if any(gradient)] == [1, 2, 7, 90]
    assert used["sent"] == 4 * 4 + 4 * 3 + 3 and every["sent"] in (
        0,
        100 * 4 + 4 * 3 + 3,
    )  # 0: torch's own, not through Python


# ---- one process ----


@pytest.fixture
def environment(monkeypatch):
    for name in distributed.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_ranks_wait_for_long_work_of_rank_0_and_no_longer_for_any_other(tmp_path):
    done = tiny.torchrun(2, [WORKER, str(tmp_path), "patience"], timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    said = json.loads((tmp_path / "patience1.json").read_text())
    assert said[0] == "done" and said[1].startswith("lost contact with another rank")


def test_helpers_are_identities_in_one_process(environment):
    context = distributed.read_context()
    assert (context.rank, context.local_rank, context.world_size, context.local_world_size, context.is_main) == (
        0,
        0,
        1,
        1,
        True,
    )
    with distributed.process_group(context) as same:
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
        assert distributed.wrap_ddp(model, context) is model
        with distributed.no_sync(model, enabled=True):
            pass


def test_torchrun_environment_is_read(environment):
    for name, value in zip(distributed.TORCHRUN_VARIABLES, ("3", "1", "4", "2", "localhost", "29500"), strict=True):
        environment.setenv(name, value)
    context = distributed.read_context()
    assert (context.rank, context.local_rank, context.world_size, context.local_world_size, context.is_main) == (
        3,
        1,
        4,
        2,
        False,
    )


@pytest.mark.parametrize(
    "present", (("RANK",), ("WORLD_SIZE",), ("RANK", "WORLD_SIZE", "LOCAL_RANK"), distributed.TORCHRUN_VARIABLES[:-1])
)
def test_a_partial_torchrun_environment_is_refused(environment, present):
    for name in present:
        environment.setenv(name, "1")
    missing = sorted(set(distributed.TORCHRUN_VARIABLES) - set(present))
    with pytest.raises(InputError, match=f"without {', '.join(missing)}$"):
        distributed.read_context()


def test_ranks_that_are_no_numbers_are_refused(environment):
    for name in distributed.TORCHRUN_VARIABLES:
        environment.setenv(name, "one")
    with pytest.raises(InputError, match="expected numbers in RANK"):
        distributed.read_context()


def test_variables_that_other_launchers_set_do_not_make_a_rank(environment):
    environment.setenv("MASTER_ADDR", "node0")
    environment.setenv("LOCAL_RANK", "0")
    assert distributed.read_context().world_size == 1


@pytest.mark.parametrize("threads, processes, highest", [(65, 1, 64), (1_024, 1, 64), (33, 2, 32), (3, 64, 2)])
def test_threads_that_would_wait_for_each_other_are_refused(monkeypatch, threads, processes, highest):
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    before = torch.get_num_threads()
    with pytest.raises(
        InputError,
        match=rf"^num_threads: expected at most {highest} \({processes} process.* 2 cores here\), found {threads}: auto is",
    ):
        distributed.set_threads(threads, distributed.DistContext(0, 0, processes, processes, torch.device("cpu")))
    assert torch.get_num_threads() == before


def test_processes_that_have_a_core_each_may_be_many(monkeypatch):
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert distributed.set_threads(1, distributed.DistContext(0, 0, 64, 64, torch.device("cpu"))) == 1


def test_threads_are_set_and_shared_by_the_processes_of_a_node(monkeypatch):
    before = torch.get_num_threads()
    context = distributed.DistContext(0, 0, 3, 3, torch.device("cpu"))
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    try:
        assert distributed.set_threads("auto", context) == 2 == torch.get_num_threads()
        assert distributed.set_threads(3, context) == 3 == torch.get_num_threads()
        monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: {0}, raising=False)
        assert distributed.set_threads("auto", context) == 1
    finally:
        torch.set_num_threads(before)
