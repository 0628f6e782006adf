"""A Predictor in more than one process and thread: forked, spawned, pickled, copied, called by threads at once."""

import copy
import json
import logging
import multiprocessing
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbert_core.config import Config
from mmbert_core.predictor import Predictor
from mmbert_core.runtime import forks, ranks
from mmbert_core.runtime.errors import InputError, RunError
from tests.support import tiny

ROWS = [
    {"text": "refund pay now please " * (1 + row % 7), "age": row % 50, "amount": 1.5, "kind": "abc"[row % 3]}
    for row in range(60)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    tiny.train(Config(**tiny.settings(folder, max_epochs=1)))
    return folder / "run"


def run_worker(model: Path, threads: int, num_children: int, *precision: str) -> list[Any]:
    """A JSON value of each child."""
    script = [
        str(tiny.ROOT / "tests" / "support" / "fork_worker.py"),
        str(model),
        str(threads),
        str(num_children),
        *precision,
    ]
    done = tiny.run_command(script, timeout=500, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0 and "forked" not in done.stderr, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_equal_to_parent(children: list[Any], *, count: int, tolerance: float = 1e-6) -> None:
    assert len(children) == count and all(
        isinstance(child, dict) and child["difference"] < tolerance for child in children
    ), children


def test_forked_children_predict_as_their_parent(model):
    """One with a child of its own, two while other threads of the parent predict."""
    children = run_worker(model, 2, 3)
    assert_equal_to_parent(children, count=4)
    assert [child["threads"] for child in children] == [1, 1, 1, 1]


@pytest.mark.fault
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_twenty_forks_none_hangs(model, threads):
    assert_equal_to_parent(run_worker(model, threads, 20), count=21)


def test_children_forked_right_after_threads_have_ended(model):
    """The end of a thread holds a lock of the matrix library for a moment: without a wait one child in eight hangs."""
    script = [str(tiny.ROOT / "tests" / "support" / "fork_after_threads.py"), str(model), "30"]
    done = tiny.run_command(script, timeout=500, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="2")
    assert done.returncode == 0 and done.stdout == "0 of 30 hang\n", (done.stdout, done.stderr[-2000:])


@pytest.mark.fault
def test_forked_children_of_an_int8_model(model):
    assert_equal_to_parent(
        run_worker(model, 2, 3, "int8"), count=4, tolerance=0.05
    )  # the child's newly loaded one is fp32


def test_a_spawned_child_loads_the_folder_anew(model):
    predictor = Predictor.from_folder(model)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(predictor.predict, (ROWS,)).get(300) == predictor.predict(ROWS)


def test_pickled_it_is_its_folder_and_options(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model.parent)
    predictor = Predictor.from_folder(model.name, precision="int8", threshold=0.3)
    pickled = pickle.dumps(predictor)
    monkeypatch.chdir(tmp_path)
    loaded = pickle.loads(pickled)
    assert len(pickled) < 1000
    assert loaded.predict(ROWS) == predictor.predict(ROWS) != Predictor.from_folder(model, threshold=0.3).predict(ROWS)
    assert loaded.loaded.decision.threshold.value == 0.3


def test_without_a_folder_it_cannot_be_pickled_but_copied(model):
    loaded = Predictor.from_folder(model)
    predictor = Predictor(loaded.loaded, loaded.context)
    with pytest.raises(InputError, match="without a model folder cannot be pickled"):
        pickle.dumps(predictor)
    copied, shallow = copy.deepcopy(predictor), copy.copy(predictor)
    assert shallow.loaded is predictor.loaded and copied.loaded.model is not predictor.loaded.model
    with torch.no_grad():
        for parameter in predictor.loaded.model.parameters():
            parameter.zero_()
    assert (
        shallow.predict(ROWS)
        == predictor.predict(ROWS)
        != copied.predict(ROWS)
        == Predictor.from_folder(model).predict(ROWS)
    )


def test_what_cannot_cross_a_fork_is_one_line(model, monkeypatch):
    predictor = Predictor.from_folder(model)
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as a child sees it
    predictor.predict(ROWS[:1])
    predictor.context = replace(predictor.context, device=torch.device("cuda", 0))
    with pytest.raises(RunError, match="a Predictor on a GPU cannot be used in a forked process"):
        predictor.predict(ROWS[:1])


def test_a_forked_process_is_given_one_thread(monkeypatch, caplog):
    monkeypatch.setattr(forks, "_forked", True)
    assert ranks.set_threads("auto", ranks.read_context()) == 1 and not caplog.records
    assert ranks.set_threads(3, ranks.read_context()) == 1 and "a forked process computes with 1 thread" in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_threads_get_the_answers_of_one(model, shared, one_thread, caplog):
    """The tokenizer's truncation and the hooks of an explanation belong to the model, not to a call."""
    caplog.set_level(logging.ERROR)
    predictor = Predictor.from_folder(model)
    other = (
        predictor
        if shared
        else Predictor(predictor.loaded, predictor.context, threshold=predictor.loaded.decision.threshold.value)
    )
    expected, explained = predictor.predict(ROWS), predictor.explain(ROWS[5])
    results: list[bool] = []

    def work(number: int) -> None:
        for _ in range(4):
            user = predictor if number % 2 else other
            same = user.explain(ROWS[5]) == explained if number == 3 else user.predict(ROWS) == expected
            results.append(same)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 16
