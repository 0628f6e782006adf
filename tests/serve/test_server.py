"""`mmbert serve`: the same predictions over HTTP, a page without foreign code, refusals in one line, a clean end."""

import http.client
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from mmbert_core import cli
from mmbert_core.predictor import Predictor
from mmbert_core.runtime import signals
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.serve.server import MAX_BYTES, is_local, run_server
from mmbert_core.tables.table import records_to_chunk
from tests.support import tiny
from tests.support.serving import JSON, ROW, ask, send_raw, serving, wait_for

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
    warning = "column 'age': 1 of 1 numbers lie outside the training range"
    assert caplog.text.count(warning) == 2  # of the request, and of the call in this test


def test_an_explanation_is_the_predictors(server):
    explanation = ask(server, "/explain", ROW).json
    assert explanation == server.predictor.explain(ROW)
    assert "".join(span for span, _ in explanation["tokens"]) == ROW["text"]


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

    def send(number: str) -> None:
        found[number] = ask(server, "/predict", {**ROW, "row_id": number, "age": int(number)}).json

    threads = [threading.Thread(target=send, args=(number,)) for number in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
        ("/predict", {"body": b'{"age": NaN}'}, 400, "NaN is not JSON"),
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
def test_only_host_headers_of_this_machine_are_accepted(server, host, status):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.putrequest("GET", "/health", skip_host=True)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status == status
    connection.close()


def test_broken_requests_are_answered_too(server):
    assert send_raw(server, b"what\r\n\r\n") == b'{"error": "Bad Request: Bad request syntax (\'what\')"}'
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    chunked = start + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    negative = start + b"Content-Length: -5\r\n\r\n"
    long_path = b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"
    for request, status in ((chunked, b" 411 "), (negative, b" 411 "), (long_path, b" 414 ")):
        assert status in send_raw(server, request).splitlines()[0]
    assert ask(server, "/health").status == 200


def test_our_failures_are_one_line_and_the_log_has_the_traceback(server, monkeypatch, caplog):
    def fail(error: Exception):
        def predict(rows):
            raise error

        return predict

    monkeypatch.setattr(server.predictor, "predict", fail(KeyError("inner secret")))
    answer = ask(server, "/predict", ROW)
    assert answer.status == 500 and answer.json == {"error": "internal error; see the server's log"}
    assert "inner secret" in caplog.text and "Traceback" in caplog.text
    monkeypatch.setattr(server.predictor, "predict", fail(RunError("its probability is not finite")))
    assert ask(server, "/predict", ROW).json == {"error": "its probability is not finite"}


def test_the_log_has_a_line_for_each_request_and_no_cell(server, caplog):
    caplog.set_level(logging.INFO, "mmbert_core")
    secret = "xyzzy"
    wait_for(lambda: not server._connections)  # their threads have logged the requests before this one
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


def test_beyond_this_machine_any_host_header_is_accepted(server):
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
        assert ("without authentication" in caplog.text) == warned and f"serving m on http://{host}:" in caplog.text


@pytest.mark.parametrize(
    "words", (["--port", "{port}"], ["--port", "1", "--host", "192.0.2.1"], ["--port", "70000"], ["--hsot", "x"])
)
def test_what_cannot_be_listened_on_is_exit_code_2(server, model, words, capsys):
    words = [word.format(port=server.server_address[1]) for word in words]
    assert cli.main(["serve", str(model), *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    reasons = {"--port 70000": "expected a port", "--hsot x": "'--host'"}
    assert reasons.get(" ".join(words), "cannot be listened on") in line


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


def test_help_is_exit_code_0():
    done = tiny.run_command(["-m", "mmbert_core", "serve", "--help"])
    assert done.returncode == 0 and "--host" in done.stdout and not done.stderr, done.stderr
