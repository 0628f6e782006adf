"""A model folder behind HTTP on this machine: a page to try rows by hand, and JSON for programs.

    GET /   GET /health   POST /predict (a row or a list of rows)   POST /explain (a row)

One connection, one request (HTTP/1.0), a thread each; one of them computes at a time. There is no authentication: the page and its
address are for this machine, and while no other machine can reach it, other web pages open in the same browser are kept out.
"""

import copy
import io
import ipaddress
import json
import logging
import secrets
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, NoReturn
from urllib.parse import urlsplit

from mmbert_core.predictor import Predictor
from mmbert_core.runtime import signals
from mmbert_core.runtime.errors import InputError, RunError, format_for_message
from mmbert_core.serve.connections import DEFAULT_LIMITS, BoundedServer, Limits, RequestStream
from mmbert_core.serve.page import content_security_policy, render_page
from mmbert_core.tables.readers import object_of
from mmbert_core.tables.table import Roles

logger = logging.getLogger(__name__)

MAX_BYTES = 1_000_000  # of a request's body
MAX_DISCARDED = 16_000_000  # of a body that is refused: one who still sends would not read the answer
MAX_ROWS = 10_000  # of a request
MAX_OTHER_KEYS = 1_000  # of a row, that are not columns of the model
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
METHODS = {"/": ("GET", "HEAD"), "/health": ("GET", "HEAD"), "/predict": ("POST",), "/explain": ("POST",)}


def run_server(predictor: Predictor, model_path: str, *, host: str, port: int) -> None:
    """Serve until a signal asks to stop; requests that were sent are answered. For the main thread. Port 0: any free one.

    After the signal a client has `Limits.stop_seconds` (5) to send the rest of its request, and to take its answer.

    Raises `InputError` when host and port cannot be listened on.
    """
    with signals.deferred(), Server(predictor, model_path, host=host, port=port) as server:
        if server.local_names is None:
            logger.warning(
                "listening beyond this machine: there is no authentication, whoever reaches %s can use the model, and so can web pages open in their browsers",
                server.url,
            )
        logger.info(
            "serving %s on %s%s",
            model_path,
            server.url,
            f"; {predictor.positive_class_line}" if predictor.positive_class_line else "",
        )
        server.serve_until(lambda: signals.requested() is not None)
        logger.info("%s: every request under way is answered", signals.requested())


class Server(BoundedServer):
    """Listens from the start. Raises `InputError` when it cannot."""

    def __init__(
        self, predictor: Predictor, model_path: str, *, host: str, port: int, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.predictor, self.model_path = copy.copy(predictor), model_path
        self.predictor.warns_with_examples = False
        self.columns = Roles.from_config(predictor.loaded.config).inputs()
        self.model_lock = threading.Lock()
        self.local_names = LOCAL_NAMES | {host.lower()} if is_local(host) else None
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler, limits=limits)
        except OSError as error:
            raise InputError(f"host {host!r}, port {port}: cannot be listened on ({error.strerror})") from None

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def server_bind(self) -> None:
        """Without the base class's question to the network after the host's full name, which can take a minute."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no error of ours; the base class would print a traceback."""
        is_client = isinstance(sys.exc_info()[1], OSError)
        logger.log(logging.DEBUG if is_client else logging.ERROR, "a connection broke", exc_info=True)


class Refusal(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    unread: int | None
    server_version, sys_version = "mmbert", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.stream = RequestStream(self.server, self.server.connection_of(self.request))
        self.rfile = io.BufferedReader(self.stream)

    def handle(self) -> None:
        super().handle()
        if self.stream.is_late:
            seconds = self.server.limits.client_seconds
            logger.info("a client had not sent its whole request after %g s: connection closed", seconds)

    def answer(self) -> None:
        started = time.monotonic()
        path = self.path.partition("?")[0]
        headers: dict[str, str] = {}
        length = self.headers.get("Content-Length", "")[:20]
        self.unread = int(length) if length.isascii() and length.isdecimal() else None  # bytes of the body
        try:
            status, kind, body, headers = self._made(path)
        except Refusal as refusal:
            self._discard()
            status, kind, body = refusal.status, "application/json", as_json({"error": str(refusal)})
        except InputError as error:
            status, kind, body = HTTPStatus.BAD_REQUEST, "application/json", as_json({"error": one_line(error)})
        except (ConnectionError, TimeoutError):  # the client is gone or too slow
            raise
        except Exception as error:
            logger.exception("%s %s failed", self.command, path)
            reason = one_line(error) if isinstance(error, RunError) else "internal error; the server's log has it"
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", as_json({"error": reason})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": ", ".join(METHODS[path])}
        self._send(status, kind, body, headers)
        milliseconds = 1000 * (time.monotonic() - started)
        logger.info(
            "%s %s %d %.0f ms",
            self.command,
            path if path in METHODS else format_for_message(path),
            status,
            milliseconds,
        )

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def _made(self, path: str) -> tuple[HTTPStatus, str, bytes, dict[str, str]]:
        """Status, type, body and further headers of what was asked for. Raises `Refusal` and what the predictor raises."""
        self._check_host()
        if path not in METHODS:
            raise Refusal(
                HTTPStatus.NOT_FOUND, f"there is no {format_for_message(path)}; there are {', '.join(METHODS)}"
            )
        if self.command not in METHODS[path]:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{path}: expected {METHODS[path][0]}, found {self.command}")
        server, loaded = self.server, self.server.predictor.loaded
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            page = render_page(
                server.model_path,
                loaded.config,
                loaded.features,
                loaded.labels,
                threshold=loaded.decision.threshold.value,
                nonce=nonce,
                class_words=server.predictor.positive_class_line,
            )
            return (
                HTTPStatus.OK,
                "text/html; charset=utf-8",
                page.encode("utf-8"),
                {"Content-Security-Policy": content_security_policy(nonce)},
            )
        if path == "/health":
            value: dict[str, Any] = {
                "status": "ok",
                "model_path": server.model_path,
                "columns": server.columns,
                **classes_of(server.predictor),
            }
        else:
            rows = self._read_json()
            with server.model_lock:
                value = explained(server.predictor, rows) if path == "/explain" else predicted(server.predictor, rows)
        return HTTPStatus.OK, "application/json", as_json(value), {}

    def _check_host(self) -> None:
        """Refuse a page of a stranger whose name now resolves to this machine: its browser still says that name."""
        if self.server.local_names is None:
            return
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        if name not in self.server.local_names:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"expected a Host header of this machine ({', '.join(sorted(self.server.local_names))})",
            )

    def _read_json(self) -> Any:
        """The body's value. A form of another page cannot send this type, and its script may not without being asked about first."""
        if self.unread is None:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if self.unread > MAX_BYTES:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"expected a body of at most {MAX_BYTES} bytes, found {self.unread}",
            )
        expected, self.unread = self.unread, 0
        try:
            body = self.rfile.read(expected)
        except TimeoutError:
            seconds = self.server.limits.client_seconds
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, f"expected the whole request within {seconds:g} s") from None
        if len(body) < expected:
            raise InputError(f"expected a body of {expected} bytes as Content-Length says, found {len(body)}")
        self.stream.connection.waiting_since = None
        if self.headers.get_content_type() != "application/json":
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"expected Content-Type application/json, found {format_for_message(self.headers.get('Content-Type', ''))}",
            )
        try:
            return json.loads(body, parse_constant=refuse_constant, object_pairs_hook=object_of)
        except RecursionError:
            raise InputError("expected JSON, found brackets nested too deeply") from None
        except ValueError as error:
            raise InputError(f"expected JSON, found something else: {error}") from None

    def _discard(self) -> None:
        """Read what is left of a refused body."""
        unread = min(self.unread or 0, MAX_DISCARDED)
        with suppress(TimeoutError):
            while unread > 0 and (part := self.rfile.read(min(unread, 65536))):
                unread -= len(part)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str]) -> None:
        connection = self.stream.connection
        connection.waiting_since = time.monotonic()
        connection.socket.settimeout(self.server.seconds_left(connection))
        self.send_response(status)
        standing = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **standing, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself: a broken request line, a method that nobody knows."""
        status = HTTPStatus(code)
        self._send(status, "application/json", as_json({"error": f"{status.phrase}: {message or ''}"}), {})
        logger.info("a request that is no HTTP of ours: %d", status)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The base class's lines would hold whatever the client wrote."""


def classes_of(predictor: Predictor) -> dict[str, Any]:
    """What /health says of the classes: all labels in order, the one that `prob` is about, and its share of the training rows (null: not known)."""
    return {
        "labels": list(predictor.loaded.labels.names),
        "positive_label": predictor.positive_label,
        "positive_share": predictor.positive_share,
    }


def predicted(predictor: Predictor, rows: Any) -> dict[str, Any]:
    """`{"predictions": [...]}` of a row or of a list of rows, in their order."""
    rows = rows if isinstance(rows, list) else [rows]
    if len(rows) > MAX_ROWS:
        raise InputError(f"expected at most {MAX_ROWS} rows in a request, found {len(rows)}: send them in several")
    max_keys = max_keys_of(predictor)
    for number, row in enumerate(rows, start=1):
        check_row(row, max_keys, f"data row {number}: ")
    return {"predictions": predictor.predict(rows)}


def explained(predictor: Predictor, row: Any) -> dict[str, Any]:
    """`{"prediction": {...}, "tokens": [[piece, weight], ...]}` of one row."""
    check_row(row, max_keys_of(predictor), "", "one object")
    return predictor.explain(row)


def max_keys_of(predictor: Predictor) -> int:
    """Keys that a row may have: the model's columns, and others that it does not read."""
    return MAX_OTHER_KEYS + len(Roles.from_config(predictor.loaded.config).inputs())


def check_row(row: Any, max_keys: int, prefix: str, expected: str = "an object") -> None:
    """Raise `InputError` for a row that is no object, or has thousands of keys that the model does not read."""
    if not isinstance(row, dict):
        raise InputError(f"{prefix}expected {expected} of columns and cells, found {json_type(row)}")
    if len(row) > max_keys:
        raise InputError(f"{prefix}expected at most {max_keys} keys, found {len(row)}")


def json_type(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(
        type(value), "a number"
    )


def refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON (a missing number is null)")


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode("ascii")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
