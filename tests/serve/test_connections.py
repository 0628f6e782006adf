"""Deadlines of slow clients, the bound on connections, and an end that answers every request."""

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from mmbert_core.serve.connections import Limits
from mmbert_core.serve.server import Server
from tests.support.serving import ROW, ask, read_all, send_raw, serving


def test_finish_waits_for_the_request_under_way_and_not_for_an_idle_connection(server):
    started, may_go = threading.Event(), threading.Event()
    predict = server.predictor.predict

    def predict_slowly(rows):
        started.set()
        may_go.wait(60)
        return predict(rows)

    with serving(server.predictor, "m") as other:
        other.predictor.predict = predict_slowly
        statuses: list[int] = []
        client = threading.Thread(target=lambda: statuses.append(ask(other, "/predict", ROW).status))
        with socket.create_connection(other.server_address):
            client.start()
            started.wait(60)
            finishing = threading.Thread(target=other.finish)
            finishing.start()
            finishing.join(0.5)
            assert finishing.is_alive()
            may_go.set()
            finishing.join(60)
            assert not finishing.is_alive()
        client.join(60)
    assert statuses == [200]


# ---- slow clients, many clients ----

SHORT = Limits(client_seconds=1.0, stop_seconds=0.6, idle_seconds=0.2, full_seconds=0.3, max_connections=8)
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def request_of(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return POST % len(body) + body


def send_slowly(server: Server, data: bytes, ended: list[float], *, limit: float = 5.0) -> None:
    """Send a byte every 50 ms until the server closes the connection, and add the seconds until then to `ended`."""
    started = time.monotonic()
    with socket.create_connection(server.server_address, timeout=60) as client:
        client.settimeout(0.05)
        try:
            for byte in data:
                client.send(bytes([byte]))
                with suppress(TimeoutError):
                    if not client.recv(65536):
                        break
                if time.monotonic() - started > limit:
                    return
        except OSError:
            pass
    ended.append(time.monotonic() - started)


def start_threads(target: Any, arguments: list[tuple[Any, ...]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=target, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_client_that_sends_single_bytes_is_disconnected_at_its_deadline(server):
    slow = [b"GET /health HTTP/1.1\r\nX: " + b"a" * 500, POST % 500 + b" " * 500, (POST % 2_000_000) + b" " * 500]
    ended: list[float] = []
    with serving(server.predictor, "m", limits=SHORT) as other:
        join(start_threads(send_slowly, [(other, data, ended) for data in slow * 2]))
    assert len(ended) == 6 and max(ended) < 3


def test_a_slow_body_is_answered_with_408(server):
    with serving(server.predictor, "m", limits=SHORT) as other:
        assert b" 408 " in send_raw(other, POST % 500 + b"{").splitlines()[0]
        with socket.create_connection(other.server_address, timeout=60) as client:
            client.sendall(POST % 500 + b"{}")
            client.shutdown(socket.SHUT_WR)
            assert b"expected a body of 500 bytes" in read_all(client)


def test_clients_that_occupy_all_connections_are_replaced(server):
    ended: list[float] = []
    limits = replace(SHORT, client_seconds=30.0)
    with serving(server.predictor, "m", limits=limits) as other:
        threads = start_threads(send_slowly, [(other, POST % 500 + b" " * 500, ended) for _ in range(12)])
        time.sleep(0.3)
        started = time.monotonic()
        assert ask(other, "/predict", ROW).status == 200 and time.monotonic() - started < 4
        other.finish()
        join(threads)
    assert len(ended) == 12


def test_at_the_end_all_requests_are_answered_and_slow_clients_are_ended(server, monkeypatch):
    """Requests that are computed, that wait in the kernel's queue, and clients that never finish theirs."""
    predict, stop = server.predictor.predict, threading.Event()
    with Server(server.predictor, "m", host="127.0.0.1", port=0, limits=replace(SHORT, client_seconds=60)) as other:
        monkeypatch.setattr(other.predictor, "predict", lambda rows: (time.sleep(0.05), predict(rows))[1])
        accepting = threading.Thread(target=other.serve_until, args=(stop.is_set,))
        accepting.start()
        ended: list[float] = []
        slow = start_threads(send_slowly, [(other, POST % 500 + b" " * 500, ended) for _ in range(3)])
        idle = socket.create_connection(other.server_address)
        time.sleep(0.3)
        clients = [socket.create_connection(other.server_address, timeout=60) for _ in range(20)]
        for client in clients:
            client.sendall(request_of(ROW))
        stop.set()
        answers = [read_all(client) for client in clients]
        accepting.join(10)
        assert not accepting.is_alive()
        join(slow)
        assert [b" 200 " in answer[:20] for answer in answers] == [True] * 20 and len(ended) == 3
        for client in (*clients, idle):
            client.close()
        with pytest.raises(OSError):
            socket.create_connection(other.server_address, timeout=5)


def load(server_address: tuple[str, int], num_clients: int, seconds: float) -> tuple[list[float], list[str]]:
    """Clients that each send a request after the other: seconds of each answer, and what was lost."""
    latencies: list[float] = []
    lost: list[str] = []
    end = time.monotonic() + seconds

    def work() -> None:
        while (started := time.monotonic()) < end:
            try:
                with socket.create_connection(server_address, timeout=60) as client:
                    client.sendall(request_of(ROW))
                    answer = read_all(client)
                if b" 200 " in answer[:20]:
                    latencies.append(time.monotonic() - started)
                else:
                    lost.append(repr(answer[:40]))
            except OSError as error:
                lost.append(repr(error))

    join(start_threads(work, [()] * num_clients))
    return latencies, lost


@pytest.mark.fault
@pytest.mark.parametrize("num_clients", [8, 128, 256])
def test_many_clients_lose_no_connection(server, num_clients):
    with Server(server.predictor, "m", host="127.0.0.1", port=0) as other:
        stop = threading.Event()
        [accepting] = start_threads(other.serve_until, [(stop.is_set,)])
        latencies, lost = load(other.server_address, num_clients, 5.0)
        stop.set()
        join([accepting])
    assert not lost and len(latencies) >= num_clients and max(latencies) < 20, (lost[:3], len(latencies))


@pytest.mark.fault
def test_no_request_is_lost_when_the_server_stops_under_load(server):
    """Clients that connect all the time: each connection is refused, or answered."""
    for _ in range(10):
        stop, lost = threading.Event(), []

        def work(address: tuple[str, int], lost: list[str] = lost) -> None:
            while True:
                try:
                    client = socket.create_connection(address, timeout=60)
                except OSError:
                    return
                with client:
                    try:
                        client.sendall(request_of(ROW))
                        answer = read_all(client)
                    except OSError as error:
                        answer = repr(error).encode()
                if b" 200 " not in answer[:20]:
                    lost.append(repr(answer[:40]))

        with Server(server.predictor, "m", host="127.0.0.1", port=0) as other:
            [accepting] = start_threads(other.serve_until, [(stop.is_set,)])
            threads = start_threads(work, [(other.server_address,)] * 24)
            time.sleep(0.5)
            stop.set()
            join([accepting, *threads])
        assert not lost


def test_a_burst_of_clients_waits_in_the_queue(server):
    with Server(server.predictor, "m", host="127.0.0.1", port=0) as other:
        clients = [socket.create_connection(other.server_address, timeout=5) for _ in range(60)]  # nobody accepts yet
        for client in clients:
            client.sendall(request_of(ROW))
        [accepting] = start_threads(other.serve_until, [(lambda: True,)])
        answers = [read_all(client) for client in clients]
        join([accepting])
        assert [b" 200 " in answer[:20] for answer in answers] == [True] * 60
        for client in clients:
            client.close()
