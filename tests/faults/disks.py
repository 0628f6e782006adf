"""Small disks to fill: a tmpfs in a mount namespace of its own, so that nothing of it is left behind, whatever happens."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """`place` is the path for processes started with the words of `prefix`; this process sees the same folder as `seen`."""

    place: Path
    seen: Path
    prefix: tuple[str, ...]

    def fill(self, *, left: int = 0) -> None:
        """Another user takes all but `left` bytes."""
        with open(self.seen / "of-another-user", "ab") as stream:
            while (free := shutil.disk_usage(self.seen).free - left) > 0:
                stream.write(bytes(min(free, 2**20)))
                stream.flush()

    def run(self, *words: str) -> None:
        """A command among those who see the disk, such as one that changes the mount."""
        done = subprocess.run([*self.prefix, *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Disk]:
    """An empty disk of that size at `place`. Skips the test where namespaces are not allowed."""
    if missing := [name for name in ("unshare", "nsenter", "mount") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: no mount namespaces")
    place.mkdir(parents=True)
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    script = 'mount -t tmpfs -o size="$1"k,mode=0755 tmpfs "$0" && echo mounted && exec cat'
    # `cat` ends when the test's process does, however that ends, and the disk with it
    holder = subprocess.Popen(
        ["unshare", *user, "--mount", "sh", "-c", script, str(place), str(kilobytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"mount namespaces are not allowed here: {holder.stderr.read().strip()}")
        credentials = ("--user", "--preserve-credentials") if user else ()
        yield Disk(
            place,
            Path(f"/proc/{holder.pid}/root") / place.relative_to("/"),
            ("nsenter", "-t", str(holder.pid), *credentials, "--mount"),
        )
    finally:
        holder.kill()
        holder.communicate()
