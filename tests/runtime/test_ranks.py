"""Which process this is, from torchrun's environment, and the CPU threads of a process."""

import os

import pytest
import torch

from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.ranks import TORCHRUN_VARIABLES, DistContext, read_context, set_threads


@pytest.fixture
def environment(monkeypatch):
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_torchrun_environment_is_read(environment):
    for name, value in zip(TORCHRUN_VARIABLES, ("3", "1", "4", "2", "localhost", "29500"), strict=True):
        environment.setenv(name, value)
    context = read_context()
    assert (context.rank, context.local_rank, context.world_size, context.local_world_size, context.is_main) == (
        3,
        1,
        4,
        2,
        False,
    )


@pytest.mark.parametrize(
    "present", (("RANK",), ("WORLD_SIZE",), ("RANK", "WORLD_SIZE", "LOCAL_RANK"), TORCHRUN_VARIABLES[:-1])
)
def test_a_partial_torchrun_environment_is_refused(environment, present):
    for name in present:
        environment.setenv(name, "1")
    missing = sorted(set(TORCHRUN_VARIABLES) - set(present))
    with pytest.raises(InputError, match=f"without {', '.join(missing)}$"):
        read_context()


def test_ranks_that_are_not_numbers_are_refused(environment):
    for name in TORCHRUN_VARIABLES:
        environment.setenv(name, "one")
    with pytest.raises(InputError, match="expected numbers in RANK"):
        read_context()


def test_variables_that_other_launchers_set_do_not_make_a_rank(environment):
    environment.setenv("MASTER_ADDR", "node0")
    environment.setenv("LOCAL_RANK", "0")
    assert read_context().world_size == 1


@pytest.mark.parametrize("threads, processes, highest", [(65, 1, 64), (1_024, 1, 64), (33, 2, 32), (3, 64, 2)])
def test_threads_that_would_wait_for_each_other_are_refused(monkeypatch, threads, processes, highest):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    before = torch.get_num_threads()
    with pytest.raises(
        InputError,
        match=rf"^num_threads: expected at most {highest} \({processes} process.* 2 cores here\), found {threads}:",
    ):
        set_threads(threads, DistContext(0, 0, processes, processes, torch.device("cpu")))
    assert torch.get_num_threads() == before


def test_processes_that_have_a_core_each_may_be_many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert set_threads(1, DistContext(0, 0, 64, 64, torch.device("cpu"))) == 1


def test_threads_are_set_and_shared_by_the_processes_of_a_node(monkeypatch):
    before = torch.get_num_threads()
    context = DistContext(0, 0, 3, 3, torch.device("cpu"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    try:
        assert set_threads("auto", context) == 2 == torch.get_num_threads()
        assert set_threads(3, context) == 3 == torch.get_num_threads()
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
        assert set_threads("auto", context) == 1
    finally:
        torch.set_num_threads(before)
