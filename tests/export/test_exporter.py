"""The exported folder gives PyTorch's probabilities: without PyTorch (ONNX), and without this package (.pt2)."""

import csv
import json
import logging
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbert_core import cli
from mmbert_core.config import Config
from mmbert_core.data.prepare import prepare
from mmbert_core.evaluation.calibration import Calibration
from mmbert_core.evaluation.decision import Decision
from mmbert_core.evaluation.thresholds import Threshold
from mmbert_core.export import example as export_example
from mmbert_core.export import exporter
from mmbert_core.inference.model_folder import LoadedModel, load_model_folder, save_model_folder
from mmbert_core.inference.output_file import output_delimiter, table_line
from mmbert_core.model import packed_attention
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.errors import InputError, RunError
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training.start import prepare_model
from tests.support import tiny

for package in exporter.ONNX_PACKAGES:
    pytest.importorskip(package)

CASES = {  # what a model may have and lack
    "both": {},
    "columns only": {"text_name": ()},
    "numbers only": {"text_name": (), "cat_field_list": ()},
    "categories only": {"text_name": (), "tab_field_list": (), "id_name": None},
    "three classes": {"num_classes": 3},
    "two texts in chunks": {
        "text_name": ("text", "kind"),
        "cat_field_list": (),
        "max_chunks": 3,
        "max_length": 9,
        "pooling": "mean",
    },
}
COLUMNS = ["row_id", "text", "age", "amount", "kind"]
HOSTILE = [
    ["007", 'she said "refund" now', "30", "1.5", "a"],
    ["NA", "two\nlines", "1e1", " 2.5 ", "b"],
    ['a"b', "two\r\nlines\r, and a\ttab", "NA", "", "c"],
    ["two\nlines", "", "", "null", ""],
    ["a\tb", " ", "nan", "#N/A", "never seen"],
    ["=1+1", "refund " * 200, "-1e30", "+.5", " a"],
    ["", "x" * 3000, "3.4e38", "1e-320", "A"],
    [" spaces ", "[SEP] [PAD] [CLS] [MASK] [UNK]", "٣", "-0", "NA"],
    ["日本", "é ́ 日本 😀 \u200b \u202e", "007", "1E5", "a\n"],
    ["\r", "Refund PAY,outside;shop", "<na>", "None", '"a"'],
    ["00001", "refund", "50", "2", "a"],
    ["00001", "NA", "50", "2", "a"],
    ["1.0", "True", "True", "FALSE", "True"],
]
BLOCKED = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "pandas", "mmbert_core"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def build(folder: Path, **changes) -> LoadedModel:
    """An untrained model whose probabilities are far from equal, as a folder and loaded from it."""
    config = Config(**tiny.settings(folder, **changes))
    data = prepare(config)
    model = prepare_model(config, data)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.eval().modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                module.weight.normal_(0, 0.3)  # as drawn they are so small that texts hardly differ
        batch, last = data.train.batch(range(64)), model.final_merge_network.linear_layer_final
        logits = model(batch.input_ids, batch.attention_mask, batch.numbers, batch.categories)
        last.weight /= logits.std(dim=0)[:, None]
        last.bias.copy_((last.bias - logits.mean(dim=0)) / logits.std(dim=0))
    run = Path(config.model_path)
    run.mkdir()
    resolved = {"pooling": model.pooling, "precision": "fp32"}
    decision = Decision(Threshold(0.45, "given"), Calibration(1.7, 300))
    save_model_folder(
        run,
        model.state_dict(),
        LoadedModel(model, config, data.features, data.labels, data.tokenizer, resolved, decision),
    )
    return load_model_folder(run)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[Path, LoadedModel]:
    """A folder with tables, the model `run` and its ONNX export `exported`."""
    folder = tmp_path_factory.mktemp("export")
    loaded = build(folder, **CASES[request.param])
    exporter.export_model(loaded, folder / "exported", format="onnx")
    return folder, loaded


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, LoadedModel]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, build(folder)


def test_the_example_keeps_its_input_and_says_what_is_wrong_with_it(case):
    folder, _ = case
    before = (folder / "test.csv").read_bytes()
    done = run_example(folder / "exported", str(folder / "test.csv"), str(folder / "test.csv"))
    assert done.returncode == 1 and "is the input file" in done.stderr and (folder / "test.csv").read_bytes() == before
    header = before.split(b"\n")[0]
    (folder / "broken.csv").write_bytes(header + b'\n"a"b' + b"," * header.count(b",") + b"\n")
    (folder / "out.tsv").write_text("of an earlier day")
    done = run_example(folder / "exported", str(folder / "broken.csv"), str(folder / "out.tsv"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert (folder / "out.tsv").read_text() == "of an earlier day" and not list(folder.glob("*.part"))


def run_example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """example.py in an empty place of its own, where importing torch, transformers, pandas or this package fails."""
    command = [sys.executable, "-c", BLOCKED, str(folder / "example.py"), *arguments]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )


def write_csv(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def entries(path: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files in an archive."""
    with zipfile.ZipFile(path) as archive:
        return [(entry.filename, entry.file_size) for entry in archive.infolist()]


def cpu_predictor(loaded: LoadedModel) -> Predictor:
    return Predictor(loaded, DistContext(0, 0, 1, 1, torch.device("cpu")), precision="fp32")


# ---- ONNX ----


def test_the_example_alone_predicts_what_the_package_predicts(case, tmp_path):
    folder, loaded = case
    with open(folder / "test.csv", newline="", encoding="utf-8") as stream:
        rows = [[row[column] for column in COLUMNS] for row in csv.DictReader(stream)]
    source = write_csv(tmp_path / "new.csv", HOSTILE + rows)
    done = run_example(folder / "exported", str(source), str(tmp_path / "found.tsv"))
    assert done.returncode == 0, done.stderr

    cpu_predictor(loaded).predict_file([str(source)], tmp_path / "expected.tsv")
    found, expected = read_tsv(tmp_path / "found.tsv"), read_tsv(tmp_path / "expected.tsv")
    assert len(found) == len(HOSTILE) + len(rows) and list(found[0]) == list(expected[0])
    for name in found[0]:
        ours, theirs = ([row[name] for row in each] for each in (expected, found))
        if name.startswith("prob"):
            np.testing.assert_allclose(np.array(theirs, float), np.array(ours, float), atol=1e-4, rtol=0)
            assert np.std(np.array(ours, float)) > 0.01, "a model that cannot tell rows apart proves nothing"
        else:
            assert theirs == ours


def test_the_graph_takes_any_number_of_rows_chunks_and_tokens(case):
    import onnxruntime

    folder, loaded = case
    session = onnxruntime.InferenceSession(folder / "exported" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs, axes = exporter.example_inputs(loaded)
    assert {
        each.name: {place: size for place, size in enumerate(each.shape) if isinstance(size, str)}
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
            name: [sizes[axes[name][place]] if place in axes[name] else size for place, size in enumerate(tensor.shape)]
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
    """Whoever feeds it: numbers far outside are those at the limit, and those in range are untouched."""
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
    assert (
        exporter.export_model(loaded, tmp_path / "checked", format="onnx", check=str(source)) < 1e-5
    )  # --check with such rows


def test_the_folder_names_no_path_of_this_machine(case):
    folder, loaded = case
    names = {"model.onnx", "preprocessing.json", "example.py", *(["tokenizer.json"] if loaded.config.text_name else [])}
    assert {path.name for path in (folder / "exported").iterdir()} == names
    for path in (folder / "exported").iterdir():
        content = path.read_bytes()
        assert str(folder).encode() not in content and str(tiny.ROOT).encode() not in content, path.name
    assert "Floor" not in (folder / "exported" / "example.py").read_text()


def test_a_wrong_row_is_one_line(plain, tmp_path):
    folder, loaded = plain
    exporter.export_model(loaded, tmp_path / "exported", format="onnx")
    good = ["r", "refund", "1", "2", "a"]
    for name, rows, columns, problem in (
        ("number", [good, ["r", "refund", "1_0", "2", "a"]], COLUMNS, "expected a finite number, found '1_0'"),
        ("column", [good[:4]], COLUMNS[:4], "expected the column 'kind' once, found it 0 times"),
        ("cells", [good, good[:4]], COLUMNS, "before line 4: expected rows of 5 cells, found 4"),
        ("blank", [good, [], good], COLUMNS, "found a blank line"),
    ):
        source = write_csv(tmp_path / f"{name}.csv", rows, columns)
        done = run_example(tmp_path / "exported", str(source), str(tmp_path / "out.tsv"))
        assert done.returncode == 1 and problem in done.stderr and len(done.stderr.splitlines()) == 1
    source.write_bytes(
        b"\xef\xbb\xbf" + source.read_bytes().replace(b"\r\n\r\n", b"\r\n") + b"\r\n\r\n"
    )  # a mark at the start, blank lines at the end
    assert run_example(tmp_path / "exported", str(source), str(tmp_path / "out.tsv")).returncode == 0
    assert len(read_tsv(tmp_path / "out.tsv")) == 2


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
    assert (
        cli.main(
            [
                "export",
                str(folder / "run"),
                str(tmp_path / "new" / "exported"),
                "--format",
                "torch_export",
                "--check",
                str(folder / "test.csv"),
            ]
        )
        == 0
    )
    told = capsys.readouterr().err
    assert "37 rows of" in told and "differ from PyTorch's by at most" in told and "model.pt2" in told
    assert (
        cli.main(["export", str(folder / "run"), str(tmp_path / "new" / "exported"), "--format", "torch_export"]) == 2
    )
    assert "expected a new or empty folder, found files in it" in capsys.readouterr().err
    with pytest.raises(InputError, match="found the one that this command runs in"):
        exporter.check_request(Path("."), "onnx")
    assert cli.main(["export", str(folder / "run"), str(tmp_path / "x"), "--format", "onnx", "--chek", "f"]) == 2
    assert "did you mean '--check'?" in capsys.readouterr().err


def test_the_loaded_model_stays_as_it_was(plain, tmp_path):
    _, loaded = plain
    text = loaded.model.text_subnetwork
    before, truncation = (
        {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()},
        loaded.tokenizer.backend_tokenizer.truncation,
    )
    exporter.export_model(loaded, tmp_path / "exported", format="torch_export")
    assert (
        text.is_packed
        and text.encoder.config._attn_implementation == packed_attention.ATTENTION
        and loaded.tokenizer.backend_tokenizer.truncation == truncation
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("wrong", ["probabilities", "no number"])
def test_other_probabilities_leave_nothing(plain, tmp_path, monkeypatch, wrong):
    _, loaded = plain
    honest = exporter.in_memory

    def dishonest(program):
        run = honest(program)
        return lambda inputs: run(inputs) + (2e-4 if wrong == "probabilities" else np.nan)

    monkeypatch.setattr(exporter, "in_memory", dishonest)
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


def test_made_up_rows_try_every_kind_of_cell(plain):
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


def test_the_exporters_own_words_are_not_heard(plain, tmp_path, monkeypatch, capfd, caplog, recwarn):
    honest = torch.export.export

    def talkative(*arguments, **options):
        print("graph():", file=sys.stderr)
        warnings.warn("about the future", FutureWarning)
        logging.getLogger("torch.fx").warning("an aside")
        return honest(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", talkative)
    capfd.readouterr()
    exporter.export_model(plain[1], tmp_path / "exported", format="torch_export")
    assert capfd.readouterr().err == "" and not recwarn.list
    logging.getLogger("torch.fx").warning("heard again")
    assert "an aside" not in caplog.text and "heard again" in caplog.text


def test_the_example_writes_the_lines_of_the_package():
    cells = ["007", "a\tb", "a,b", 'say "x"', "two\nlines", "\r", " ", "", np.float32(0.1)]
    for name in ("out.csv", "OUT.CSV", "out.tsv", "out.txt", "out"):
        delimiter = export_example.output_delimiter(name)
        assert delimiter == output_delimiter(name)
        assert export_example.table_line(cells, delimiter) == table_line(cells, delimiter=delimiter)
    for name in ("out.parquet", "out.jsonl", "out.xlsx", "out.csv.gz"):
        for check in (export_example.output_delimiter, output_delimiter):
            with pytest.raises(ValueError, match="expected an output that ends in .tsv or .csv"):
                check(name)


def test_without_a_training_range_the_graph_limits_nothing(tmp_path):
    """As the package, which has none from an older folder without its cache."""
    loaded = build(tmp_path, **CASES["numbers only"])
    loaded = replace(loaded, features=replace(loaded.features, minimums=None, maximums=None))
    assert exporter.export_model(loaded, tmp_path / "exported", format="onnx") < 1e-5
    assert json.loads((tmp_path / "exported" / "preprocessing.json").read_text())["numbers"]["limits"] is None
    assert exporter.input_limits(loaded) is None
