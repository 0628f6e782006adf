"""Signals in a process of its own, where no launcher is. Whole runs that are stopped: tests/faults/test_signals.py."""

import signal
import subprocess
import sys
import time

import pytest

from tests.support import tiny

PROGRAM = """
import os, signal, sys, time
from mmbert_core.runtime import signals

if "ignored" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with signals.caught(), signals.deferred():
    print("ready", flush=True)
    while not signals.requested() or "never done" in sys.argv:
        time.sleep(0.01)
    print(signals.requested(), flush=True)
    signals.ignore()  # as when the checkpoint is written
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(signals.EXIT_STOPPED)
"""


def start(*words):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"))
def test_a_signal_is_a_request_and_later_ones_change_nothing_once_the_work_is_saved(name):
    process = start()
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert out == f"{name}\n" and process.returncode == 75, err


def test_nohup_is_heeded():
    process = start("ignored")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert out == "SIGTERM\n" and process.returncode == 75


def test_two_signals_at_once_are_one_request():
    process = start()
    process.send_signal(signal.SIGTERM), process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and out in ("SIGTERM\n", "SIGUSR1\n")


def test_a_late_second_signal_ends_the_process_at_once():
    process = start("never done")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
