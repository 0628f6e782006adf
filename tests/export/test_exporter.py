"""The exported folder gives PyTorch's probabilities: without PyTorch (ONNX), and without this package (.pt2)."""

import json
import logging
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbert_core import cli
from mmbert_core.export import example as export_example
from mmbert_core.export import exporter
from mmbert_core.model import packed_attention
from mmbert_core.runtime.errors import InputError, RunError
from tests.support import tiny
from tests.support.exports import CASES, build, cpu_predictor, write_csv

for package in exporter.ONNX_PACKAGES:
    pytest.importorskip(package)


def entries(path: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files in an archive."""
    with zipfile.ZipFile(path) as archive:
        return [(entry.filename, entry.file_size) for entry in archive.infolist()]


# ---- ONNX ----


def test_the_graph_takes_any_number_of_rows_chunks_and_tokens(case):
    import onnxruntime

    folder, loaded = case
    session = onnxruntime.InferenceSession(folder / "exported" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs, axes = exporter.example_inputs(loaded)
    assert {
        each.name: {axis: size for axis, size in enumerate(each.shape) if isinstance(size, str)}
        for each in session.get_inputs()
    } == axes
    assert [each.type for each in session.get_inputs()] == [
        f"tensor({'float' if name == 'numbers' else 'int64'})" for name in inputs
    ]
    [output] = session.get_outputs()
    assert (output.name, output.shape) == ("probabilities", ["batch"] if loaded.config.is_binary else ["batch", 3])
    for batch, chunks, tokens in ((1, 1, 1), (5, 3, 9), (2, 1, 9)):
        sizes = {"batch": batch, "chunks": chunks, "tokens": tokens}
        shapes = {
            name: [sizes[axes[name][axis]] if axis in axes[name] else size for axis, size in enumerate(tensor.shape)]
            for name, tensor in inputs.items()
        }
        fed = {name: np.ones(shapes[name], dtype=tensor.numpy().dtype) for name, tensor in inputs.items()}
        [found] = session.run(["probabilities"], fed)
        tensors = {name: torch.from_numpy(values) for name, values in fed.items()}
        with torch.inference_mode():
            logits = loaded.model(
                tensors.get("input_ids"),
                tensors.get("attention_mask"),
                tensors.get("numbers", torch.zeros(batch, 0)),
                tensors.get("categories"),
            )
        expected = torch.softmax(logits, dim=1).numpy()
        np.testing.assert_allclose(found, expected[:, 1] if loaded.config.is_binary else expected, atol=1e-5)


def test_the_graph_itself_limits_numbers_to_the_training_range(case, tmp_path):
    """Numbers far outside the training range give the predictions of those at its limit; those inside are unchanged."""
    import onnxruntime

    folder, loaded = case
    features = loaded.features
    stored = json.loads((folder / "exported" / "preprocessing.json").read_text())["numbers"]
    if not features.number_names:
        assert stored["limits"] == []
        return
    session = onnxruntime.InferenceSession(folder / "exported" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {name: tensor.numpy() for name, tensor in exporter.example_inputs(loaded)[0].items()}
    low, high = (np.array([pair[end] for pair in stored["limits"]]) for end in (0, 1))

    def probabilities(*rows: list[float]) -> np.ndarray:
        numbers = np.array(
            [
                features.transform_numbers(np.array([row]))[0]
                if np.isnan(row).any()
                else np.append(row, np.zeros(features.num_numbers - len(row)))
                for row in rows
            ]
        )
        [found] = session.run(["probabilities"], {**inputs, "numbers": numbers.astype(np.float32)})
        return found

    known = features.minimums
    far = probabilities([1e30] * len(low), [-1e30] * len(low), list(known))
    assert np.array_equal(far, probabilities(list(high), list(low), list(known)))
    assert not np.array_equal(far[0], far[2])
    if loaded.config.text_name:  # whose export takes seconds
        return
    source = write_csv(
        tmp_path / "far.csv",
        [
            ["r", "refund", age, amount, "a"]
            for age, amount in (("1e30", "-1e30"), ("-1e30", "1e30"), ("7", "1e9"), ("", "1"))
        ],
    )
    # --check with such rows
    assert exporter.export_model(loaded, tmp_path / "checked", format="onnx", check=str(source)) < 1e-5


def test_the_folder_names_no_path_of_this_machine(case):
    folder, loaded = case
    names = {"model.onnx", "preprocessing.json", "example.py", *(["tokenizer.json"] if loaded.config.text_name else [])}
    assert {path.name for path in (folder / "exported").iterdir()} == names
    for path in (folder / "exported").iterdir():
        content = path.read_bytes()
        assert str(folder).encode() not in content and str(tiny.ROOT).encode() not in content, path.name
    assert (folder / "exported" / "example.py").read_text() == Path(export_example.__file__).read_text()


# ---- torch.export ----


@pytest.mark.parametrize("changes", [{}, CASES["two texts in chunks"]], ids=["both", "chunks"])
def test_the_saved_program_is_the_model(tmp_path, changes):
    loaded = build(tmp_path, **changes)
    assert exporter.export_model(loaded, tmp_path / "exported", format="torch_export") <= 1e-5
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "model.pt2",
        "preprocessing.json",
        "tokenizer.json",
    }
    assert [size for name, size in entries(tmp_path / "exported" / "model.pt2") if name.endswith((".pt", ".pkl"))] == [
        0
    ], "nothing in it is a pickle"
    settings, tokenizer = export_example.load_preprocessing(tmp_path / "exported")
    run = exporter.in_memory(torch.export.load(tmp_path / "exported" / "model.pt2"))
    rows = exporter.rows_of_file(loaded, str(tmp_path / "test.csv"))
    expected = cpu_predictor(loaded).predict([{**row, "row_id": ""} for row in rows])
    for size in (1, 7, 256):
        found = export_example.score(rows, settings, tokenizer, run, max_rows=size)
        np.testing.assert_allclose(found, [row["prob"] for row in expected], atol=1e-5)


# ---- the command and its refusals ----


def test_the_command_says_what_it_compared(plain, tmp_path, capsys):
    folder, _ = plain
    command = ["export", str(folder / "run"), str(tmp_path / "new" / "exported"), "--format", "torch_export"]
    assert cli.main([*command, "--check", str(folder / "test.csv")]) == 0
    log = capsys.readouterr().err
    assert "37 rows of" in log and "differ from PyTorch's by at most" in log and "model.pt2" in log
    assert cli.main(command) == 2
    assert "expected a new or empty folder, found files in it" in capsys.readouterr().err
    with pytest.raises(InputError, match="found the one that this command runs in"):
        exporter.check_request(Path("."), "onnx")
    assert cli.main(["export", str(folder / "run"), str(tmp_path / "x"), "--format", "onnx", "--chek", "f"]) == 2
    assert "did you mean '--check'?" in capsys.readouterr().err


def test_the_loaded_model_stays_as_it_was(plain, tmp_path):
    _, loaded = plain
    text = loaded.model.text_subnetwork
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    truncation = loaded.tokenizer.backend_tokenizer.truncation
    exporter.export_model(loaded, tmp_path / "exported", format="torch_export")
    assert (
        text.is_packed
        and text.encoder.config._attn_implementation == packed_attention.ATTENTION
        and loaded.tokenizer.backend_tokenizer.truncation == truncation
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("wrong", ["probabilities", "not a number"])
def test_other_probabilities_leave_nothing(plain, tmp_path, monkeypatch, wrong):
    _, loaded = plain
    in_memory = exporter.in_memory

    def in_memory_with_error(program):
        run = in_memory(program)
        return lambda inputs: run(inputs) + (2e-4 if wrong == "probabilities" else np.nan)

    monkeypatch.setattr(exporter, "in_memory", in_memory_with_error)
    with pytest.raises(
        RunError, match=r"not written: expected PyTorch's probabilities to 0.0001, found a difference of (2.\de-04|nan)"
    ):
        exporter.export_model(loaded, tmp_path / "exported", format="torch_export")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_cannot_be_exported_is_one_line(plain, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise TypeError("data-dependent\nmany lines")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(
        RunError, match=r"^the encoder \(bert\) of this model cannot be exported as onnx: TypeError: data-dependent$"
    ):
        exporter.export_model(plain[1], tmp_path / "exported", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_at_once(plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.csv").write_text("text,age,amount,kind\n")
    with pytest.raises(InputError, match="expected a folder to make, found a file"):
        exporter.export_model(plain[1], tmp_path / "file", format="onnx")
    with pytest.raises(InputError, match="expected at least one row to compare"):
        exporter.export_model(plain[1], tmp_path / "new", format="torch_export", check=str(tmp_path / "empty.csv"))
    with pytest.raises(InputError, match="expected one of onnx, torch_export, found 'tf'"):
        exporter.export_model(plain[1], tmp_path / "new", format="tf")
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r"needs onnxscript: pip install 'mmbert_core\[onnx\]'"):
        exporter.export_model(plain[1], tmp_path / "new", format="onnx")
    assert not (tmp_path / "new").exists()


def test_generated_rows_have_every_kind_of_cell(plain):
    _, loaded = plain
    rows = exporter.generated_rows(loaded)
    assert rows == exporter.generated_rows(loaded) and len(rows) == exporter.GENERATED_ROWS
    assert {"", "NA"} < {row["age"] for row in rows} and {"", *loaded.features.categories[0]} < {
        row["kind"] for row in rows
    }
    words = [len(row["text"].split()) for row in rows]
    assert min(words) == 0 and max(words) > loaded.config.max_length
    assert json.loads(json.dumps(exporter.preprocessing(loaded), allow_nan=False))["text"]["columns"] == ["text"]
    assert np.std(exporter.probabilities_of(loaded, rows)) > 0.01


def test_what_the_exporter_logs_and_prints_is_hidden(plain, tmp_path, monkeypatch, capfd, caplog, recwarn):
    original = torch.export.export

    def export_with_messages(*arguments, **options):
        print("graph():", file=sys.stderr)
        warnings.warn("about the future", FutureWarning, stacklevel=1)
        logging.getLogger("torch.fx").warning("a message")
        return original(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", export_with_messages)
    capfd.readouterr()
    exporter.export_model(plain[1], tmp_path / "exported", format="torch_export")
    assert capfd.readouterr().err == "" and not recwarn.list
    logging.getLogger("torch.fx").warning("logged again")
    assert "a message" not in caplog.text and "logged again" in caplog.text


def test_without_a_training_range_the_graph_limits_nothing(tmp_path):
    """As the package, which has none from an older folder without its cache."""
    loaded = build(tmp_path, **CASES["numbers only"])
    loaded = replace(loaded, features=replace(loaded.features, minimums=None, maximums=None))
    assert exporter.export_model(loaded, tmp_path / "exported", format="onnx") < 1e-5
    assert json.loads((tmp_path / "exported" / "preprocessing.json").read_text())["numbers"]["limits"] is None
    assert exporter.input_limits(loaded) is None
