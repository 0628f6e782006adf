"""Which process this is: its rank, its device, its CPU threads. Needs no process group."""

import logging
import os
from dataclasses import dataclass

import torch

from mmbert_core.runtime import forks
from mmbert_core.runtime.errors import InputError

logger = logging.getLogger(__name__)

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WARN_THREADS_PER_CORE = 16  # above: a warning
MAX_THREADS_PER_CORE = 32  # above: an error, because the run would seem to hang and hardly react to a signal


@dataclass(frozen=True)
class DistContext:
    """This process's ranks, the numbers of processes, and the device that it computes on."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_context() -> DistContext:
    """Read torchrun's environment variables; without torchrun, the context of a single process.

    Either every process of a node has a GPU of its own, or all of them compute on the CPU.
    Raises `InputError` when only some of torchrun's variables are set, or are not numbers: a wrong guess would make
    the other ranks wait forever.
    """
    found = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if "RANK" not in found and "WORLD_SIZE" not in found:
        rank, local_rank, world_size, local_world_size = 0, 0, 1, 1
    else:
        if missing := sorted(set(TORCHRUN_VARIABLES) - set(found)):
            raise InputError(
                f"environment: expected torchrun's variables or none of them, "
                f"found {', '.join(found)} without {', '.join(missing)}"
            )
        try:
            rank, local_rank, world_size, local_world_size = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:4])
        except ValueError as error:
            names = ", ".join(TORCHRUN_VARIABLES[:4])
            raise InputError(f"environment: expected numbers in {names} ({error})") from None
    on_cuda = 0 < local_world_size <= torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    return DistContext(rank, local_rank, world_size, local_world_size, device)


def restart_count() -> int:
    """How often torchrun has restarted the processes of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def set_threads(num_threads: int | str, context: DistContext) -> int:
    """Set the number of PyTorch's CPU threads and return it; `auto` divides the cores by the processes of the node.

    Set explicitly because the number of threads changes the last bits of results. A forked process gets one thread:
    PyTorch would wait for its parent's threads, which do not exist in the child.
    Raises `InputError` for more than MAX_THREADS_PER_CORE threads per core.
    """
    processes = context.local_world_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // processes) if num_threads == "auto" else int(num_threads)
    if forks.is_forked() and threads > 1:
        if num_threads != "auto":
            logger.warning(
                "num_threads %d: a forked process computes with 1 thread; start it with spawn for more", threads
            )
        threads = 1
    if threads > cores and threads * processes > MAX_THREADS_PER_CORE * cores:
        highest = max(cores, MAX_THREADS_PER_CORE * cores // processes)
        sharing = "1 process shares" if processes == 1 else f"{processes} processes share"
        raise InputError(
            f"num_threads: expected at most {highest} ({sharing} {cores} cores here), "
            f"found {threads}: auto is one thread a core"
        )
    if threads * processes > WARN_THREADS_PER_CORE * cores:
        sharing = f"{threads} threads in each of {processes} processes share {cores} cores"
        logger.warning("num_threads: %s, which is much slower than one thread a core", sharing)
    torch.set_num_threads(threads)
    return threads
