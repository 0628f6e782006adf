"""A line about a step that takes long, and none about one that does not.   pytest tests/runtime/test_progress.py"""

import logging
import threading
import time

import pytest

from mmbert_core.runtime import progress
from mmbert_core.runtime.progress import Progress, Throttle, slow_step


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS_UNTIL_LINE", 0.05)
    monkeypatch.setattr(logging.getLogger("mmbert_core"), "propagate", True)
    caplog.set_level(logging.INFO)


def test_a_long_step_says_so_while_it_runs_and_then_ever_less_often(caplog: pytest.LogCaptureFixture) -> None:
    with slow_step("bootstrap intervals"):
        deadline = time.monotonic() + 20
        while len(caplog.messages) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(caplog.messages) == 3 and all(
        line.startswith("bootstrap intervals: ") and line.endswith(" seconds so far") for line in caplog.messages
    )
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("slow step")]


def test_a_short_step_and_one_that_fails_leave_no_line_and_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), slow_step("metrics"):
        _ = 1 / 0
    time.sleep(0.1)
    assert caplog.messages == [] and not [
        thread for thread in threading.enumerate() if thread.name.startswith("slow step")
    ]


def test_a_throttle_is_due_at_once_and_then_no_more_often_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    at_once, later = Throttle(5), Throttle(5, wait_first=True)
    due = []
    for clock[0] in (100.0, 104.9, 105.0, 109.0, 111.0):
        due.append((at_once.is_due(), later.is_due()))
    assert due == [(True, False), (False, False), (True, True), (False, False), (True, True)]


def test_rows_are_logged_with_their_rate_and_the_time_left(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    rows, lines = Progress("training rows read"), Progress("rows scored", [100, 300])
    clock[0] = 5.0
    rows.advance_to(50)
    lines.advance(50, 0, 50)
    clock[0] = 10.0
    rows.advance_to(100)
    lines.advance(50, 0, 100)
    assert caplog.messages == ["100 training rows read, 10 rows/s", "100 rows scored, 10 rows/s, about 0:30 left"]
