"""A line about a step that takes long, and none about one that does not.   pytest tests/runtime/test_progress.py"""

import logging
import threading
import time

import pytest

from mmbert_core.runtime import progress
from mmbert_core.runtime.progress import slow_step


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
