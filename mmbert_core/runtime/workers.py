"""Start and end of the processes of a run: the process group, the store through which ranks connect, the exit."""

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: F401 - wraps the main function of a worker

from mmbert_core.runtime.distributed import as_peer_error, barrier, has_groups, use_groups
from mmbert_core.runtime.errors import PeerError
from mmbert_core.runtime.ranks import DistContext

TIMEOUT_SECONDS = 600.0  # that a rank waits for the others in a collective
# The same while rank 0 alone works, for a time that depends on the data; a rank that dies is noticed at once.
LONG_TIMEOUT_SECONDS = 6 * 3600.0
SECONDS_BETWEEN_READS = 0.02  # of the store, while the ranks wait for each other at the start


@contextmanager
def process_group(
    context: DistContext, timeout_seconds: float = TIMEOUT_SECONDS, *, abort_on_error: bool = False
) -> Iterator[DistContext]:
    """Collective. NCCL on CUDA, gloo on the CPU, and always a gloo group for objects; nothing in a single process.

    A rank that waits longer than `timeout_seconds` for the others fails. A nested `process_group` uses the outer one. A
    default group that the calling script has initialised is used and not destroyed. On an error the group is not
    destroyed: that may wait for ranks that are gone, and `leave` ends the process without it.
    `abort_on_error`: for a process that continues after an error; ends the group without waiting for other ranks.
    """
    if context.world_size == 1 or has_groups():
        yield context
        return
    is_own = not dist.is_initialized()
    _start_groups(context, timeout_seconds, is_own=is_own)
    try:
        yield context
    except BaseException:
        if abort_on_error:
            use_groups(None, None)
            if is_own:
                _abort(on_cuda=context.device.type == "cuda")
        raise
    barrier()
    if is_own:
        dist.destroy_process_group()
    use_groups(None, None)


def _start_groups(context: DistContext, timeout_seconds: float, *, is_own: bool) -> None:
    """Collective. Start the gloo groups for objects and, if `is_own`, the default group."""
    timeout, on_cuda = timedelta(seconds=timeout_seconds), context.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(context.device)  # before any collective: object collectives use the current device
    with as_peer_error():
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
        object_group = dist.new_group(backend="gloo", timeout=timeout) if needs_gloo else dist.group.WORLD
        long_timeout = timedelta(seconds=max(timeout_seconds, LONG_TIMEOUT_SECONDS))
        use_groups(object_group, dist.new_group(backend="gloo", timeout=long_timeout))


def _abort(*, on_cuda: bool) -> None:
    """End the default group and all others, without waiting for ranks that may be gone."""
    with suppress(RuntimeError, ValueError):
        # gloo does not wait for other ranks when it is destroyed; NCCL does, for kernels that never end
        dist.distributed_c10d._abort_process_group() if on_cuda else dist.destroy_process_group()


# ---- the store through which the ranks connect ----


def _store_of_this_start(context: DistContext, timeout: timedelta) -> dist.Store:
    """Collective. torchrun's key-value store behind a prefix that only the processes of this start share.

    torchrun 2.13 gives restarted processes the store of the ended ones, where gloo would find their old addresses. The
    restart count is no prefix for this: a node whose workers did not fail does not increase it. So:

    1. rank 0 writes a new token
    2. every other rank answers with that token and a new token of its own
    3. rank 0 repeats all these tokens; a rank that finds its own there uses rank 0's token as the prefix
    """
    store = _loopback_store(context, timeout)
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    own_token = uuid.uuid4().hex
    exchange_tokens = _collect_answers if context.is_main else _answer_rank_0
    return dist.PrefixStore(exchange_tokens(store, own_token, context, timeout.total_seconds()), store)


def _collect_answers(store: dist.Store, own_token: str, context: DistContext, seconds: float) -> str:
    """Rank 0 only. Wait for an answer of every other rank; returns rank 0's token."""
    answers: dict[int, str] = {}

    def missing() -> set[int]:
        return set(range(1, context.world_size)) - set(answers)

    def all_have_answered() -> bool:
        for rank in missing():
            token, _, answer = _read(store, f"mmbert/answer/{rank}").partition(" ")
            if token == own_token:
                answers[rank] = answer
        return not missing()

    store.set("mmbert/token", own_token)
    _wait_for(all_have_answered, lambda: f"rank {min(missing())}", seconds)
    store.set(f"mmbert/go/{own_token}", " ".join(answers.values()))
    return own_token


def _answer_rank_0(store: dist.Store, own_token: str, context: DistContext, seconds: float) -> str:
    """All ranks but 0. Answer rank 0's token until rank 0 confirms; returns the token.

    The token found first may be that of an earlier start: a new one is answered again.
    """
    answered = ""

    def is_confirmed() -> bool:
        nonlocal answered
        token = _read(store, "mmbert/token")
        if token != answered:
            answered = token
            store.set(f"mmbert/answer/{context.rank}", f"{token} {own_token}")
        return own_token in _read(store, f"mmbert/go/{token}").split()

    _wait_for(is_confirmed, lambda: "rank 0", seconds)
    return answered


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait_for(is_done: Callable[[], bool], who: Callable[[], str], seconds: float) -> None:
    """Wait until `is_done`. Raises `PeerError`, which names the rank `who` returns, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            raise PeerError(f"waited {seconds:.0f} s for {who()} to start (timeout_seconds)")
        time.sleep(SECONDS_BETWEEN_READS)


def _loopback_store(context: DistContext, timeout: timedelta) -> dist.Store | None:
    """Collective. A store on the loopback interface for a run on one node, so that no other machine can connect.

    gloo and NCCL listen there too. None where another store is in use: the one for several nodes, or torchrun's own,
    which listens at all addresses (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` in torchrun's environment, as torchrun.sh
    sets it, avoids that).
    """
    if context.world_size != context.local_world_size:
        return None
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:  # else they listen at the address of the machine's host name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={loopback}")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    listener = socket.create_server(("127.0.0.1", port)).detach() if context.is_main else None
    return dist.TCPStore("127.0.0.1", port, context.world_size, context.is_main, timeout, master_listen_fd=listener)


# ---- the exit ----


def leave(exit_code: int) -> NoReturn:
    """End this process at once; every file that it wrote must be closed.

    The interpreter's normal exit takes a second for the objects of torch and transformers, and there a process group
    that was not destroyed may wait for ranks that are gone, or abort.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # `main` has already reported a full disk
            stream.flush()
    os._exit(exit_code)


def wait_for_local_main(seconds: float = 15.0) -> None:
    """On all local ranks but 0: wait while local rank 0 prints the error line.

    torchrun ends this process as soon as local rank 0 has ended. If that does not happen within `seconds`, only this
    rank has the error.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(seconds)
