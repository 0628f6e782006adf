"""One run per folder, on a file system with locks and on one without: real processes, with a fast heartbeat."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.storage import folder_lock
from mmbert_core.storage.folder_lock import CLAIM, claim_folder
from tests.support import tiny

HOLD = """
import errno, fcntl, os, sys, time
from mmbert_core.storage import folder_lock
if "locks" not in sys.argv:
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock = refuse
folder_lock.SECONDS_BETWEEN_BEATS = 0.1
if "elsewhere" in sys.argv:
    folder_lock.socket.gethostname = lambda: "elsewhere"
claim = folder_lock.claim_folder(sys.argv[1])
print(os.getpid(), flush=True)
sys.stdin.read()
claim.release()
"""


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(folder_lock, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(folder_lock, "SECONDS_WITHOUT_A_BEAT", 1.0)


@pytest.fixture
def no_locks(monkeypatch, short):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def hold(folder: Path, *words: str) -> subprocess.Popen:
    """A process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *words],
        cwd=tiny.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == f"{process.pid}\n"
    return process


@pytest.mark.parametrize("words", ((), ("elsewhere",)))
def test_without_locks_the_second_is_refused_and_the_end_of_the_first_frees_the_folder(
    tmp_path, no_locks, words, caplog
):
    process = hold(tmp_path, *words)
    with pytest.raises(
        InputError, match=f"expected a folder that no other run writes to, found it in use by process {process.pid} on "
    ):
        claim_folder(tmp_path)
    process.communicate(timeout=30)
    assert not (tmp_path / CLAIM).exists()
    claim = claim_folder(tmp_path)
    assert "this file system has no locks (No locks available)" in caplog.text
    claim.check()
    claim.release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("words", ((), ("elsewhere",)))
def test_without_locks_the_claim_of_a_killed_process_is_taken_over(tmp_path, no_locks, words):
    process = hold(tmp_path, *words)
    process.kill()
    process.wait()
    started = time.monotonic()
    claim = claim_folder(tmp_path)
    assert (time.monotonic() - started >= folder_lock.SECONDS_WITHOUT_A_BEAT) == bool(
        words
    )  # on the same machine its process number decides
    claim.release()
    assert not (tmp_path / CLAIM).exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    "content",
    ("", "process 1 on elsewhere " + "0" * 32 + "\n7\n", f"process {os.getpid()} on here {'0' * 32}\n"),
    ids=["empty", "another machine", "this process's number"],
)
def test_a_claim_that_nobody_keeps_up_is_taken_over(tmp_path, no_locks, content):
    (tmp_path / CLAIM).write_text(content)
    claim_folder(tmp_path).release()
    assert not (tmp_path / CLAIM).exists()


def test_a_run_whose_folder_was_taken_says_by_whom(tmp_path, no_locks):
    claim = claim_folder(tmp_path)
    (tmp_path / CLAIM).write_text(f"process 7 on elsewhere {'0' * 32}\n1\n")
    with pytest.raises(RunError, match="another run writes to this folder now .process 7 on elsewhere."):
        claim.check()
    claim.release()
    assert (tmp_path / CLAIM).read_text().startswith("process 7")  # the other's stays


def test_with_locks_there_is_no_claim_file(tmp_path):
    process = hold(tmp_path, "locks")
    assert not (tmp_path / CLAIM).exists()
    with pytest.raises(InputError, match=f"in use by process {process.pid} on "):
        claim_folder(tmp_path)
    process.kill()
    process.wait()
    claim_folder(tmp_path).release()


@pytest.mark.fault
def test_of_many_that_begin_at_once_one_has_the_folder(tmp_path):
    """Over the claim of a dead process."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    for _ in range(5):
        (tmp_path / CLAIM).write_text(f"process 999999999 on {folder_lock.socket.gethostname()} {'0' * 32}\n1\n")
        processes = [
            subprocess.Popen(
                command,
                cwd=tiny.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(4)
        ]
        holders = [process for process in processes if process.stdout.readline()]
        assert len(holders) == 1
        for process in processes:
            process.communicate(timeout=30)


def test_two_runs_at_once_without_locks(tmp_path):
    """The second command ends with one line and exit code 2, the first as if alone. Both build one cache."""
    config = tmp_path / "run.json"
    values = tiny.settings(tmp_path, max_epochs=1, test_path=())
    config.write_text(
        json.dumps({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})
    )
    program = (
        "import errno, fcntl, os, sys, time\n"
        "def refuse(*_):\n    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))\n"
        "fcntl.flock = refuse\n"
        "from mmbert_core import cli\nfrom mmbert_core.training import loop\n"
        "plain = loop.train_one_step\n"
        "loop.train_one_step = lambda *arguments: (time.sleep(1.0), plain(*arguments))[1]\n"
        "cli.run()\n"
    )
    command = [sys.executable, "-c", program, "train", str(config)]
    processes = [
        subprocess.Popen(command, cwd=tiny.ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    ends = sorted((process.communicate(timeout=180)[1], process.returncode) for process in processes)
    assert sorted(code for _, code in ends) == [0, 2], ends
    [error] = [error for error, code in ends if code == 2]
    assert (
        "expected a folder that no other run writes to, found it in use by process " in error.splitlines()[-1]
        and "Traceback" not in error
    )
    assert (tmp_path / "run/train_results.json").exists() and not (tmp_path / "run" / CLAIM).exists()
