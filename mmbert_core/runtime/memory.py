"""How much memory this process has used, and how much the machine has left."""

import re
import resource
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start a new peak for `peak_mb`, where Linux allows it; elsewhere the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_mb(device: torch.device | None = None) -> float:
    """The most MiB that this process has held: on `device` when that is a GPU, else resident, since `reset_peak`."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10  # type: ignore[index]
    except (OSError, TypeError):  # no Linux: bytes on macOS, else KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def available_bytes() -> int:
    """Memory that can be used without swapping (MemAvailable); 0 where the system does not report it."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0
