"""Standard streams without a reader, on a full disk, in ASCII: in small processes, and in commands with exit codes."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny

START = """
import logging, os, sys, time
from mmbert_core.runtime import streams
streams.protect_streams()
"""


def shell(program: str, redirections: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that runs START and `program` with `redirections` of the shell, such as `| true`; its own exit code."""
    variables = os.environ | {"PYTHONPATH": str(tiny.ROOT), "PROGRAM": START + program, **environment}
    line = f'set -o pipefail; {sys.executable} -c "$PROGRAM" {redirections}'
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, env=variables, cwd=tiny.ROOT
    )


MUCH = "for _ in range(50): print('x' * 10_000)\nprint('done', file=sys.stderr)\n"  # more than a pipe holds


def test_a_reader_that_is_gone_ends_nothing_and_is_not_told():
    done = shell(MUCH, "| true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "done\n")
    done = shell(
        "logger = logging.getLogger(); logger.addHandler(logging.StreamHandler())\n"
        + MUCH
        + "logger.warning('w' * 100_000)\nos.write(1, b'still')\n",
        "2>&1 | true",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_read_is_whole_and_in_order():
    done = shell(MUCH)
    assert done.returncode == 0 and done.stdout == ("x" * 10_000 + "\n") * 50 and done.stderr == "done\n"


def test_a_pipe_that_does_not_block_is_waited_for():
    done = shell("os.set_blocking(1, False)\n" + MUCH, "| (sleep 0.5; wc -c)")
    assert done.returncode == 0 and done.stdout.split() == ["500050"] and done.stderr == "done\n"


def test_closed_streams_are_replaced():
    assert shell(MUCH, ">&- 2>&-").returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error_of_standard_output_only():
    done = shell(
        "print('text')\ntry:\n    sys.stdout.flush()\n"
        "except OSError as error:\n    print(error, file=sys.stderr)\n    os._exit(1)\n",
        ">/dev/full",
    )
    assert done.returncode == 1 and done.stderr == "[Errno 28] No space left on device: 'standard output'\n"
    assert shell("print('lost', file=sys.stderr)\nprint('text')\n", "2>/dev/full").stdout == "text\n"


def test_characters_that_the_encoding_lacks_are_escaped():
    done = shell("print('größe \\udcff')\nprint('größe', file=sys.stderr)\n", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "gr\\xf6\\xdfe \\udcff\n", "gr\\xf6\\xdfe\n")
    assert shell("print('größe')\n", PYTHONIOENCODING="utf-8").stdout == "größe\n"


def test_a_crash_in_native_code_says_where():
    done = shell(f"os.kill(os.getpid(), {int(signal.SIGBUS)})\n")
    assert done.returncode != 0 and "Fatal Python error: Bus error" in done.stderr and "File" in done.stderr


# ---- real commands ----


@pytest.fixture(scope="module")
def german(tmp_path_factory) -> tuple[Path, Path]:
    """(config file, model folder) of a finished run whose files, columns and labels have names outside ASCII."""
    folder = tmp_path_factory.mktemp("german")
    values: dict[str, Any] = tiny.settings(folder, max_epochs=1)
    names = {"age": "Größe", "kind": "Gerät", "label": "Lösung"}
    for name in ("train", "val", "test"):
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as stream:
            header, *rows = csv.reader(stream)
        path = folder / f"{name}_ü.csv"
        with open(path, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows(
                [
                    [names.get(column, column) for column in header],
                    *([*row[:-1], ("süß", "größer")[int(row[-1])]] for row in rows),
                ]
            )
        values[f"{name}_path"] = [str(path)]
    values |= {
        "tab_field_list": [names["age"], "amount"],
        "cat_field_list": [names["kind"]],
        "label_name": names["label"],
        "model_path": str(folder / "läuft"),
    }
    config = folder / "run.json"
    config.write_text(json.dumps(values), encoding="utf-8")
    done = command(f"train {config}", "| true", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "error" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (folder / "läuft/train_results.json").exists()
    return config, folder / "läuft"


def command(arguments: str, redirections: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = f"set -o pipefail; {sys.executable} -m mmbert_core {arguments} {redirections}"
    variables = os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=180, env=variables, cwd=tiny.ROOT
    )


def test_commands_on_an_ascii_output_that_nobody_reads(german):
    config, model = german
    test_rows = json.loads(config.read_text())["test_path"][0]
    done = command(
        f"evaluate {model} {test_rows} --output {model.parent / 'evaluated'}", "2>&1 | true", PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(model.parent.glob("evaluated/*/test_result_0.tsv"))
    done = command(f"inspect {model}", "", PYTHONIOENCODING="ascii")
    assert (
        done.returncode == 0
        and "l\\xe4uft" in done.stdout
        and "gr\\xf6\\xdfer" in done.stdout
        and "Traceback" not in done.stderr
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_command_whose_output_does_not_fit_on_the_disk_says_so_in_one_line(german):
    done = command(f"inspect {german[1]}", ">/dev/full")
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device: 'standard output'"
    )
    assert "Traceback" not in done.stderr
