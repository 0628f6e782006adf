"""The benchmarks run and write their files; their figures are not tested."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.support import tiny

PACKAGES = {"plain": "torch", "trainer": "accelerate", "grouped": "accelerate", "lightning": "lightning"}
PEERS = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.settings(tmp_path)))
    return str(path)


def run(*arguments: str) -> str:
    done = tiny.run_command(["-m", *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_throughput(config: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.svg")]
    output = run("benchmarks.throughput", config, "--rounds", "2", "--steps", "2", "--peers", *PEERS, *files)
    record = json.loads((tmp_path / "t.json").read_text())
    assert list(record["contenders"])[0] == "mmbert_core" and len(record["contenders"]) == len(PEERS) + 1
    assert all(
        len(rounds) == 2 and all(figures["rows/s"] > 0 for figures in rounds)
        for rounds in record["contenders"].values()
    )
    assert all(f"| {name} |" in output for name in record["contenders"]) and record["machine"]["threads"] == 1
    assert (tmp_path / "t.svg").stat().st_size > 1000


def test_inference(config: str, tmp_path: Path) -> None:
    options = ["--rounds", "1", "--rows", "40", *([] if "trainer" in PEERS else ["--alone"])]
    run("benchmarks.inference", config, *options, "--json", str(tmp_path / "i.json"))
    record = json.loads((tmp_path / "i.json").read_text())
    assert record["contenders"]["mmbert_core, fp32"][0]["rows/s"] > 0


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None,
    reason="needs the extra onnx",
)
def test_export(config: str, tmp_path: Path) -> None:
    run("benchmarks.export", config, "--rounds", "1", "--rows", "40", "--json", str(tmp_path / "e.json"))
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["contenders"].keys() == {"mmbert_core", "onnxruntime"}
    assert all(rounds[0]["rows/s"] > 0 for rounds in record["contenders"].values())


@pytest.mark.parametrize("name", ["throughput", "inference", "export", "limits", "scaling"])
def test_help(name: str) -> None:
    assert "usage: " in run(f"benchmarks.{name}", "--help")


def test_limits(config: str) -> None:
    assert "bare fast tokenizer" in run("benchmarks.limits", config)


@pytest.mark.slow
def test_scaling_by_rows(tmp_path: Path) -> None:
    output = run("benchmarks.scaling", "rows", "--sizes", "200", "2000", "--json", str(tmp_path / "s.json"))
    sizes = json.loads((tmp_path / "s.json").read_text())["sizes"]
    assert list(sizes) == ["200", "2000"] and all(figures["cache"]["peak_mb"] > 0 for figures in sizes.values())
    assert "| 2,000 |" in output
