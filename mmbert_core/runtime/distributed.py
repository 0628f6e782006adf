"""Collectives: what all ranks do together, in the same order.

Every helper is an identity in a single process, so callers have one path. "Collective" in a docstring means that
every rank must reach the call.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmbert_core.runtime.errors import InputError, PeerError

T = TypeVar("T")
BACKEND_WORDS = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Timed out|pair closure|Broken pipe|[Ss]ocket|TCPStore", re.IGNORECASE
)
ITEMS_PER_ROUND = 64  # items, such as the results of batches, that a rank pickles at a time: bounds the memory
_object_group: Any = None  # gloo group for Python objects and CPU tensors; the default group itself on the CPU
_long_timeout_group: Any = None  # gloo group for work of rank 0 whose duration depends on the data


def use_groups(object_group: Any, long_timeout_group: Any) -> None:
    """Set the groups that the collectives below use; None, None when the process group has ended."""
    global _object_group, _long_timeout_group
    _object_group, _long_timeout_group = object_group, long_timeout_group


def has_groups() -> bool:
    """Whether the collectives below have groups: between the start and the end of `workers.process_group`."""
    return _object_group is not None


@contextmanager
def as_peer_error() -> Iterator[None]:
    """Turn a backend's error about a rank that is gone or stalls into a `PeerError`: that rank reports the cause."""
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:  # torch's DistError is one
        is_of_backend = isinstance(error, dist.DistError) or BACKEND_WORDS.search(str(error))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_of_backend:
            raise PeerError(f"lost contact with another rank ({str(error).splitlines()[0][:200]})") from error
        raise


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Collective."""
    if is_distributed():
        with as_peer_error():
            dist.barrier(group=_object_group)


# ---- objects, numbers, tensors ----


def broadcast_object(value: T, *, source: int = 0, long_timeout: bool = False) -> T:
    """Collective. Returns rank `source`'s `value`, a small Python object, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    with as_peer_error():
        dist.broadcast_object_list(box, src=source, group=_long_timeout_group if long_timeout else _object_group)
    return box[0]


def all_gather_objects(items: Sequence[T], *, per_round: int = ITEMS_PER_ROUND) -> list[list[T]]:
    """Collective. Returns every rank's list of items, by rank; the lists may differ in length.

    Calls `torch.distributed.all_gather_object` on a CPU group in rounds, each of at most `per_round` items of a rank.
    Pass numpy arrays, never tensors: a pickled CUDA tensor opens a context on its own device.
    """
    if not is_distributed():
        return [list(items)]
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    for start in range(0, max(_all_gather(len(items))), per_round):
        for all_items, round_items in zip(gathered, _all_gather(list(items[start : start + per_round])), strict=True):
            all_items.extend(round_items)
    return gathered


def gather_objects(items: Sequence[T], *, per_round: int = ITEMS_PER_ROUND) -> list[list[T]] | None:
    """Collective. As `all_gather_objects`, on rank 0 alone: None on the others, which need no memory for the items."""
    if not is_distributed():
        return [list(items)]
    is_main = dist.get_rank() == 0
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    for start in range(0, max(_all_gather(len(items))), per_round):
        of_ranks: list[Any] | None = [None] * dist.get_world_size() if is_main else None
        with as_peer_error():
            dist.gather_object(list(items[start : start + per_round]), of_ranks, dst=0, group=_object_group)
        for all_items, round_items in zip(gathered, of_ranks or (), strict=is_main):
            all_items.extend(round_items)
    return gathered if is_main else None


def _all_gather(value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    with as_peer_error():
        dist.all_gather_object(values, value, group=_object_group)
    return values


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Collective. Sums of a few numbers over all ranks, in float64 on the CPU."""
    if not is_distributed():
        return list(map(float, values))
    tensor = torch.tensor(values, dtype=torch.float64)
    with as_peer_error():
        dist.all_reduce(tensor, group=_object_group)
    return tensor.tolist()


def broadcast_tensors(tensors: dict[str, torch.Tensor] | None, *, source: int = 0) -> dict[str, torch.Tensor]:
    """Collective. Returns rank `source`'s CPU tensors on every rank, so that other nodes need not read its disk."""
    shapes = broadcast_object({name: (tuple(t.shape), t.dtype) for name, t in (tensors or {}).items()}, source=source)
    if not is_distributed():
        return dict(tensors or {})
    is_source = dist.get_rank() == source
    result = {}
    for name, (shape, dtype) in shapes.items():
        result[name] = tensors[name].contiguous() if is_source and tensors else torch.empty(shape, dtype=dtype)
        with as_peer_error():
            dist.broadcast(result[name], src=source, group=_object_group)
    return result


class AsyncFlag:
    """Whether any rank has set a flag: an asynchronous all-reduce, read DELAY calls later so that no rank waits."""

    DELAY = 2

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, Any]] = []

    def any_rank(self, flag: bool) -> bool:
        """Collective. Whether any rank's `flag` was true DELAY calls ago, the same on all ranks.

        False in the first DELAY calls. In a single process: `flag` itself.
        """
        if not is_distributed():
            return flag
        tensor = torch.tensor([float(flag)])
        with as_peer_error():
            self._pending.append((tensor, dist.all_reduce(tensor, group=_object_group, async_op=True)))
        return self._read_oldest() if len(self._pending) > self.DELAY else False

    def _read_oldest(self) -> bool:
        tensor, work = self._pending.pop(0)
        with as_peer_error():
            work.wait()
        return bool(tensor)

    def close(self) -> None:
        """Collective. Wait for the reductions that are still running."""
        while self._pending:
            self._read_oldest()


# ---- a failure of one rank is a failure of all ----


def on_main(action: Callable[[], T], *, share: bool = True, long_timeout: bool = False) -> T:
    """Collective. Rank 0 runs `action`; all ranks get its result, or all raise when it fails. See `on_rank`."""
    return on_rank(0, action, share=share, long_timeout=long_timeout)


def on_rank(source: int, action: Callable[[], T], *, share: bool = True, long_timeout: bool = False) -> T:
    """Collective. Rank `source` runs `action`; all ranks get its result. When it fails, the other ranks raise too.

    An `InputError` is raised as such on all ranks; any other failure is a `PeerError` on the others. `share=False`: the
    result is not sent, and the other ranks get None. `long_timeout`: for an action that may take longer than the
    group's timeout.
    """
    if not is_distributed():
        return action()
    value, failure = _attempt(action) if dist.get_rank() == source else (None, None)
    message = (value if share else None, _report(failure))
    shared, report = broadcast_object(message, source=source, long_timeout=long_timeout)
    _raise_failure(source, failure, report)
    return shared if share else value  # type: ignore[return-value]


def on_all(action: Callable[[], T]) -> list[T]:
    """Collective. Every rank runs `action`, which must not call collectives; all ranks get all results, by rank.

    When `action` fails on some ranks, all ranks raise the failure of the first of them.
    """
    if not is_distributed():
        return [action()]
    value, failure = _attempt(action)
    outcomes = _all_gather((value, _report(failure)))
    for rank, (_, report) in enumerate(outcomes):
        _raise_failure(rank, failure, report)
    return [value for value, _ in outcomes]  # type: ignore[misc]


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - any failure must reach the ranks that wait
        return None, error


def _report(failure: Exception | None) -> tuple[bool, str] | None:
    """What is sent to the other ranks about a failure: whether it is an `InputError`, and its message."""
    if failure is None:
        return None
    return (True, str(failure)) if isinstance(failure, InputError) else (False, f"{type(failure).__name__}: {failure}")


def _raise_failure(rank: int, own: Exception | None, report: tuple[bool, str] | None) -> None:
    """Raise the failure of `rank`, if any: on that rank its own exception, on others one with its message."""
    if report is None:
        return
    if rank == dist.get_rank() and own is not None:
        raise own
    is_input_error, message = report
    raise InputError(message) if is_input_error else PeerError(f"rank {rank}: {message}")
