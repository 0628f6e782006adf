"""Ranks, device, process groups and collectives.distributed`.

Every helper is an identity in a single process, so callers have one path. "Collective" in a docstring means that
every rank must reach the call, in the same order.
"""

import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401 - wraps the main function of a worker
from torch.nn.parallel import DistributedDataParallel

from mmbert_core.runtime import forks
from mmbert_core.runtime.errors import InputError, PeerError

logger = logging.getLogger(__name__)

T = TypeVar("T")
CROWDED = 16  # threads on a core, from which on a run is told that it waits for itself
MAX_THREADS_PER_CORE = 32  # beyond it a run does little but wait, and hardly hears a signal
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_SECONDS = 600.0  # that a rank waits for the others in a collective
PATIENCE_SECONDS = (
    6 * 3600.0
)  # and for work that is rank 0's alone, whose length depends on the data; a rank that dies is heard of at once
BACKEND_WORDS = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Timed out|pair closure|Broken pipe|[Ss]ocket|TCPStore", re.IGNORECASE
)
ITEMS_PER_ROUND = 64  # lists of batch results: 64 batches of at most 256 rows bound what one round pickles
_object_group: Any = None  # gloo group for Python objects and CPU tensors; the default group itself on the CPU
_patient_group: Any = None  # gloo group whose ranks wait for PATIENCE_SECONDS


@dataclass(frozen=True)
class DistContext:
    """Who this process is. `device` is this rank's own."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_context() -> DistContext:
    """This process's place as torchrun's environment tells it; without torchrun, a single process.

    Every process of a node has a GPU of its own, or all of them compute on the CPU.

    Raises `InputError` when only some of torchrun's variables are set, or are no numbers: guessing would hang the other ranks.
    """
    found = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if "RANK" in found or "WORLD_SIZE" in found:
        if missing := sorted(set(TORCHRUN_VARIABLES) - set(found)):
            raise InputError(
                f"environment: expected torchrun's variables or none of them, found {', '.join(found)} without {', '.join(missing)}"
            )
        try:
            rank, local_rank, world_size, local_world_size = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:4])
        except ValueError as error:
            raise InputError(
                f"environment: expected numbers in {', '.join(TORCHRUN_VARIABLES[:4])} ({error})"
            ) from None
    else:
        rank, local_rank, world_size, local_world_size = 0, 0, 1, 1
    device = (
        torch.device("cuda", local_rank) if 0 < local_world_size <= torch.cuda.device_count() else torch.device("cpu")
    )
    return DistContext(rank, local_rank, world_size, local_world_size, device)


def restart_count() -> int:
    """How often torchrun has started the processes of this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def set_threads(num_threads: int | str, context: DistContext) -> int:
    """Set PyTorch's CPU threads explicitly, because their number changes bits; `auto` shares the cores of the node.

    A forked process has one: PyTorch would wait for those of its parent, which are not there.
    Raises InputError for so many threads a core that a run would seem to hang.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // context.local_world_size) if num_threads == "auto" else int(num_threads)
    if forks.is_forked() and threads > 1:
        if num_threads != "auto":
            logger.warning(
                "num_threads %d: a forked process computes with 1 thread; start it with spawn for more", threads
            )
        threads = 1
    if threads > cores and threads * context.local_world_size > MAX_THREADS_PER_CORE * cores:
        highest = max(cores, MAX_THREADS_PER_CORE * cores // context.local_world_size)
        processes = (
            f"{context.local_world_size} {'process shares' if context.local_world_size == 1 else 'processes share'}"
        )
        raise InputError(
            f"num_threads: expected at most {highest} ({processes} {cores} cores here), found {threads}: auto is one thread a core"
        )
    if threads * context.local_world_size > CROWDED * cores:
        logger.warning(
            "num_threads: %d threads in each of %d processes share %d cores, which is much slower than one thread a core",
            threads,
            context.local_world_size,
            cores,
        )
    torch.set_num_threads(threads)
    return threads


@contextmanager
def process_group(
    context: DistContext, timeout_seconds: float = TIMEOUT_SECONDS, *, abort_on_error: bool = False
) -> Iterator[DistContext]:
    """Collective. NCCL on CUDA, gloo on the CPU, and always a gloo group for objects; nothing in a single process.

    A rank that waits longer than `timeout_seconds` for the others fails. Inside another `process_group` that one is
    used; a default group that the calling script has initialised is used and kept. On an error the group is left as
    it is: destroying it may wait for ranks that are gone, and `leave` ends the process without that.
    `abort_on_error`: the process continues after an error, so the group is ended without waiting for other ranks.
    """
    global _object_group, _patient_group
    timeout = timedelta(seconds=timeout_seconds)
    if context.world_size == 1 or _object_group is not None:
        yield context
        return
    is_own = not dist.is_initialized()
    on_cuda = context.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(context.device)  # before any collective: object collectives use the current device
    with lost_peers():
        if is_own:
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                store=_store_of_this_start(context, timeout),
                rank=context.rank,
                world_size=context.world_size,
                timeout=timeout,
                device_id=context.device if on_cuda else None,
            )
        needs_gloo = on_cuda or not is_own
        _object_group = dist.new_group(backend="gloo", timeout=timeout) if needs_gloo else dist.group.WORLD
        _patient_group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=max(timeout_seconds, PATIENCE_SECONDS))
        )
    try:
        yield context
    except BaseException:
        if abort_on_error:
            _object_group = _patient_group = None
            if is_own:
                _abort(on_cuda=on_cuda)
        raise
    barrier()
    if is_own:
        dist.destroy_process_group()
    _object_group = _patient_group = None


def _abort(*, on_cuda: bool) -> None:
    """End the default group and all others, without waiting for ranks that may be gone."""
    with suppress(RuntimeError, ValueError):
        # gloo does not wait for other ranks when it is destroyed; NCCL does, for kernels that never end
        dist.distributed_c10d._abort_process_group() if on_cuda else dist.destroy_process_group()


def _store_of_this_start(context: DistContext, timeout: timedelta) -> dist.Store:
    """Collective. torchrun's key-value store behind a prefix that only the processes of this start share.

    torchrun 2.13 gives the processes that it starts anew the store of their predecessors, where gloo finds the addresses
    of the dead. The restart count cannot tell them apart: nodes whose workers did not fail do not count. So rank 0 shows
    a fresh token, each rank answers with it and a fresh word of its own, and goes on when rank 0 has repeated that word.
    """
    store = _loopback_store(context, timeout)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def wait_for(is_done: Callable[[], bool], who: Callable[[], str]) -> None:
        while not is_done():
            if time.monotonic() > deadline:
                raise PeerError(f"waited {timeout.total_seconds():.0f} s for {who()} to start (timeout_seconds)")
            time.sleep(0.02)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if context.is_main:
        answers: dict[int, str] = {}

        def all_have_answered() -> bool:
            for rank in set(range(1, context.world_size)) - set(answers):
                token, _, answer = read(f"mmbert/answer/{rank}").partition(" ")
                if token == word:
                    answers[rank] = answer
            return len(answers) == context.world_size - 1

        store.set("mmbert/token", word)
        wait_for(all_have_answered, lambda: f"rank {min(set(range(1, context.world_size)) - set(answers))}")
        store.set(f"mmbert/go/{word}", " ".join(answers.values()))
        return dist.PrefixStore(word, store)
    shown = ""

    def is_welcome() -> bool:
        nonlocal shown
        token = read("mmbert/token")
        if token != shown:
            shown = token
            store.set(f"mmbert/answer/{context.rank}", f"{token} {word}")
        return word in read(f"mmbert/go/{token}").split()

    wait_for(is_welcome, lambda: "rank 0")
    return dist.PrefixStore(shown, store)


def _loopback_store(context: DistContext, timeout: timedelta) -> dist.Store | None:
    """Collective. On one node nobody outside needs to reach a rank: gloo, NCCL and the store where ranks meet listen on loopback.

    None where another store is in use: that of several nodes, or torchrun's own, which listens at all addresses
    (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` in torchrun's environment, as torchrun.sh sets it, leaves it out).
    """
    if context.world_size != context.local_world_size:
        return None
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:  # else they listen at the address that the machine's own name leads to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    listener = socket.create_server(("127.0.0.1", port)).detach() if context.is_main else None
    return dist.TCPStore("127.0.0.1", port, context.world_size, context.is_main, timeout, master_listen_fd=listener)


@contextmanager
def lost_peers() -> Iterator[None]:
    """What a backend raises when a rank is gone or stalls becomes a `PeerError`: that rank, or its launcher, tells why."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        if (
            int(os.environ.get("WORLD_SIZE", "1")) > 1
            and not isinstance(error, PeerError)
            and (isinstance(error, dist.DistError) or BACKEND_WORDS.search(str(error)))
        ):
            raise PeerError(f"lost contact with another rank ({str(error).splitlines()[0][:200]})") from error
        raise


def leave(exit_code: int) -> NoReturn:
    """End this process at once, when all that it wrote is closed.

    The interpreter's own end takes a second for the objects of torch and transformers, and what is left of a process group
    may wait there for ranks that are gone, or abort.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # `main` has told of a full disk
            stream.flush()
    os._exit(exit_code)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Collective."""
    if is_distributed():
        with lost_peers():
            dist.barrier(group=_object_group)


def broadcast_object(value: T, *, source: int = 0, long_timeout: bool = False) -> T:
    """Collective. The small Python object of rank `source` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    with lost_peers():
        dist.broadcast_object_list(box, src=source, group=_patient_group if long_timeout else _object_group)
    return box[0]


def all_gather_objects(items: Sequence[T], *, per_round: int = ITEMS_PER_ROUND) -> list[list[T]]:
    """Collective. Every rank's list of items, by rank; the lists may differ in length.

    Goes through `torch.distributed.all_gather_object` on a CPU group in rounds of `per_round` items, so that no round
    pickles more than that. Put numpy arrays in, never tensors: a pickled CUDA tensor opens a context on its own device.
    """
    if not is_distributed():
        return [list(items)]
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    for start in range(0, max(_all_gather(len(items))), per_round):
        for whole, part in zip(gathered, _all_gather(list(items[start : start + per_round]))):
            whole.extend(part)
    return gathered


def _all_gather(value: T) -> list[T]:
    parts: list[Any] = [None] * dist.get_world_size()
    with lost_peers():
        dist.all_gather_object(parts, value, group=_object_group)
    return parts


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Collective. Sums of a few numbers over all ranks, in float64 on the CPU."""
    if not is_distributed():
        return list(map(float, values))
    tensor = torch.tensor(values, dtype=torch.float64)
    with lost_peers():
        dist.all_reduce(tensor, group=_object_group)
    return tensor.tolist()


class Poll:
    """Whether any rank has raised a flag, without making ranks wait for each other: an answer is two questions old."""

    DELAY = 2

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, Any]] = []

    def ask(self, flag: bool) -> bool:
        """Collective. True on all ranks at the same question, some questions after a rank's first True; at once in a single process."""
        if not is_distributed():
            return flag
        tensor = torch.tensor([float(flag)])
        with lost_peers():
            self._pending.append((tensor, dist.all_reduce(tensor, group=_object_group, async_op=True)))
        return self._oldest() if len(self._pending) > self.DELAY else False

    def _oldest(self) -> bool:
        tensor, work = self._pending.pop(0)
        with lost_peers():
            work.wait()
        return bool(tensor)

    def close(self) -> None:
        """Collective. Wait for the questions that are under way."""
        while self._pending:
            self._oldest()


def broadcast_tensors(tensors: dict[str, torch.Tensor] | None, *, source: int = 0) -> dict[str, torch.Tensor]:
    """Collective. CPU tensors of rank `source` on every rank, so that other nodes need not read its disk."""
    shapes = broadcast_object({name: (tuple(t.shape), t.dtype) for name, t in (tensors or {}).items()}, source=source)
    if not is_distributed():
        return dict(tensors or {})
    result = {}
    for name, (shape, dtype) in shapes.items():
        result[name] = (
            tensors[name].contiguous() if dist.get_rank() == source and tensors else torch.empty(shape, dtype=dtype)
        )
        with lost_peers():
            dist.broadcast(result[name], src=source, group=_object_group)
    return result


def on_main(action: Callable[[], T], *, long_timeout: bool = False) -> T:
    """Collective. Rank 0 runs `action`; all ranks get its result, or all raise when it fails."""
    return on_rank(0, action, long_timeout=long_timeout)


def on_rank(source: int, action: Callable[[], T], *, long_timeout: bool = False) -> T:
    """Collective. Rank `source` runs `action`; all ranks get its result. When it fails the others raise what it says.

    An `InputError` is one on all ranks; of any other failure the others hear as a `PeerError`. `long_timeout`: it may take longer than the group's timeout.
    """
    if not is_distributed():
        return action()
    value, failure = _attempt(action) if dist.get_rank() == source else (None, None)
    value, report = broadcast_object((value, _report(failure)), source=source, long_timeout=long_timeout)
    _raise_failure(source, failure, report)
    return value  # type: ignore[return-value]


def on_all(action: Callable[[], T]) -> list[T]:
    """Collective. Every rank runs `action`, which holds no collective; all get all results by rank, or all raise the first failure."""
    if not is_distributed():
        return [action()]
    value, failure = _attempt(action)
    answers = _all_gather((value, _report(failure)))
    for rank, (_, report) in enumerate(answers):
        _raise_failure(rank, failure, report)
    return [value for value, _ in answers]  # type: ignore[misc]


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - any failure must reach the ranks that wait
        return None, error


def _report(failure: Exception | None) -> tuple[bool, str] | None:
    """What other ranks hear of a failure: whether it is an `InputError`, and its message."""
    if failure is None:
        return None
    return (True, str(failure)) if isinstance(failure, InputError) else (False, f"{type(failure).__name__}: {failure}")


def _raise_failure(rank: int, own: Exception | None, report: tuple[bool, str] | None) -> None:
    """Raise the failure of `rank`: there as it was, elsewhere as what that rank reported."""
    if report is None:
        return
    if rank == dist.get_rank() and own is not None:
        raise own
    is_input_error, message = report
    raise InputError(message) if is_input_error else PeerError(f"rank {rank}: {message}")


@dataclass
class UsedRows:
    """Which rows of an embedding a step looks up, on all ranks together; the others have a gradient of zero everywhere."""

    weight: nn.Parameter  # [V, H]
    rows: torch.Tensor | None = None  # [U] int64, alike on all ranks; none: all rows


def wrap_ddp(model: nn.Module, context: DistContext, used: UsedRows | None = None) -> nn.Module:
    """Collective. The module behind DDP, or itself in a single process. Parameters become rank 0's.

    Buffers are constants here (column statistics), so DDP need not broadcast them at every forward. Without device_ids
    it leaves inputs where they are: texts are packed on the CPU. Evaluate and save the unwrapped module: DDP's forward is a collective.
    With `used`, which the caller keeps up to date, the ranks sum no more of that embedding's gradient than its used rows:
    the vocabulary is half of a small BERT, the last part of a backward pass, and a step looks up a few hundred tokens of it.
    """
    if not is_distributed():
        return model
    # torch 2.13 renamed the flag
    flag = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        else "broadcast_buffers"
    )
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})
    if used is not None:
        ddp_model.register_comm_hook(used, _average_used_rows)
    return ddp_model


def _average_used_rows(used: UsedRows, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: mean over the ranks of a bucket of gradients, in which the used rows stand for their embedding."""
    buffer, gradients = bucket.buffer(), bucket.gradients()
    place = next((index for index, parameter in enumerate(bucket.parameters()) if parameter is used.weight), None)
    if place is None or used.rows is None:
        return allreduce_hook(None, bucket)
    rows = used.rows
    parts = [gradient.index_select(0, rows) if index == place else gradient for index, gradient in enumerate(gradients)]
    flat = torch.cat([part.flatten() for part in parts]).div_(dist.get_world_size())

    def write_back(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        [mean] = done.value()
        for index, (gradient, part) in enumerate(
            zip(gradients, mean.split([part.numel() for part in parts]), strict=True)
        ):
            gradient.index_copy_(0, rows, part.view(len(rows), -1)) if index == place else gradient.copy_(
                part.view_as(gradient)
            )
        return buffer

    return dist.all_reduce(flat, async_op=True).get_future().then(write_back)


def no_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager:
    """Gradients of this backward stay on the rank when `enabled`; the rank's last micro-batch synchronises."""
    return model.no_sync() if enabled and isinstance(model, DistributedDataParallel) else nullcontext()


def wait_for_local_main(seconds: float = 15.0) -> None:
    """Let local rank 0 print the one error line; torchrun ends this process as soon as that one has left.

    When it has not, the error is this rank's alone.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(seconds)
