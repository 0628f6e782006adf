"""scikit-learn's own tools with a MultimodalClassifier, which does not depend on them."""

import ast
import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted

from mmbert_core import MultimodalClassifier
from tests.estimator.conftest import QUICK
from tests.support.source import ROOT, modules_on_disk, path_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> MultimodalClassifier:
    """Not fitted; columns only, which is quicker, unless a text is named."""
    return MultimodalClassifier(text=[], numbers=["age", "amount"], categories=["kind"], dates=[], **QUICK)


@pytest.fixture
def rows(frame) -> tuple[pd.DataFrame, pd.Series]:
    return frame.drop(columns="is_abuse"), frame["is_abuse"]


def test_the_package_needs_no_scikit_learn():
    for module in modules_on_disk(ROOT):
        for node in ast.parse(path_of(ROOT, module).read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not any(name.startswith("sklearn") for name in names), f"{module} imports scikit-learn"


def test_clone_and_tags(model, fitted):
    copied = clone(model.set_params(max_epochs=np.int64(2), seed=3))
    assert copied.get_params() == model.get_params() and copied is not model
    assert is_classifier(model) and clone(copied).seed == 3
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(fitted))
    check_is_fitted(fitted)
    assert not hasattr(model, "classes_") and pickle.loads(pickle.dumps(model)).get_params() == model.get_params()


def test_cross_validation_in_a_pipeline(model, rows):
    pipeline = make_pipeline(FunctionTransformer(lambda X: X.assign(amount=X["amount"] * 2)), model)
    scores = cross_val_score(pipeline, *rows, cv=2, scoring="neg_log_loss", error_score="raise")
    assert scores.shape == (2,) and np.isfinite(scores).all()
    predicted = cross_val_predict(model, *rows, cv=2, method="predict_proba")
    assert predicted.shape == (len(rows[1]), 2) and np.allclose(predicted.sum(axis=1), 1)
    fitted = pipeline.fit(*rows)
    assert fitted.score(*rows) == (fitted.predict(rows[0]) == rows[1]).mean()
    assert fitted.classes_.tolist() == [0, 1] and "MultimodalClassifier" in fitted._repr_html_()


def test_a_grid_over_keys_of_the_config(model, rows):
    search = GridSearchCV(model, {"lr": np.array([1e-3, 1e-2]), "numbers": [["age"]]}, cv=2, scoring="roc_auc")
    search.fit(*rows)
    assert search.best_params_["lr"] in (1e-3, 1e-2) and not np.isnan(search.cv_results_["mean_test_score"]).any()
    assert list(search.feature_names_in_) == list(rows[0].columns)
    assert search.predict_proba(rows[0]).shape == (len(rows[1]), 2)


def test_calibration_and_importance_of_a_fitted_model(fitted, rows):
    calibrated = CalibratedClassifierCV(FrozenEstimator(fitted), method="sigmoid", cv=2).fit(*rows)
    assert calibrated.predict_proba(rows[0]).shape == (len(rows[1]), 2)
    few = rows[0][:30], rows[1][:30]
    importance = permutation_importance(fitted, *few, scoring="neg_log_loss", n_repeats=1, random_state=0)
    assert importance.importances.shape == (rows[0].shape[1], 1)
    unused = [list(rows[0].columns).index(name) for name in ("tags", "key")]
    assert (importance.importances[unused] == 0).all() and importance.importances.any()


@pytest.mark.slow
def test_two_processes(encoder, rows, fitted):
    model = MultimodalClassifier(encoder=encoder, **QUICK)
    alone, both = (cross_val_score(model, *rows, cv=2, n_jobs=n_jobs, error_score="raise") for n_jobs in (1, 2))
    np.testing.assert_array_equal(alone, both)
    few = rows[0][:30], rows[1][:30]
    importances = [permutation_importance(fitted, *few, n_repeats=1, random_state=0, n_jobs=jobs) for jobs in (1, 2)]
    np.testing.assert_array_equal(importances[0].importances, importances[1].importances)
    calibrated = CalibratedClassifierCV(model, cv=2, n_jobs=2).fit(*rows)
    assert calibrated.predict_proba(rows[0]).shape == (len(rows[1]), 2)
