"""Numbers beyond a setting's range, from a file and from a shell: one line and exit code 2, no traceback, no hang."""

import json
import random
import time
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from mmbert_core import cli
from mmbert_core.config import SETTINGS, Config
from mmbert_core.config_reader import read_config
from mmbert_core.runtime.errors import InputError
from tests.support import tiny
from tests.support.configs import REQUIRED

HINTS = get_type_hints(Config)
NUMERIC = [
    name
    for name, hint in HINTS.items()
    if {int, float} & {hint, *get_args(hint), *(inner for each in get_args(hint) for inner in get_args(each))}
]
HUGE = [2**31, 2**31 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, 10**99, 10**400]
HUGE += [1e30, 1e300, 1.7e308, float("inf"), float("-inf"), float("nan")]
HUGE += [-1, -0.5, -(2**31), -(2**63), -(10**400), 5e-324, -1e-300, 0, -0.0]
WORDS = "inf -inf nan 1e999 -1e999 0x7fffffff 1e30 1_000_000_000_000 ٣ ½ ² --1 1e".split()
WORDS += ["9" * 400, "9" * 5000, "-" + "9" * 5000, ""]


def value_of(rng: random.Random) -> Any:
    """A number or what stands for one, most of them beyond every machine."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(HUGE)
    if kind == 1:
        return rng.choice(WORDS)
    if kind == 2:
        return rng.choice([-1, 1]) * rng.randrange(10 ** rng.randrange(1, 60))
    return rng.choice([-1, 1]) * rng.random() * 10.0 ** rng.randrange(-320, 308)


def test_every_number_has_a_range():
    assert len(NUMERIC) >= 27
    for name in NUMERIC:
        low, high = SETTINGS[name].at_least, SETTINGS[name].at_most
        assert low < high < float("inf"), name
    others = set(HINTS) - set(NUMERIC)
    assert all(SETTINGS[name].at_most is None for name in others)


def test_every_value_gives_a_config_or_one_line():
    rng, started, refused = random.Random(13), time.process_time(), 0
    for _ in range(3000):
        name = rng.choice(NUMERIC)
        value = value_of(rng)
        changes = {name: [value, value] if get_origin(HINTS[name]) is None and name == "class_weights" else value}
        if name == "num_classes":
            changes["is_binary"] = False
        try:
            config = read_config(None, {**REQUIRED, **changes})
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) <= 300 and name in str(error), str(error)
        else:
            low, high = SETTINGS[name].at_least, SETTINGS[name].at_most
            found = getattr(config, name)
            for number in found if isinstance(found, tuple) else [found]:
                assert not isinstance(number, (int, float)) or low <= number <= high
    assert refused > 2000 and time.process_time() - started < 30


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize(
    "number",
    [
        "9" * 5000,
        "-" + "9" * 400,
        "1e400",
        "0." + "1" * 5000,
        "1" + ":59" * 5000,
        "0x" + "f" * 100_000,
        ".inf",
        ".nan",
        "NaN",
        "-Infinity",
    ],
)
def test_numbers_as_texts_of_a_file(tmp_path, suffix, number):
    path = tmp_path / f"run.{suffix}"
    for key in ("batch_size", "lr", "seed", "label_name", "class_weights"):
        path.write_text(json.dumps(REQUIRED)[:-1] + f', "{key}": {number}}}')
        started = time.process_time()
        try:
            read_config(str(path))
        except InputError as error:
            assert "\n" not in str(error) and len(str(error).replace(str(path), "")) <= 400
        assert time.process_time() - started < 5


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    tiny.settings(folder)
    return folder


def check(folder, capsys, **changes: Any) -> tuple[int, str]:
    """Exit code of `train --check` and what it says."""
    path = folder / "run.json"
    path.write_text(json.dumps(tiny.settings(folder, model_path=str(folder / "run")) | changes))
    capsys.readouterr()
    code = cli.main(["train", str(path), "--check"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("end", ["low", "high"])
def test_the_ends_of_every_range_pass_or_are_one_line(tables, capsys, end):
    for name in NUMERIC:
        low, high = SETTINGS[name].at_least, SETTINGS[name].at_most
        value = low if end == "low" else high
        code, said = check(tables, capsys, **{name: [value, value] if name == "class_weights" else value})
        assert code in (0, 2) and "Traceback" not in said, (name, said)
        assert code == 0 or said.splitlines()[-1].startswith("error: ")


def test_one_beyond_the_ends_is_refused(tables, capsys):
    for name in NUMERIC:
        low, high = SETTINGS[name].at_least, SETTINGS[name].at_most
        for value in (low - 1, high + 1):
            code, said = check(tables, capsys, **{name: [value, value] if name == "class_weights" else value})
            [line] = said.splitlines()
            assert code == 2 and name in line and line.startswith("error: "), (name, said)


@pytest.mark.parametrize("word", ["2147483648", "1e30", "-1", "9" * 5000, "nan", "inf", "0x10", "1.5", "", "٣"])
def test_options_of_other_commands(tmp_path, capsys, word):
    for words in (
        ["predict", "m", "a.csv", "b.tsv", "--num_threads", word],
        ["predict", "m", "a.csv", "b.tsv", "--threshold", word.replace("٣", "3")],
        ["evaluate", "m", "a.csv", "--num_threads", word],
        ["serve", "m", "--port", word],
        ["serve", "m", "--num_threads", word],
        ["ablate", "no.yaml", "--seeds", "0", word],
    ):
        assert cli.main(words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and len(line) <= 400


@pytest.mark.fault
def test_real_processes_refuse_numbers_beyond_a_machine(tmp_path):
    rng = random.Random(7)
    tiny.settings(tmp_path)
    for name in rng.sample(NUMERIC, 12):
        for value in rng.sample(HUGE, 2):
            path = tmp_path / "run.json"
            path.write_text(
                json.dumps(tiny.settings(tmp_path) | {name: [value, value] if name == "class_weights" else value})
            )
            done = tiny.run_command(["train.py", str(path), "--check"], timeout=60)
            assert done.returncode in (0, 2) and "Traceback" not in done.stderr and done.stdout == "", (
                name,
                value,
                done.stderr,
            )
            assert done.returncode == 0 or done.stderr.splitlines()[-1].startswith("error: ")
