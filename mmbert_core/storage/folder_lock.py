"""One run per folder: a file lock or, on a file system without locks, a claim file with a heartbeat.

Without locks (some network and user-space file systems) the claim is the file `run.claim`. Its first line names
process, machine and a random token; its second line is a counter that grows every few seconds. The clocks of machines
are never compared: a process that finds a claim watches whether the counter grows.
"""

import logging
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.storage.file_lock import lock_file
from mmbert_core.storage.files import LOCK, TEMPORARY_PREFIX

logger = logging.getLogger(__name__)

CLAIM = "run.claim"
SECONDS_BETWEEN_BEATS = 2.0
SECONDS_WITHOUT_A_BEAT = 12.0  # after which the process that wrote a claim counts as ended
HOLDER = re.compile(r"process ([0-9]{1,9}) on ([^\s]{1,255}) ([0-9a-f]{32})\n")


class Claim:
    """This process's right to be the only run that writes to a folder, until `release`. From `claim_folder`."""

    def __init__(self, folder: Path, lock: TextIO | None) -> None:
        self._folder, self._lock = Path(folder), lock
        self._path = self._folder / CLAIM
        self._line = f"process {os.getpid()} on {socket.gethostname() or '-'} {uuid.uuid4().hex}\n"
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def take_without_locks(self) -> None:
        """Create the claim file and start its heartbeat. Raises `InputError` when another process has done so."""
        while not self._create():
            found = _read(self._path)
            if not found and not self._path.exists():
                continue  # released in the meantime
            if not _is_stale(self._path, found):
                raise in_use(self._folder, _holder(_read(self._path) or found))
            self._remove_stale(found)
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `RunError` when another process has taken the folder, as after a long pause of the heartbeat."""
        if self._lock is not None or not self._folder.is_dir():
            return
        found = _read(self._path)
        if not found:
            self._create()  # the claim file was removed, but not the folder
        elif not found.startswith(self._line):
            holder = _holder(found)
            raise RunError(
                f"{self._folder}: another run writes to this folder now ({holder}): "
                f"choose another model_path for one of them"
            )

    def release(self) -> None:
        """End the claim, so that another run can write to the folder."""
        self._released.set()
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
        if self._thread is not None:
            self._thread.join()
            if _read(self._path).startswith(self._line):
                self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the claim file. Returns False if there is one already."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(self._line + "0\n")
        return True

    def _remove_stale(self, found: str) -> None:
        """Remove the claim file of an ended process, whose content is `found`.

        Other processes may do the same at once: a claim that one of them has created in the meantime is put back.
        """
        moved = self._path.with_name(f"{TEMPORARY_PREFIX}{CLAIM}-{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(self._path, moved)
            if _read(moved) != found:
                with suppress(FileExistsError):
                    os.link(moved, self._path)
            moved.unlink(missing_ok=True)

    def _beat(self) -> None:
        """In a thread: increase the counter in the claim file while the file is this process's."""
        counter = 0
        while not self._released.wait(SECONDS_BETWEEN_BEATS):
            counter += 1
            with suppress(OSError):  # a disk that is full or unreachable for a moment, or a removed folder
                if not _read(self._path).startswith(self._line):
                    continue
                with open(self._path, "r+", encoding="utf-8") as stream:
                    stream.write(f"{self._line}{counter}\n")
                    stream.flush()
                    os.fsync(stream.fileno())


def claim_folder(folder: Path) -> Claim:
    """Claim `folder` for this process until `Claim.release` or the process's end. Creates the folder if necessary.

    Raises `InputError`, which names the other process, when another one has claimed it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    stream = open(Path(folder) / LOCK, "a+", encoding="utf-8")
    try:
        is_locked = lock_file(stream)
    except OSError as error:
        stream.close()
        claim = Claim(folder, None)
        claim.take_without_locks()
        message = "%s: this file system has no locks (%s); the file %s keeps other runs away"
        logger.warning(message, folder, error.strerror, CLAIM)
        return claim
    if not is_locked:
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        raise in_use(folder, holder)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return Claim(folder, stream)


def in_use(folder: Path, holder: str) -> InputError:
    return InputError(f"{folder}: expected a folder that no other run writes to, found it in use by {holder}")


def _read(path: Path) -> str:
    """The claim file's content, "" if there is none. Opened each time: a network file system then shows new writes."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1000)
    except OSError:
        return ""


def _holder(found: str) -> str:
    match = HOLDER.match(found)
    return f"process {match[1]} on {match[2]}" if match else "another process"


def _is_stale(path: Path, found: str) -> bool:
    """Whether the process of a claim has ended: from its id if it ran on this machine, else by watching its counter."""
    match = HOLDER.match(found)
    if match and match[2] == socket.gethostname():
        if int(match[1]) == os.getpid():  # that process has ended, and its id was reused for this one
            return True
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's process: it exists
    logger.info("%s: waiting to see whether %s, which claims this folder, is alive", path, _holder(found))
    deadline = time.monotonic() + SECONDS_WITHOUT_A_BEAT
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if _read(path) != found:
            return not _read(path)  # released
    return True
