"""`import mmbert_core`: lazy names; `train` and `Results` from a script, as the command line has them."""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import mmbert_core
from mmbert_core import Config, InputError, Predictor, Results, RunError, cli, read_config, train
from mmbert_core.training import loop
from tests.support import tiny

SCRIPT = """
import sys, pandas
from mmbert_core import Predictor, read_config, train
results = train(read_config(sys.argv[1]))
print("auroc", results.metrics["auroc"])
frame = pandas.read_csv(sys.argv[2], dtype=str, keep_default_na=False)
print(Predictor.from_folder(results.folder).predict(frame).head(2))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    tiny.settings(folder)
    return folder


@pytest.fixture
def config_of(files, tmp_path):
    def build(**changes) -> Config:
        return Config(**tiny.settings(files, **({"model_path": str(tmp_path / "run"), "max_epochs": 1} | changes)))

    return build


def as_file(config: Config, path: Path) -> str:
    path.write_text(json.dumps(config.to_dict()))
    return str(path)


def comparable(folder: Path) -> dict[str, bytes]:
    """The files of a run that hold no times, paths or versions of its moment."""
    [tested] = folder.glob("multimodal_bert-*")
    names = ("model.safetensors", "features.json", "labels.json", "thresholds.json", "baselines.safetensors")
    paths = [*(folder / name for name in names), tested / "test_result_0.tsv", tested / "test_metrics.json"]
    return {path.name: path.read_bytes() for path in paths}


# ---- names ----


def test_the_package_imports_nothing_until_a_name_is_used():
    code = (
        "import sys, time; start = time.perf_counter(); import mmbert_core; seconds = time.perf_counter() - start\n"
        "assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules), 'imported too much'\n"
        "assert set(mmbert_core.__all__) <= set(dir(mmbert_core)) and 'torch' not in sys.modules\n"
        "import mmbert_core.training.train; from mmbert_core import train\n"
        "assert callable(train) and mmbert_core.train is train and callable(mmbert_core.Predictor)\n"
        "print(seconds)"
    )
    done = tiny.run_command(["-c", code])
    assert done.returncode == 0, done.stderr
    print(f"import mmbert_core: {float(done.stdout):.3f} s")
    assert float(done.stdout) < 0.3


def test_public_names():
    functions = ["compare_runs", "read_config", "train"]
    classes = ["Config", "InputError", "MultimodalClassifier", "Predictor", "Results", "RunError"]
    assert sorted(mmbert_core.__all__) == sorted(["__version__", *functions, *classes])
    for name in mmbert_core.__all__:
        assert getattr(mmbert_core, name) is not None and name in dir(mmbert_core)
    assert issubclass(InputError, ValueError) and issubclass(RunError, RuntimeError)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        mmbert_core.fit  # noqa: B018


# ---- a script ----


def test_a_script_of_five_lines_trains_predicts_and_shows_progress(config_of, files, tmp_path):
    path = as_file(config_of(metric_choices=("auroc",), early_stop_metric="val/auroc"), tmp_path / "run.json")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = tiny.run_command([str(tmp_path / "script.py"), path, str(files / "test.csv")])
    assert done.returncode == 0, done.stderr
    metric, *table = done.stdout.splitlines()
    assert 0 <= float(metric.split()[1]) <= 1 and "prob" in table[0]
    assert "64 train rows, 23 validation rows, 37 test rows" in done.stderr
    assert "step 8/8  epoch 1  train_loss" in done.stderr and "(best so far)" in done.stderr
    assert all(done.stderr.count(line) == 1 for line in ("inputs: ", "test rows scored: ", "model of step "))


def test_results_are_the_files_of_the_command_line(config_of, tmp_path):
    ours, theirs = config_of(), config_of(model_path=str(tmp_path / "command"))
    results = train(ours)
    assert cli.main(["train", as_file(theirs, tmp_path / "run.json")]) == 0
    assert comparable(Path(ours.model_path)) == comparable(Path(theirs.model_path))
    written = json.loads((Path(ours.model_path) / "train_results.json").read_text())
    figures = json.loads((results.test_folder / "test_metrics.json").read_text())
    assert results == Results.from_record(ours.model_path, written) and results.test_metrics == figures
    assert results.folder == Path(ours.model_path) and results.test_folder.parent == results.folder
    assert results.metrics["auroc"] == figures["test/auroc"] and "num_rows" not in results.metrics
    assert (results.test_rows, results.test_loss) == (37, figures["test_loss"])
    assert results.intervals["auroc"] == tuple(figures["intervals"]["test/auroc"])
    assert results.baselines["text only"]["auroc"] == figures["baselines"]["text only"]["test/auroc"]
    assert all(results.metrics[name] is None for name in results.undefined)
    assert (results.steps, results.train_rows, results.rows) == (8, 64, 64) and results.train_rows_per_second > 0
    assert "test_metrics=" not in repr(results)


def test_two_trainings_in_one_process(config_of, tmp_path):
    first, second = (train(config_of(model_path=str(tmp_path / name))) for name in ("first", "second"))
    assert comparable(first.folder) == comparable(second.folder)
    assert train(config_of(model_path=str(tmp_path / "first"))) == first  # finished: nothing is trained again


def test_without_test_rows(config_of):
    results = train(config_of(test_path=()))
    assert (results.test_folder, results.test_rows, results.test_loss, results.test_metrics) == (None,) * 4
    assert results.metrics == results.intervals == results.undefined == results.baselines == {}


def test_a_loss_of_the_users(config_of, tmp_path):
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.3, reduction="none")
    plain = train(config_of(test_path=()))
    other = train(config_of(test_path=(), model_path=str(tmp_path / "smooth")), loss_op=smooth)
    assert (plain.folder / "model.safetensors").read_bytes() != (other.folder / "model.safetensors").read_bytes()


# ---- the process is left as it was ----


def test_mistakes_are_input_errors(config_of, tmp_path):
    with pytest.raises(InputError, match="expected a folder, found a file"):
        (tmp_path / "file").touch()
        train(config_of(model_path=str(tmp_path / "file")))
    with pytest.raises(InputError, match="nothing.csv"):
        train(config_of(train_path=(str(tmp_path / "nothing.csv"),)))
    with pytest.raises(InputError, match="unknown key 'epochs'"):
        read_config(None, {"epochs": 1})


def test_logging_and_settings_are_as_before(config_of, capsys, monkeypatch):
    package = logging.getLogger("mmbert_core")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "level", logging.NOTSET)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    train(config_of(num_threads=2, deterministic=True, test_path=()))
    assert "model of step 8 written to" in capsys.readouterr().err
    assert (package.handlers, package.level) == ([], logging.NOTSET)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()


def test_logging_of_the_users_decides(config_of, capsys, monkeypatch):
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    package = logging.getLogger("mmbert_core")
    monkeypatch.setattr(package, "propagate", True)
    monkeypatch.setattr(package, "level", logging.INFO)
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [Handler()])
    train(config_of(test_path=()))
    assert sum(line.startswith("model of step 8 written to") for line in lines) == 1
    assert "model of step" not in capsys.readouterr().err


def test_a_thread_trains_too(config_of):
    done: list[Results] = []
    thread = threading.Thread(target=lambda: done.append(train(config_of(test_path=()))))
    thread.start()
    thread.join()
    assert done[0].steps == 8


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_with_a_checkpoint_and_the_next_call_continues(config_of, monkeypatch, number, error):
    plain = loop.train_one_step

    def step_and_signal(run, order):
        if run.state.step == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return plain(run, order)

    # the default handler, as in a script: pytest-cov has its own in the processes of pytest-xdist
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    config = config_of()
    try:
        with monkeypatch.context() as patches, pytest.raises(error):
            patches.setattr(loop, "train_one_step", step_and_signal)
            train(config)
        assert signal.getsignal(number) is default
    finally:
        signal.signal(number, before)
    assert (Path(config.model_path) / "checkpoints/step-00000003/MANIFEST.json").exists()
    assert train(config).steps == 8


# ---- several processes ----

WORKER = """
import json, sys
import torch.distributed as dist
from mmbert_core import InputError, read_config, train
results = [train(read_config(path)) for path in sys.argv[1:3]]
assert results[0].world_size == 2 and results[0].metrics == results[1].metrics
try:
    train(read_config(sys.argv[1], {"lr": 0.5, "model_path": sys.argv[4]}))
    raise SystemExit("expected an error")
except InputError as error:
    print("refused:", error)
assert not dist.is_initialized()
again = train(read_config(sys.argv[3]))
assert again.metrics == results[0].metrics and not dist.is_initialized()
"""


def test_trainings_under_torchrun(config_of, tmp_path):
    paths = [
        as_file(config_of(model_path=str(tmp_path / name)), tmp_path / f"{name}.json")
        for name in ("first", "second", "third")
    ]
    (tmp_path / "worker.py").write_text(WORKER)
    # refused within the process group: the run in this folder has another learning rate
    done = tiny.torchrun(2, [str(tmp_path / "worker.py"), *paths, str(tmp_path / "first")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("lr was 0.001 in the checkpoint at step 8 and is 0.5 now") == 2
    assert done.stderr.count("37 test rows scored") == 3
    runs = [comparable(tmp_path / name) for name in ("first", "second", "third")]
    assert runs[0] == runs[1] == runs[2]


def test_predict_after_train(config_of, files):
    results = train(config_of())
    frame = pd.read_csv(files / "test.csv", dtype=str, keep_default_na=False)
    predicted = Predictor.from_folder(results.folder).predict(frame)
    tested = pd.read_csv(results.test_folder / "test_result_0.tsv", sep="\t", float_precision="round_trip")
    assert predicted["prob"].tolist() == pytest.approx(tested["prob"].tolist(), abs=1e-6) and sys.stderr
