"""Listening sockets of a training."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.manipulated_runs import write_config
from tests.support import tiny
from tests.support.fault_matrix import Figures, row

pytestmark = pytest.mark.fault


# ---- S6: sockets ----

LISTEN = "0A"


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def listening(pids: Sequence[int]) -> set[tuple[str, str]]:
    """(process name, address) of every TCP socket on which one of `pids` listens, from /proc as `ss -ltnp` does."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN:
                raw = bytes.fromhex(words[1].split(":")[0])
                packed = b"".join(
                    raw[start : start + 4][::-1] for start in range(0, len(raw), 4)
                )  # little-endian words
                addresses[f"socket:[{words[9]}]"] = socket.inet_ntop(
                    socket.AF_INET if table == "tcp" else socket.AF_INET6, packed
                )
    found = set()
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {(name, addresses[link]) for link in links if link in addresses}
    return found


def sockets_of_a_run(
    folder: Path, command: list[str], prefix: Sequence[str] = ()
) -> tuple[set[tuple[str, str]], int, str]:
    """All listening sockets of a run's processes, its exit code, its output."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "SLURM_"))}
    output = folder / f"output-{time.monotonic_ns()}.txt"
    with open(output, "w") as stream:
        process = subprocess.Popen(
            [*prefix, *command],
            cwd=folder,
            env=variables
            | {"NPROC": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    found: set[tuple[str, str]] = set()
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        found |= listening(tree_of(process.pid))
        time.sleep(0.1)
    for pid in tree_of(process.pid) if process.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    return found, process.wait(), output.read_text()


def outer_host_name(folder: Path) -> list[str]:
    """A command prefix with which the host name resolves to an outer address; [] where namespaces are not allowed."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address to send from
        address = probe.getsockname()[0]
    except OSError:
        return []
    finally:
        probe.close()
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{address} elsewhere\n")
    script = f"mount --bind '{hosts}' /etc/hosts && hostname elsewhere && exec \"$@\""
    user = ["--user", "--map-root-user"] if os.geteuid() else []
    prefix = ["unshare", *user, "--uts", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        return []
    return prefix


@row(
    "S6",
    "listening sockets of a training on 2 processes of one machine, whose host name resolves to an outer address",
    "with ./torchrun.sh all at 127.0.0.1; with `torchrun --standalone` those of the workers, while torchrun's own two "
    "are at all addresses",
)
def test_S6_sockets_listen_on_loopback_alone(tmp_path: Path) -> Figures:
    figures = Figures()
    config = write_config(tmp_path, max_epochs=6)
    prefix = outer_host_name(tmp_path)
    figures.notes.append(f"the host name {'resolves to an outer address' if prefix else 'could not be changed'}")
    safe = [str(tiny.ROOT / "torchrun.sh"), str(config)]
    plain = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    plain += [str(tiny.ROOT / "train.py"), str(config), "--model_path", str(tmp_path / "plain")]
    for name, command in (("./torchrun.sh", safe), ("torchrun --standalone", plain)):
        found, code, text = sockets_of_a_run(tmp_path, command, prefix)
        figures.count(code == 0, f"{name}: exit code {code}: {text[-2000:]}")
        figures.count(bool(found), f"{name}: no listening socket was seen")
        for process, address in sorted(found):
            ours = name == "./torchrun.sh" or process != "pt_elastic"
            if ours:
                figures.count(address in ("127.0.0.1", "::1"), f"{name}: {process} listens on {address}")
        figures.notes.append(f"{name}: {', '.join(f'{process} on {address}' for process, address in sorted(found))}")
    return figures
