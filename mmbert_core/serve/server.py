"""An HTTP server for a model folder: a web page to classify single rows, and JSON for programs.

    GET /   GET /health   POST /predict (a row or a list of rows)   POST /explain (a row)

One request per connection (HTTP/1.0), one thread per connection; the model computes one request at a time.
There is no authentication. While only this machine can connect to the address, requests from web pages of other sites
that are open in a browser on this machine are refused (`Handler._check_host`).
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
from dataclasses import dataclass, field
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
MAX_DISCARDED = 16_000_000  # bytes of a refused body that `_discard_body` reads
MAX_ROWS = 10_000  # of a request
MAX_OTHER_KEYS = 1_000  # of a row: keys that are not columns of the model
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
FIXED_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
METHODS = {"/": ("GET", "HEAD"), "/health": ("GET", "HEAD"), "/predict": ("POST",), "/explain": ("POST",)}


def run_server(predictor: Predictor, model_path: str, *, host: str, port: int) -> None:
    """Serve until a stop signal; requests sent before it are answered. Main thread only. Port 0: a free port is chosen.

    After the signal a client has `Limits.stop_seconds` (5) to send the rest of its request, and as long to read the
    answer.
    Raises `InputError` when the server cannot listen on host and port.
    """
    with signals.deferred(), Server(predictor, model_path, host=host, port=port) as server:
        if server.local_names is None:
            logger.warning(
                "listening beyond this machine without authentication: everybody who reaches %s can use the model, "
                "and so can web pages open in their browsers",
                server.url,
            )
        positive_class = f"; {predictor.positive_class_line}" if predictor.positive_class_line else ""
        logger.info("serving %s on %s%s", model_path, server.url, positive_class)
        server.serve_until(lambda: signals.requested() is not None)
        logger.info("%s: every request under way is answered", signals.requested())


class Server(BoundedServer):
    """Listens as soon as it is constructed. The constructor raises `InputError` when it cannot listen."""

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
        """Bind without looking up the host's full name in DNS, as the base class does: that can take a minute."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that disconnects is not logged as an error; the base class would print a traceback."""
        has_disconnected = isinstance(sys.exc_info()[1], OSError)
        logger.log(logging.DEBUG if has_disconnected else logging.ERROR, "a connection failed", exc_info=True)


class Refusal(Exception):
    """A request that is answered with an error status; the message is the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: HTTPStatus
    body: bytes
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def error(cls, status: HTTPStatus, reason: str, **headers: str) -> "Answer":
        return cls(status, as_json({"error": reason}), headers=headers)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    unread: int | None  # bytes of the body that are not read yet; None: no valid Content-Length
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
        length = self.headers.get("Content-Length", "")[:20]
        self.unread = int(length) if length.isascii() and length.isdecimal() else None
        answer = self._answer_or_error(path)
        self._send(answer)
        milliseconds = 1000 * (time.monotonic() - started)
        known_path = path if path in METHODS else format_for_message(path)
        logger.info("%s %s %d %.0f ms", self.command, known_path, answer.status, milliseconds)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def _answer_or_error(self, path: str) -> Answer:
        """The answer, with an error status when the request fails. Raises when the client disconnected or is slow."""
        try:
            return self._answer_to(path)
        except Refusal as refusal:
            self._discard_body()
            is_wrong_method = refusal.status == HTTPStatus.METHOD_NOT_ALLOWED
            headers = {"Allow": ", ".join(METHODS[path])} if is_wrong_method else {}
            return Answer.error(refusal.status, str(refusal), **headers)
        except InputError as error:
            return Answer.error(HTTPStatus.BAD_REQUEST, one_line(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            logger.exception("%s %s failed", self.command, path)
            reason = one_line(error) if isinstance(error, RunError) else "internal error; see the server's log"
            return Answer.error(HTTPStatus.INTERNAL_SERVER_ERROR, reason)

    def _answer_to(self, path: str) -> Answer:
        """The answer of status 200. Raises `Refusal`, and the errors of the predictor."""
        self._check_host()
        if path not in METHODS:
            known = ", ".join(METHODS)
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no {format_for_message(path)}; there are {known}")
        if self.command not in METHODS[path]:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{path}: expected {METHODS[path][0]}, found {self.command}")
        predictor = self.server.predictor
        if path == "/":
            return self._page()
        if path == "/health":
            health = {"status": "ok", "model_path": self.server.model_path, "columns": self.server.columns}
            return Answer(HTTPStatus.OK, as_json(health | classes_of(predictor)))
        rows = self._read_json()
        with self.server.model_lock:
            result = explanation_of(predictor, rows) if path == "/explain" else predictions_of(predictor, rows)
        return Answer(HTTPStatus.OK, as_json(result))

    def _page(self) -> Answer:
        nonce, loaded = secrets.token_urlsafe(16), self.server.predictor.loaded
        page = render_page(
            self.server.model_path,
            loaded.config,
            loaded.features,
            loaded.labels,
            threshold=loaded.decision.threshold.value,
            nonce=nonce,
            positive_class_line=self.server.predictor.positive_class_line,
        )
        headers = {"Content-Security-Policy": content_security_policy(nonce)}
        return Answer(HTTPStatus.OK, page.encode("utf-8"), "text/html; charset=utf-8", headers)

    def _check_host(self) -> None:
        """Against DNS rebinding: a web page whose host name now resolves to this machine still sends it as Host."""
        if self.server.local_names is None:
            return
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        if name not in self.server.local_names:
            names = ", ".join(sorted(self.server.local_names))
            raise Refusal(HTTPStatus.FORBIDDEN, f"expected a Host header of this machine ({names})")

    def _read_json(self) -> Any:
        """The request's body, parsed.

        Requires Content-Type application/json: a form on a web page of another site cannot send it, and a script there
        can only after a CORS preflight request, which is refused.
        """
        if self.unread is None:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if self.unread > MAX_BYTES:
            reason = f"expected a body of at most {MAX_BYTES} bytes, found {self.unread}"
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
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
            found = format_for_message(self.headers.get("Content-Type", ""))
            reason = f"expected Content-Type application/json, found {found}"
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, reason)
        try:
            return json.loads(body, parse_constant=refuse_constant, object_pairs_hook=object_of)
        except RecursionError:
            raise InputError("expected JSON, found brackets nested too deeply") from None
        except ValueError as error:
            raise InputError(f"expected JSON, found something else: {error}") from None

    def _discard_body(self) -> None:
        """Read the rest of a refused body: a client that is still sending would not read the answer."""
        unread = min(self.unread or 0, MAX_DISCARDED)
        with suppress(TimeoutError):
            while unread > 0 and (block := self.rfile.read(min(unread, 65536))):
                unread -= len(block)

    def _send(self, answer: Answer) -> None:
        connection = self.stream.connection
        connection.waiting_since = time.monotonic()
        connection.socket.settimeout(self.server.seconds_left(connection))
        self.send_response(answer.status)
        headers = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body))}
        for name, value in {**headers, **FIXED_HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The base class calls this for an invalid request line and for an unknown method."""
        status = HTTPStatus(code)
        self._send(Answer.error(status, f"{status.phrase}: {message or ''}"))
        logger.info("an invalid HTTP request: %d", status)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: the base class's lines contain text that the client sent."""


def classes_of(predictor: Predictor) -> dict[str, Any]:
    """The classes in /health: all labels by class index, the one whose probability `prob` is, and its training share.

    The share of the training rows, 0 to 1, is None where the model folder does not have it.
    """
    return {
        "labels": list(predictor.loaded.labels.names),
        "positive_label": predictor.positive_label,
        "positive_share": predictor.positive_share,
    }


def predictions_of(predictor: Predictor, rows: Any) -> dict[str, Any]:
    """`{"predictions": [...]}` of a row or of a list of rows, in their order."""
    rows = rows if isinstance(rows, list) else [rows]
    if len(rows) > MAX_ROWS:
        raise InputError(f"expected at most {MAX_ROWS} rows in a request, found {len(rows)}: send them in several")
    max_keys = max_keys_of(predictor)
    for number, row in enumerate(rows, start=1):
        check_row(row, max_keys, f"data row {number}: ")
    return {"predictions": predictor.predict(rows)}


def explanation_of(predictor: Predictor, row: Any) -> dict[str, Any]:
    """`{"prediction": {...}, "tokens": [[piece, weight], ...]}` of one row."""
    check_row(row, max_keys_of(predictor), "", "one object")
    return predictor.explain(row)


def max_keys_of(predictor: Predictor) -> int:
    """How many keys a row may have: the model's columns and MAX_OTHER_KEYS more."""
    return MAX_OTHER_KEYS + len(Roles.from_config(predictor.loaded.config).inputs())


def check_row(row: Any, max_keys: int, prefix: str, expected: str = "an object") -> None:
    """Raise `InputError` for a row that is not an object or has more than `max_keys` keys."""
    if not isinstance(row, dict):
        raise InputError(f"{prefix}expected {expected} of columns and cells, found {json_type(row)}")
    if len(row) > max_keys:
        raise InputError(f"{prefix}expected at most {max_keys} keys, found {len(row)}")


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def refuse_constant(word: str) -> NoReturn:
    """For NaN and Infinity, which Python's parser would accept."""
    raise ValueError(f"{word} is not JSON (a missing number is null)")


def as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode("ascii")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_local(host: str) -> bool:
    """Whether only this machine can connect to the address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
