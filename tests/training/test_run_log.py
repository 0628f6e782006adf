"""metrics.jsonl, TensorBoard and the lines of a run's log."""

import json
import logging
import shutil
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmbert_core.runtime import progress
from mmbert_core.storage.metrics_log import kept_lines
from mmbert_core.training import run_log
from mmbert_core.training.run_log import RunLog


def test_lines_after_the_loaded_step_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert kept_lines(path, 3) == []
    lines = [json.dumps({"step": step, "train_loss": 0.5}) for step in (1, 2, 3, 4)]
    path.write_text(
        "\n".join(
            [
                *lines[:2],
                '{"step": 2, "val_loss": 0.1}',
                '{"step": 3, "tra',
                "",
                "\0\0\0",
                "[1]",
                '{"epoch": 1}',
                *lines[2:],
                '{"st',
            ]
        )
    )
    assert kept_lines(path, 3) == [*lines[:2], '{"step": 2, "val_loss": 0.1}', lines[2]]
    assert kept_lines(path, 0) == []  # a fresh start
    log = RunLog(tmp_path, is_main=True, first_step=3, total_steps=9, is_resumed=True)
    log.record({"step": 4, "train_loss": 0.25, "val/f1_score": None})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3, 4]
    assert path.read_text().endswith('"val/f1_score": null}\n')


def test_tensorboard_has_the_same_curves(tmp_path):
    log = RunLog(tmp_path, is_main=True, first_step=0, total_steps=2, is_resumed=False)
    for step in (1, 2):
        log.record({"step": step, "epoch": 0, "train_loss": step / 2, "val/auroc": None if step == 1 else 0.75})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train_loss", "val/auroc"]
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 0.5), (2, 1.0)]
    assert [(event.step, event.value) for event in events.Scalars("val/auroc")] == [(2, 0.75)]


def test_other_ranks_write_nothing(tmp_path, caplog):
    log = RunLog(tmp_path, is_main=False, first_step=0, total_steps=2, is_resumed=False)
    log.record({"step": 1}), log.progress(1, "x"), log.say("y"), log.close()
    assert list(tmp_path.iterdir()) == [] and caplog.messages == []


@pytest.mark.parametrize("is_terminal", (False, True))
def test_plain_lines_every_few_seconds_without_a_terminal_a_bar_in_one(
    tmp_path, monkeypatch, caplog, capsys, is_terminal
):
    caplog.set_level(logging.INFO, logger="mmbert_core")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_log.sys.stderr, "isatty", lambda: is_terminal)
    log = RunLog(tmp_path, is_main=True, first_step=0, total_steps=20, is_resumed=False)
    for step in range(1, 21):
        now[0] += 1.0
        log.progress(step, f"loss {step}")
    log.say("the end")
    log.close()
    assert caplog.messages == [
        *([] if is_terminal else [f"step {step}/20  loss {step}" for step in (1, 6, 11, 16, 20)]),
        "the end",
    ]
    assert ("20/20" in capsys.readouterr().err) == is_terminal


@pytest.mark.parametrize(("validated", "tested", "left"), [(False, False, 2), (True, False, 3), (True, True, 4)])
def test_lines_of_what_is_done_once_more_are_dropped(tmp_path, validated, tested, left):
    lines = [
        '{"step": 1, "val_loss": 0.5}',
        '{"step": 2, "train_loss": 0.4}',
        '{"step": 2, "val_loss": 0.3}',
        '{"step": 2, "test/num_rows": 7}',
        '{"step": 3, "train_loss": 0.2}',
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    log = RunLog(
        tmp_path, is_main=True, first_step=2, total_steps=4, is_resumed=True, validated=validated, tested=tested
    )
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:left]


def test_curves_without_a_folder_are_one_warning(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's; put back afterwards
    log = RunLog(tmp_path, is_main=True, first_step=0, total_steps=9, is_resumed=False)
    log.record({"step": 1, "train_loss": 0.5})
    shutil.rmtree(tmp_path)
    worker = log._tensorboard.file_writer.event_writer._async_writer._worker
    worker._next_flush_time = 0  # else it writes every two minutes
    log.record({"step": 2, "train_loss": 0.5})
    worker.join(timeout=60)
    assert isinstance(worker.exception, OSError), (
        "this TensorBoard takes a folder that is gone: the test proves nothing"
    )
    for step in (3, 4, 5):
        log.record({"step": step, "train_loss": 0.5})
    log.close()
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no more curves for TensorBoard: ")
    assert "Traceback" not in capfd.readouterr().err

    failure = threading.Thread(target=lambda: 1 / 0)  # other threads are none of its business
    failure.start()
    failure.join()
    assert "ZeroDivisionError" in capfd.readouterr().err
