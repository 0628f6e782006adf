"""A running server of `mmbert serve` and a client for it, for tests."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from mmbert_core.predictor import Predictor
from mmbert_core.serve.connections import DEFAULT_LIMITS, Limits
from mmbert_core.serve.server import Server

ROW = {"row_id": "7", "text": "please refund my money", "age": 30, "amount": 1.5, "kind": "a"}
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(
    predictor: Predictor, model_path: str, host: str = "127.0.0.1", limits: Limits = DEFAULT_LIMITS
) -> Iterator[Server]:
    """A server in a thread, on a free port."""
    with Server(predictor, model_path, host=host, port=0, limits=limits) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server,
    path: str,
    value: Any = None,
    *,
    method: str | None = None,
    headers: dict[str, str] = JSON,
    body: bytes | None = None,
) -> SimpleNamespace:
    """Status, headers and body of an answer; a value is sent as JSON."""
    data = body if body is not None or value is None else json.dumps(value).encode()
    request = urllib.request.Request(
        server.url.rstrip("/") + path, data, headers if data is not None else {}, method=method
    )
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read()
        return SimpleNamespace(
            status=answer.status, headers=answer.headers, text=text, json=json.loads(text) if text[:1] == b"{" else None
        )


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def send_raw(server: Server, request: bytes) -> bytes:
    """The answer to bytes that need not be HTTP."""
    with socket.create_connection(server.server_address, timeout=60) as client:
        client.sendall(request)
        return read_all(client)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)
