"""How much memory this process has used, and how much the machine has left."""

import re
import resource
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Let `peak_mb` measure resident memory from here on; only on Linux, elsewhere the peak is the process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_mb(device: torch.device | None = None) -> float:
    """Peak memory of this process in MiB: allocated on `device` if that is a GPU, else resident since `reset_peak`."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10  # type: ignore[index]
    except (OSError, TypeError):  # not Linux; ru_maxrss is in bytes on macOS, else in KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def available_bytes() -> int:
    """Bytes that can be used without swapping (MemAvailable); 0 where the system does not report them."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0
