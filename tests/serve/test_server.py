"""`mmbert serve`: the same predictions over HTTP, a page without foreign code, refusals in one line, a clean end."""

import http.client
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from mmbert_core import cli
from mmbert_core.predictor import Predictor
from mmbert_core.runtime import signals
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.serve.connections import Limits
from mmbert_core.serve.server import MAX_BYTES, Server, is_local, run_server
from mmbert_core.tables.table import records_to_chunk
from tests.support import tiny
from tests.support.serving import JSON, ROW, ask, read_all, send_raw, serving

# ---- answers ----


def test_predictions_are_the_predictors(server):
    rows = [
        ROW,
        {**ROW, "row_id": "=1+1", "text": "", "age": None, "kind": "never seen", "more": [1]},
        {**ROW, "age": "NA", "label": "1"},
    ]
    assert ask(server, "/predict", ROW).json == {"predictions": [server.predictor.predict(ROW)]}
    assert ask(server, "/predict", rows[:2]).json == {"predictions": server.predictor.predict(rows[:2])}
    assert ask(server, "/predict", rows[2]).json["predictions"][0]["label"] == "1"
    assert ask(server, "/predict", []).json == {"predictions": []}
    answer = ask(server, "/predict?x=1", ROW)
    assert (
        answer.status == 200
        and answer.headers["Content-Type"] == "application/json"
        and answer.headers["X-Content-Type-Options"] == "nosniff"
    )


def test_a_number_outside_the_training_range_is_a_line_of_the_log(server, caplog):
    assert ask(server, "/predict", {**ROW, "age": 1e9}).json == {
        "predictions": [server.predictor.predict({**ROW, "age": 1e6})]
    }
    assert (
        caplog.text.count("column 'age': 1 of 1 numbers lie outside the training range") == 2
    )  # of the request, and of the call here


def test_an_explanation_is_the_predictors(server):
    made = ask(server, "/explain", ROW).json
    assert made == server.predictor.explain(ROW)
    assert "".join(piece for piece, _ in made["tokens"]) == ROW["text"]


def test_health_names_model_and_columns(server, model):
    assert ask(server, "/health").json == {
        "status": "ok",
        "model_path": str(model),
        "columns": ["text", "age", "amount", "kind", "row_id"],
        "labels": ["0", "1"],
        "positive_label": "1",
        "positive_share": Predictor.from_folder(model).positive_share,
    }
    assert ask(server, "/health", method="HEAD").text == b""


def test_many_at_once_get_their_own_answers(server):
    expected = {
        str(number): server.predictor.predict({**ROW, "row_id": str(number), "age": number}) for number in range(12)
    }
    found: dict[str, Any] = {}
    threads = [
        threading.Thread(
            target=lambda number=number: found.update(
                {number: ask(server, "/predict", {**ROW, "row_id": number, "age": int(number)}).json}
            )
        )
        for number in expected
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert found == {number: {"predictions": [prediction]} for number, prediction in expected.items()}


# ---- refusals ----


@pytest.mark.parametrize(
    ("path", "options", "status", "reason"),
    [
        ("/predict", {"value": {"text": "x"}}, 400, "column 'age' not found"),
        (
            "/predict",
            {"value": [ROW, {**ROW, "age": "old"}]},
            400,
            "data row 2, column 'age': expected a finite number",
        ),
        ("/predict", {"value": [ROW, 3]}, 400, "data row 2: expected an object of columns and cells, found a number"),
        ("/predict", {"value": {**ROW, "kind": {"a": 1}}}, 400, "expected a single value"),
        ("/predict", {"value": {**ROW, "text": "\ud800"}}, 400, "expected a single value"),
        ("/explain", {"value": [ROW]}, 400, "expected one object of columns and cells, found a list"),
        ("/predict", {"body": b""}, 400, "expected JSON"),
        ("/predict", {"body": b'{"text": '}, 400, "expected JSON"),
        ("/predict", {"body": b"\xff\xfe\x00"}, 400, "expected JSON"),
        ("/predict", {"body": b"[" * 100_000}, 400, "expected JSON"),
        ("/predict", {"body": b'{"age": NaN}'}, 400, "NaN is no JSON"),
        ("/predict", {"body": b'{"text": "a", "text": "b"}'}, 400, "a key stands in it twice"),
        (
            "/predict",
            {"value": ROW, "headers": {"Content-Type": "text/plain"}},
            415,
            "expected Content-Type application/json, found 'text/plain'",
        ),
        ("/predict", {"body": b"x" * (MAX_BYTES + 1)}, 413, "at most 1000000 bytes"),
        ("/predict", {}, 405, "expected POST, found GET"),
        ("/", {"value": ROW}, 405, "expected GET, found POST"),
        ("/explain", {"method": "OPTIONS"}, 405, "expected POST"),
        ("/nothing", {}, 404, "there is no '/nothing'"),
        ("/health/", {}, 404, "there is no"),
        (
            "/predict",
            {"value": ROW, "headers": {**JSON, "Host": "evil.example:8000"}},
            403,
            "expected a Host header of this machine",
        ),
        ("/", {"method": "BREW"}, 501, "Not Implemented"),
    ],
)
def test_a_refusal_is_one_line(server, path, options, status, reason):
    answer = ask(server, path, **options)
    assert answer.status == status and reason in answer.json["error"] and len(answer.json) == 1
    assert "\n" not in answer.json["error"] and "Traceback" not in answer.json["error"]
    if status == 405:
        assert answer.headers["Allow"] == ("GET, HEAD" if path == "/" else "POST")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:99", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_only_this_machines_names_are_heard(server, host, status):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.putrequest("GET", "/health", skip_host=True)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_broken_requests_are_answered_too(server):
    assert send_raw(server, b"what\r\n\r\n") == b'{"error": "Bad Request: Bad request syntax (\'what\')"}'
    assert (
        b" 411 "
        in send_raw(
            server, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        ).splitlines()[0]
    )
    assert (
        b" 411 "
        in send_raw(server, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n").splitlines()[0]
    )
    assert b" 414 " in send_raw(server, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n").splitlines()[0]
    assert ask(server, "/health").status == 200


def test_our_failures_are_one_line_and_the_log_has_the_traceback(server, monkeypatch, caplog):
    def fail(error: Exception):
        def predict(rows):
            raise error

        return predict

    monkeypatch.setattr(server.predictor, "predict", fail(KeyError("inner secret")))
    answer = ask(server, "/predict", ROW)
    assert answer.status == 500 and answer.json == {"error": "internal error; the server's log has it"}
    assert "inner secret" in caplog.text and "Traceback" in caplog.text
    monkeypatch.setattr(server.predictor, "predict", fail(RunError("its probability is no number")))
    assert ask(server, "/predict", ROW).json == {"error": "its probability is no number"}


def test_the_log_has_a_line_for_each_request_and_no_cell(server, caplog):
    caplog.set_level(logging.INFO, "mmbert_core")
    secret = "xyzzy"
    server.wait_until_idle()  # the lines of requests before this one
    caplog.clear()

    def lines():
        return [
            re.sub(r"\d+ ms", "N ms", record.getMessage())
            for record in caplog.records
            if record.name.startswith("mmbert_core.serve")
        ]

    wanted = []
    for path, row, line in [
        ("/predict?q=" + secret, {**ROW, "text": secret, "kind": secret}, "POST /predict 200 N ms"),
        ("/predict", {**ROW, "age": secret}, "POST /predict 400 N ms"),
        ("/health", None, "GET /health 200 N ms"),
    ]:
        ask(server, path, row)
        wanted.append(line)
        while len(lines()) < len(wanted):  # it answers first, then logs
            time.sleep(0.01)
    assert lines() == wanted
    assert secret not in caplog.text


# ---- listening and ending ----


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("box", False),
    ],
)
def test_which_addresses_are_this_machines(host, local):
    assert is_local(host) is local


def test_beyond_this_machine_any_name_is_heard(server):
    with serving(server.predictor, "m", host="0.0.0.0") as other:
        assert ask(other, "/health", value=None).status == 200
        connection = http.client.HTTPConnection("127.0.0.1", other.server_address[1], timeout=60)
        connection.request("GET", "/health", headers={"Host": "box.example"})
        assert connection.getresponse().status == 200
        connection.close()


def test_a_server_beyond_this_machine_says_so(server, caplog, monkeypatch):
    monkeypatch.setattr(signals, "requested", lambda: "SIGTERM")
    caplog.set_level(logging.INFO, "mmbert_core")
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        caplog.clear()
        run_server(server.predictor, "m", host=host, port=0)
        assert ("there is no authentication" in caplog.text) == warned and f"serving m on http://{host}:" in caplog.text


@pytest.mark.parametrize(
    "words", (["--port", "{port}"], ["--port", "1", "--host", "192.0.2.1"], ["--port", "70000"], ["--hsot", "x"])
)
def test_what_cannot_be_listened_on_is_exit_code_2(server, model, words, capsys):
    words = [word.format(port=server.server_address[1]) for word in words]
    assert cli.main(["serve", str(model), *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert {"--port 70000": "expected a port", "--hsot x": "'--host'"}.get(
        " ".join(words), "cannot be listened on"
    ) in line


def test_finish_waits_for_the_request_under_way_and_not_for_an_idle_connection(server, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    predict = server.predictor.predict

    def slow(rows):
        begun.set()
        go.wait(60)
        return predict(rows)

    monkeypatch.setattr(server.predictor, "predict", slow)
    answers: list[int] = []
    client = threading.Thread(target=lambda: answers.append(ask(server, "/predict", ROW).status))
    with socket.create_connection(server.server_address):
        client.start()
        begun.wait(60)
        finishing = threading.Thread(target=server.finish)
        finishing.start()
        finishing.join(0.5)
        assert finishing.is_alive()
        go.set()
        finishing.join(60)
        assert not finishing.is_alive()
    client.join(60)
    assert answers == [200]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal(model, number):
    command = [sys.executable, "-m", "mmbert_core", "serve", str(model), "--port", "0", "--num_threads", "1"]
    process = subprocess.Popen(command, cwd=tiny.ROOT, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())[0]
        with urllib.request.urlopen(
            urllib.request.Request(url + "predict", json.dumps(ROW).encode(), JSON), timeout=60
        ) as answer:
            assert json.load(answer)["predictions"][0]["row_id"] == "7"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "POST /predict 200" in err and "refund" not in err and "Traceback" not in err


# ---- slow clients, many clients ----

SHORT = Limits(client_seconds=1.0, stop_seconds=0.6, idle_seconds=0.2, full_seconds=0.3, max_connections=8)
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def request_of(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return POST % len(body) + body


def send_slowly(server: Server, data: bytes, ended: list[float], *, limit: float = 5.0) -> None:
    """A byte every 50 ms, until the server closes the connection; then the seconds that took."""
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


def test_a_client_that_sends_a_byte_now_and_then_is_ended(server):
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


def test_clients_that_hold_all_connections_give_way(server):
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


@pytest.mark.parametrize(("path", "prefix"), [("/predict", "data row 1: "), ("/explain", "")])
def test_thousands_of_keys_are_one_line_at_once(server, path, prefix):
    row = {f"text{number}": 1 for number in range(60_000)}
    started = time.monotonic()
    answer = ask(server, path, row)
    assert answer.status == 400 and answer.json["error"] == f"{prefix}expected at most 1005 keys, found 60000"
    answer = ask(server, path, {**{key: row[key] for key in list(row)[:900]}, "x" * 400_000: 1})
    assert answer.status == 400 and "column 'text' not found; nearest is 'text" in answer.json["error"]
    assert len(answer.json["error"]) < 5000 and time.monotonic() - started < 3
    many = ask(server, "/predict", [0] * 10_001).json["error"]
    assert many == "expected at most 10000 rows in a request, found 10001: send them in several"


def test_the_nearest_of_many_long_names_is_found_at_once():
    started = time.monotonic()
    with pytest.raises(InputError, match="column 'text' not found") as error:
        records_to_chunk([{f"{number}text" * (1 + number % 7): 1 for number in range(60_000)}], ["text"])
    assert time.monotonic() - started < 2 and len(str(error.value)) < 5000


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


def test_help_is_exit_code_0():
    done = tiny.run_command(["-m", "mmbert_core", "serve", "--help"])
    assert done.returncode == 0 and "--host" in done.stdout and not done.stderr, done.stderr
