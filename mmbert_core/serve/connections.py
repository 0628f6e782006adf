"""An HTTP server with deadlines for its clients, a bound on connections, and a bounded end.

A connection has a thread. While we wait for its client (the request is not whole, or the answer not taken) it has a
deadline; while we compute it has none. At the bound on connections a new one takes the place of the one that has been
waited for longest; where all are being computed it waits, and the kernel keeps those that follow.
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
POLL_SECONDS = 0.2  # between two looks at what no event tells: a signal, a deadline


@dataclass(frozen=True)
class Limits:
    """What a client is granted; all times in seconds."""

    client_seconds: float = 30.0  # to send the whole request, and to take the answer
    stop_seconds: float = 5.0  # the same, counted from the signal to stop
    idle_seconds: float = 0.5  # from that signal to the first byte of a request
    full_seconds: float = 2.0  # to send the request or to take the answer, while others wait for the connection
    max_connections: int = 512  # threads; below the 1,024 open files that a process often may have


DEFAULT_LIMITS = Limits()


@dataclass(eq=False)
class Connection:
    """`waiting_since`: when we began to wait for the client; None while it waits for us. Seconds of `time.monotonic`."""

    socket: socket.socket
    waiting_since: float | None = field(default_factory=time.monotonic)
    has_begun: bool = False  # a byte of the request was read

    def has_data(self) -> bool:
        """Whether bytes have arrived that were not read yet."""
        poller = select.poll()
        try:
            poller.register(self.socket, select.POLLIN)
            return bool(poller.poll(0))
        except (OSError, ValueError):  # closed meanwhile
            return False

    def end(self) -> None:
        """The thread that waits for this client finds the connection closed."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class BoundedServer(ThreadingHTTPServer):
    """Listens from the start. Raises `OSError` when it cannot."""

    daemon_threads = True  # `finish` waits for the connections itself
    request_queue_size = 1024  # connections that the kernel keeps for us, bounded by net.core.somaxconn

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
        """Until the client must have sent its request, or taken its answer; infinite while it waits for us."""
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
        """Accept connections until then, and those that the kernel keeps; answer all. For one thread."""
        self.timeout = POLL_SECONDS
        while not is_stopped():
            self.handle_request()
        self._accept_no_more()
        self.timeout, self._queue_is_empty = 0, False
        for _ in range(self.request_queue_size):  # bounded, though new ones may come without end
            self.handle_request()
            if self._queue_is_empty:
                break
        self.socket.close()
        self.finish()

    def _accept_no_more(self) -> None:
        """On Linux the kernel drops what arrives for the listening socket from now on, until it is closed.

        A connection that came after the last look at the queue would be reset, its request lost; without an answer
        from the kernel its client tries again, and is then refused.
        """
        if sys.platform == "linux":
            program = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, 0))  # returns 0 bytes: drop
            with suppress(OSError):
                address = struct.pack("HP", 1, ctypes.addressof(program))
                self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, address)

    def handle_timeout(self) -> None:
        self._queue_is_empty = True

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """In the accepting thread."""
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

    def wait_until_idle(self) -> None:
        """Until no connection is open."""
        with self._changed:
            self._changed.wait_for(lambda: not self._connections)

    # ---- ending ----

    def finish(self) -> None:
        """Wait until every request is answered; clients that do not send or take theirs are ended by `Limits`."""
        self._stopped_at = time.monotonic()
        with self._changed:
            while self._connections:
                for connection in self._connections.values():
                    if self.seconds_left(connection) > 0:
                        continue
                    if not connection.has_begun and connection.has_data():  # its thread only had no time to read
                        connection.has_begun = True
                    else:
                        connection.end()
                self._changed.wait(POLL_SECONDS)


class RequestStream(io.RawIOBase):
    """What a client sends while it is waited for. Reading raises `TimeoutError` at its deadline."""

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
            self.connection.socket.settimeout(seconds)  # not longer for one that sends a byte now and then
            count = self.connection.socket.recv_into(buffer)
        except TimeoutError:
            self.is_late = True
            raise
        self.connection.has_begun = self.connection.has_begun or count > 0
        return count
