"""Small disks to fill: a tmpfs in a mount namespace of its own, which vanishes with its holder process."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.injected_faults import fill_disk


@dataclass(frozen=True)
class Disk:
    """`path` is for processes whose command starts with `prefix`; this process has the same folder at `host_path`."""

    path: Path
    host_path: Path
    prefix: tuple[str, ...]

    def fill(self, *, left: int = 0) -> None:
        """Fill the disk up to `left` bytes, as another user would."""
        fill_disk(self.host_path, left)

    def run(self, *words: str) -> None:
        """Run a command inside the mount namespace, such as one that changes the mount."""
        done = subprocess.run([*self.prefix, *words], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Disk]:
    """An empty disk of that size at `path`. Skips the test where namespaces are not allowed."""
    if missing := [name for name in ("unshare", "nsenter", "mount") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: no mount namespaces")
    path.mkdir(parents=True)
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    script = 'mount -t tmpfs -o size="$1"k,mode=0755 tmpfs "$0" && echo mounted && exec cat'
    # `cat` ends with the test's process, because its stdin is then closed, and the disk ends with it
    holder = subprocess.Popen(
        ["unshare", *user, "--mount", "sh", "-c", script, str(path), str(kilobytes)],
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
            path,
            Path(f"/proc/{holder.pid}/root") / path.relative_to("/"),
            ("nsenter", "-t", str(holder.pid), *credentials, "--mount"),
        )
    finally:
        holder.kill()
        holder.communicate()
