"""MultimodalClassifier alone: what it predicts is what the command line predicts, from disk and as bytes too."""

import copy
import gc
import json
import pickle

import numpy as np
import pandas as pd
import pytest

from mmbert_core import InputError, MultimodalClassifier, Predictor, cli, read_config, train
from mmbert_core.estimator.classes import Classes
from mmbert_core.estimator.stored import model_file_names
from mmbert_core.training import loop
from tests.estimator.conftest import QUICK, frame_of

pytestmark = pytest.mark.usefixtures("one_thread")

ROLES = {
    "key": "id",
    "message": "text",
    "age": "number",
    "amount": "number",
    "kind": "category",
    "grade": "category",
    "has_photo": "number",
    "is_new": "number",
    "country": "category",
    "sent": "date",
    "tags": "left out",
    "is_abuse": "label",
}


def test_roles_are_inferred_with_reasons(fitted):
    assert {name: found.role for name, found in fitted.roles_.items()} == ROLES
    assert "list" in fitted.roles_["tags"].reason and "dtype is category" in fitted.roles_["grade"].reason
    assert all(found.reason for found in fitted.roles_.values())
    assert list(fitted.feature_names_in_) == [name for name in ROLES if name != "is_abuse"]
    assert (fitted.n_features_in_, fitted.label_) == (11, "is_abuse")


def test_predictions_are_those_of_the_command_line(fitted, frame, encoder, folder):
    """A CSV that pandas wrote, a config with the inferred roles, `mmbert predict`."""
    frame.drop(columns="tags").to_csv(folder / "train.csv", index=False)
    keys = {"text": "text_name", "number": "tab_field_list", "category": "cat_field_list", "date": "date_field_list"}
    roles = {key: [name for name, role in ROLES.items() if role == kind] for kind, key in keys.items()}
    values = {**QUICK, **roles, "id_name": "key", "label_name": "is_abuse", "encoder": encoder}
    train(read_config(None, {**values, "train_path": ["train.csv"], "model_path": "run"}))
    assert cli.main(["predict", "run", "train.csv", "predictions.csv", "--num_threads", "1"]) == 0
    predictions = pd.read_csv(folder / "predictions.csv", dtype={"prob": np.float32})
    probabilities = fitted.predict_proba(frame)
    assert probabilities.shape == (len(frame), 2) and probabilities.dtype == np.float64
    np.testing.assert_array_equal(probabilities[:, 1].astype(np.float32), predictions["prob"])
    np.testing.assert_array_equal(fitted.predict(frame), predictions["pred"])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-15)
    assert fitted.predict(frame).dtype == frame["is_abuse"].dtype
    accuracy = (predictions["pred"] == predictions["label"]).mean()
    assert fitted.score(frame) == fitted.score(frame, frame["is_abuse"]) == accuracy
    assert fitted.predict_proba(frame.iloc[:0]).shape == (0, 2)


def test_a_saved_and_a_pickled_model_predict_the_same(fitted, frame, folder):
    expected = fitted.predict_proba(frame)
    fitted.save("models/abuse")
    loaded = MultimodalClassifier.from_folder("models/abuse")
    copies = [loaded, pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted), pickle.loads(pickle.dumps(loaded))]
    for other in copies:
        np.testing.assert_array_equal(other.predict_proba(frame), expected)
        assert other.roles_ == fitted.roles_ and list(other.feature_names_in_) == list(fitted.feature_names_in_)
        assert other.classes_.dtype == np.int64 and other.classes_.tolist() == [0, 1]
    assert copies[1].get_params() == fitted.get_params() and copies[1].results_ == fitted.results_
    assert Predictor.from_folder("models/abuse").predict(frame)["prob"].tolist() == expected[:, 1].tolist()
    with pytest.raises(InputError, match="exists already"):
        fitted.save("models/abuse")
    paths = [copied.folder_ for copied in copies[1:]]
    assert all(path.is_dir() for path in paths)
    del copies, other
    gc.collect()
    assert not any(path.is_dir() for path in paths), "temporary folders end with their models"


def test_parameters_of_a_folder_repeat_its_training(fitted, frame, folder, encoder):
    fitted.save("model")
    again = MultimodalClassifier.from_folder("model")
    parameters = again.get_params()
    assert {key: parameters[key] for key in QUICK} == QUICK and parameters["encoder"] == encoder
    assert parameters["group"] == [] and parameters["id"] == "key"
    assert set(parameters) == {*MultimodalClassifier.NAMES, *QUICK}
    expected = fitted.predict_proba(frame)
    np.testing.assert_array_equal(again.fit(frame, label="is_abuse").predict_proba(frame), expected)


def test_damage_is_refused(fitted, folder):
    fitted.save("model")
    record = folder / "model/estimator.json"
    values = json.loads(record.read_text())
    for classes, problem in (
        ({"dtype": "int64", "values": [0, 2]}, "expected the labels '0', '1'"),
        ({"dtype": "int8", "values": [0, 1000]}, "classes"),
        ({"dtype": "U9", "values": ["0", "1"]}, "dtype"),
    ):
        record.write_text(json.dumps(values | {"classes": classes}))
        with pytest.raises(InputError, match=f"estimator.json.*{problem}"):
            MultimodalClassifier.from_folder("model")
    state = fitted.__getstate__()
    assert sorted(state["files"]) == sorted(model_file_names(fitted.folder_))
    changed = bytearray(state["files"]["model.safetensors"])
    changed[-1] ^= 1
    for files, problem in (
        (state["files"] | {"model.safetensors": bytes(changed)}, "not as it was written"),
        (state["files"] | {"../outside": b""}, "expected files of a model folder"),
        (state["files"] | {"encoder/../../x.json": b""}, "expected files of a model folder"),
        ({name: content for name, content in state["files"].items() if name != "MANIFEST.json"}, "MANIFEST.json"),
    ):
        with pytest.raises(InputError, match=problem):
            MultimodalClassifier().__setstate__(state | {"files": files})


def test_report_writes_the_page_and_returns_the_figures(fitted, frame, folder):
    evaluation = fitted.report(frame, slice_columns=["kind"])
    assert evaluation.folder.parent.name == "reports" and evaluation.page.is_file()
    figures = json.loads((evaluation.folder / "test_metrics.json").read_text())
    assert evaluation.metrics["auroc"] == figures["test/auroc"] and evaluation.num_rows == len(frame)
    assert evaluation.metrics["accuracy"] == pytest.approx(fitted.score(frame))
    low, high = evaluation.intervals["auroc"]
    assert low <= evaluation.metrics["auroc"] <= high and "most frequent class" in evaluation.baselines
    assert "test/auroc" in str(evaluation) and "95 % interval" in str(evaluation)


def test_model_path_is_the_folder_of_the_run_without_the_rows(encoder, frame, folder):
    model = MultimodalClassifier(encoder=encoder, model_path="run", **QUICK).fit(frame, label="is_abuse")
    assert not (folder / "run/rows").exists() and (folder / "run/model.safetensors").is_file()
    weights = (folder / "run/model.safetensors").stat().st_mtime_ns
    MultimodalClassifier(encoder=encoder, model_path="run", **QUICK).fit(frame, label="is_abuse")
    assert (folder / "run/model.safetensors").stat().st_mtime_ns == weights, "a finished run is not repeated"
    with pytest.raises(InputError, match="model_path: the run in this folder has other rows"):
        MultimodalClassifier(encoder=encoder, model_path="run", **QUICK).fit(frame[20:], label="is_abuse")
    assert model.report(frame).folder.parent == model.folder_


def test_an_interrupted_fit_resumes(encoder, frame, fitted, folder, monkeypatch):
    model = MultimodalClassifier(encoder=encoder, model_path="run", save_every=2, **QUICK)
    save = loop.save

    def interrupted_save(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save", interrupted_save)
        model.fit(frame, label="is_abuse")
    assert not (folder / "run/rows").exists() and any((folder / "run/checkpoints").iterdir())
    model.fit(frame, label="is_abuse")
    assert model.results_.steps == fitted.results_.steps
    np.testing.assert_array_equal(model.predict_proba(frame), fitted.predict_proba(frame))


def test_several_classes_as_texts_with_validation_rows(encoder, folder):
    frame = frame_of(90)
    y = np.array(["low", "mid", "high"])[np.arange(90) % 3]
    names = {"text": "message", "numbers": ["age"], "categories": [], "dates": [], "id": [], "group": []}
    model = MultimodalClassifier(encoder=encoder, **names, **QUICK)
    model.fit(frame[:60], y[:60], eval_set=[(frame[60:], y[60:])])
    assert model.classes_.tolist() == ["high", "low", "mid"] and model.classes_.dtype == y.dtype
    assert model.label_ == "label" and model.results_.train_rows == 60
    probabilities = model.predict_proba(frame)
    assert probabilities.shape == (90, 3) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-12)
    columns = Predictor.from_folder(model.folder_).predict(frame)
    for index, name in enumerate(model.classes_):
        np.testing.assert_allclose(probabilities[:, index], columns[f"prob_{name}"], atol=1e-6)
    assert (model.predict(frame) == model.classes_[probabilities.argmax(axis=1)]).all()
    assert model.roles_["amount"].role == "left out" and "not named in 'numbers'" in model.roles_["amount"].reason


def test_mistakes_are_one_line_each(encoder, frame, fitted, folder):
    X, y = frame.drop(columns="is_abuse"), frame["is_abuse"]
    for parameters, rows, problem in (
        ({}, {"X": X.to_numpy(), "y": y}, "X: expected a data frame, found ndarray"),
        ({}, {"X": X}, "expected labels as y, or the name of a column as label, found neither"),
        ({}, {"X": frame, "y": y, "label": "is_abuse"}, "found both"),
        ({}, {"X": X, "label": "is_abuse"}, "column 'is_abuse' not found"),
        ({}, {"X": X, "y": y[1:]}, "expected 120 labels"),
        ({}, {"X": X, "y": y.where(y.index != 4)}, "found none in 1 of 120, first in row"),
        ({}, {"X": X, "y": y.astype("boolean").mask(y.index == 4)}, "found none in 1 of 120, first in row"),
        ({}, {"X": X, "y": np.zeros(120)}, "expected two classes or more, found only 0.0"),
        ({}, {"X": X, "y": np.arange(120) / 7}, "expected classes .*, found 0.142857"),
        ({}, {"X": X, "y": np.array([1, "a"] * 60, dtype=object)}, "one type, found int, str"),
        ({}, {"X": X, "y": y.rename("is_new")}, "column with other values"),
        ({"numbers": ["agee"]}, {"X": X, "y": y}, "column 'agee' not found"),
        ({"numbers": 3.5}, {"X": X, "y": y}, "numbers: expected names of columns, found 3.5"),
        ({"id": ["key", "age"]}, {"X": X, "y": y}, "id: expected one column, found 2"),
        ({"numbers": ["kind"]}, {"X": X, "y": y}, "^X row 1, column 'kind': expected a finite number"),
        ({"positive_label": 2}, {"X": X, "y": y}, "positive_label: expected one of the labels '0', '1', found '2'"),
        ({"max_epochs": "many"}, {"X": X, "y": y}, "^max_epochs: expected a whole number, found 'many'"),
        ({"max_length": 512}, {"X": X, "y": y}, "max_length: expected at most 64 tokens"),
        ({}, {"X": X, "y": y, "eval_set": 3}, "eval_set: expected a pair"),
        ({}, {"X": X, "y": y, "eval_set": (X, y.replace(1, 2))}, "^eval_set row .*expected one of the labels '0', '1'"),
    ):
        model = MultimodalClassifier(**{"encoder": encoder, **QUICK, **parameters})
        with pytest.raises(InputError, match=problem) as caught:
            model.fit(**rows)
        assert "\n" not in str(caught.value) and "mmbert-" not in str(caught.value)
    for unknown, problem in (("epochs", "max_epochs"), ("text_name", "'text'"), ("num_classes", "labels")):
        with pytest.raises(InputError, match=problem):
            MultimodalClassifier(**{unknown: 3})
        with pytest.raises(InputError, match=problem):
            fitted.set_params(**{unknown: 3})
    with pytest.raises(InputError, match="not fitted yet"):
        MultimodalClassifier().predict(frame)
    with pytest.raises(InputError, match="column 'age' not found"):
        fitted.predict(frame.drop(columns="age"))
    with pytest.raises(InputError, match="expected labels of 0, 1, found 'a'"):
        fitted.score(frame, ["a"] * len(frame))


@pytest.mark.parametrize(
    ("labels", "values", "texts"),
    [
        (pd.Series([True, False, True], dtype="boolean"), [False, True], ("false", "true")),
        (pd.Series([2, 1, 2], dtype="Int64"), [1, 2], ("1", "2")),
        (pd.Series([1.0, 0.0]), [0.0, 1.0], ("0.0", "1.0")),
        (pd.Series(["b", "a"], dtype="category"), ["a", "b"], ("a", "b")),
        (pd.Series([10, 9, 10], dtype="category"), [9, 10], ("9", "10")),
        (np.array(["b", "a"]), ["a", "b"], ("a", "b")),
        (np.array([True, False], dtype=object), [False, True], ("false", "true")),
        (np.array([3, 2], dtype=np.uint8), [2, 3], ("2", "3")),
    ],
)
def test_classes_keep_values_and_dtype(labels, values, texts):
    classes = Classes.fit(labels.to_numpy() if isinstance(labels, pd.Series) else labels)
    assert classes.values.tolist() == values and classes.texts == texts
    again = Classes.from_json(json.loads(json.dumps(classes.to_json())), texts[::-1])
    assert again.values.dtype == classes.values.dtype and again.texts == texts and again.values.tolist() == values
