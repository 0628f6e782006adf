"""An HTTP server with deadlines for its clients, a bound on connections, and an end in bounded time.

One thread per connection. While the server waits for a client (the request is not complete, or the answer not taken),
the connection has a deadline; while the request is computed it has none. At the bound on connections a new one replaces
the one that the server has waited for longest; if all are being computed, the new one waits, and the kernel queues
those that follow.
"""

import ctypes
import io
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition

SO_ATTACH_FILTER, BPF_RETURN = 26, 0x06  # of Linux; Python has no names for them
POLL_SECONDS = 0.2  # between two checks of what sends no event: a signal, a deadline


@dataclass(frozen=True)
class Limits:
    """The time a client has, in seconds, and the number of connections."""

    client_seconds: float = 30.0  # to send the whole request, and to take the answer
    stop_seconds: float = 5.0  # the same, counted from the signal to stop
    idle_seconds: float = 0.5  # from that signal to the first byte of a request
    full_seconds: float = 2.0  # to send the request or to take the answer, while others wait for the connection
    max_connections: int = 512  # threads; below the 1,024 open files that a process often may have


DEFAULT_LIMITS = Limits()


@dataclass(eq=False)
class Connection:
    """One client."""

    socket: socket.socket
    # `time.monotonic` when the server began to wait for the client; None while its request is computed
    waiting_since: float | None = field(default_factory=time.monotonic)
    has_begun: bool = False  # a byte of the request was read

    def has_data(self) -> bool:
        """Whether unread bytes have arrived."""
        poller = select.poll()
        try:
            poller.register(self.socket, select.POLLIN)
            return bool(poller.poll(0))
        except (OSError, ValueError):  # closed meanwhile
            return False

    def end(self) -> None:
        """Shut the connection down; the thread that waits for this client then reads its end."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class BoundedServer(ThreadingHTTPServer):
    """Listens as soon as it is constructed; the constructor raises `OSError` when it cannot.

    See `Limits` for what its clients are allowed.
    """

    daemon_threads = True  # `finish` waits for the connections itself
    request_queue_size = 1024  # connections that the kernel queues, bounded by net.core.somaxconn

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], *, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.limits = limits
        self._connections: dict[socket.socket, Connection] = {}
        self._changed = Condition()
        self._stopped_at: float | None = None
        self._queue_is_empty = False
        super().__init__(address, handler)

    def connection_of(self, request: socket.socket) -> Connection:
        return self._connections[request]

    def seconds_left(self, connection: Connection) -> float:
        """Until the client must have sent its request or taken its answer; infinite while the request is computed."""
        since, stopped_at = connection.waiting_since, self._stopped_at
        if since is None:
            return float("inf")
        deadline = since + self.limits.client_seconds
        if stopped_at is not None:
            granted = self.limits.stop_seconds if connection.has_begun else self.limits.idle_seconds
            deadline = min(deadline, max(since, stopped_at) + granted)
        return deadline - time.monotonic()

    # ---- accepting ----

    def serve_until(self, is_stopped: Callable[[], bool]) -> None:
        """Accept connections until `is_stopped`, then those in the kernel's queue, and answer all. For one thread."""
        self.timeout = POLL_SECONDS
        while not is_stopped():
            self.handle_request()
        self._drop_new_connections()
        self.timeout, self._queue_is_empty = 0, False
        for _ in range(self.request_queue_size):  # bounded: without a socket filter new ones may keep arriving
            self.handle_request()
            if self._queue_is_empty:
                break
        self.socket.close()
        self.finish()

    def _drop_new_connections(self) -> None:
        """From now until the listening socket is closed, Linux drops packets that arrive for it.

        Without this, a connection that arrives between the last check of the queue and the close would be reset and
        its request lost. Dropped, the client gets no answer from the kernel, tries again, and is then refused.
        """
        if sys.platform == "linux":
            program = ctypes.create_string_buffer(
                struct.pack("HBBI", BPF_RETURN, 0, 0, 0)
            )  # keeps 0 bytes of a packet: drops it
            with suppress(OSError):
                address = struct.pack("HP", 1, ctypes.addressof(program))
                self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, address)

    def handle_timeout(self) -> None:
        self._queue_is_empty = True

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """Runs in the accepting thread."""
        with self._changed:
            while len(self._connections) >= self.limits.max_connections:
                self._end_slowest()
                self._changed.wait(POLL_SECONDS)
            self._connections[request] = Connection(request)
        super().process_request(request, client_address)

    def _end_slowest(self) -> None:
        since = {each: each.waiting_since for each in self._connections.values()}
        since = {connection: seconds for connection, seconds in since.items() if seconds is not None}
        slowest = min(since, key=since.__getitem__, default=None)
        if slowest is not None and time.monotonic() - since[slowest] >= self.limits.full_seconds:
            slowest.end()

    def shutdown_request(self, request: socket.socket) -> None:
        try:
            super().shutdown_request(request)
        finally:
            with self._changed:
                self._connections.pop(request, None)
                self._changed.notify_all()

    # ---- ending ----

    def finish(self) -> None:
        """Wait until every request is answered; connections of clients that exceed `Limits` are shut down."""
        self._stopped_at = time.monotonic()
        with self._changed:
            while self._connections:
                for connection in self._connections.values():
                    if self.seconds_left(connection) > 0:
                        continue
                    if not connection.has_begun and connection.has_data():  # sent, but its thread has not read it yet
                        connection.has_begun = True
                    else:
                        connection.end()
                self._changed.wait(POLL_SECONDS)


class RequestStream(io.RawIOBase):
    """The bytes that a client sends. Reading raises `TimeoutError` at the deadline of its connection."""

    def __init__(self, server: BoundedServer, connection: Connection) -> None:
        self.server, self.connection = server, connection
        self.is_late = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            seconds = self.server.seconds_left(self.connection)
            if seconds <= 0:
                raise TimeoutError
            self.connection.socket.settimeout(seconds)  # of the whole request, not of one byte
            count = self.connection.socket.recv_into(buffer)
        except TimeoutError:
            self.is_late = True
            raise
        self.connection.has_begun = self.connection.has_begun or count > 0
        return count
