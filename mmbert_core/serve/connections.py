"""An HTTP server with deadlines for its clients, a bound on connections, and an end in bounded time.

One thread per connection. While the server waits for a client to send the request or to read the answer, the connection
has a deadline; while the answer is computed it has none. At the bound on connections, a new one replaces the one whose
client the server has waited for longest. If all answers are being computed, the new one waits, and the kernel queues
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

SO_ATTACH_FILTER, BPF_RETURN = 26, 0x06  # constants of Linux that Python's socket module lacks
POLL_SECONDS = 0.2  # between two checks for a signal or a passed deadline


@dataclass(frozen=True)
class Limits:
    """The time a client has, in seconds, and the number of connections."""

    client_seconds: float = 30.0  # to send the whole request, and as long again to read the answer
    stop_seconds: float = 5.0  # the same, counted from the signal to stop
    idle_seconds: float = 0.5  # from that signal to the first byte of a request
    full_seconds: float = 2.0  # to send the request, or to read the answer, while all connections are in use
    max_connections: int = 512  # one thread each; below the usual limit of 1,024 open files per process


DEFAULT_LIMITS = Limits()


@dataclass(eq=False)
class Connection:
    """The connection of one client."""

    socket: socket.socket
    # `time.monotonic` when the server began to wait for the client; None while the answer is computed
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
    """Closes the connections of clients that exceed `Limits`.

    Listens as soon as it is constructed; the constructor raises `OSError` when it cannot.
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
        """Seconds until the client must have sent its request or read its answer; infinite while that is computed."""
        since, stopped_at = connection.waiting_since, self._stopped_at
        if since is None:
            return float("inf")
        deadline = since + self.limits.client_seconds
        if stopped_at is not None:
            allowed = self.limits.stop_seconds if connection.has_begun else self.limits.idle_seconds
            deadline = min(deadline, max(since, stopped_at) + allowed)
        return deadline - time.monotonic()

    # ---- accepting ----

    def serve_until(self, is_stopped: Callable[[], bool]) -> None:
        """Accept connections until `is_stopped()`, then those in the kernel's queue; return when all are answered."""
        self.timeout = POLL_SECONDS
        while not is_stopped():
            self.handle_request()
        self._drop_new_connections()
        self.timeout, self._queue_is_empty = 0, False
        for _ in range(self.request_queue_size):  # bounded: where nothing drops new connections, they may keep arriving
            self.handle_request()
            if self._queue_is_empty:
                break
        self.socket.close()
        self.finish()

    def _drop_new_connections(self) -> None:
        """Make Linux drop all packets for the listening socket until it is closed.

        Without this, a connection that arrives between the last check of the queue and the close would be reset and
        its request lost. With its packet dropped, the client's kernel tries again and the connection is then refused.
        """
        if sys.platform == "linux":
            keep_nothing = struct.pack("HBBI", BPF_RETURN, 0, 0, 0)  # one instruction: keep 0 bytes of each packet
            program = ctypes.create_string_buffer(keep_nothing)
            with suppress(OSError):
                address = struct.pack("HP", 1, ctypes.addressof(program))
                self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, address)

    def handle_timeout(self) -> None:
        """`handle_request` calls this when no connection came within `timeout`."""
        self._queue_is_empty = True

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """Start the connection's thread; at `max_connections`, first wait until one has ended."""
        with self._changed:
            while len(self._connections) >= self.limits.max_connections:
                self._end_slowest()
                self._changed.wait(POLL_SECONDS)
            self._connections[request] = Connection(request)
        super().process_request(request, client_address)

    def _end_slowest(self) -> None:
        """Shut down the connection that has waited longest for its client, once that is `full_seconds`."""
        # each read once: the connections' threads change them
        waiting_since = {connection: connection.waiting_since for connection in self._connections.values()}
        times = {connection: since for connection, since in waiting_since.items() if since is not None}
        slowest = min(times, key=times.__getitem__, default=None)
        if slowest is not None and time.monotonic() - times[slowest] >= self.limits.full_seconds:
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
                    # a request that has arrived, but that its thread has not read yet, gets `stop_seconds`
                    if not connection.has_begun and connection.has_data():
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
            self.connection.socket.settimeout(seconds)  # what is left for the whole request
            count = self.connection.socket.recv_into(buffer)
        except TimeoutError:
            self.is_late = True
            raise
        self.connection.has_begun = self.connection.has_begun or count > 0
        return count
