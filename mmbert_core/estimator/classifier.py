"""MultimodalClassifier: from a data frame to a trained model, with scikit-learn's protocol.

model = MultimodalClassifier(text=["subject", "message"], encoder="models/bert").fit(train, label="is_abuse")
model.predict_proba(new)
print(model.report(test))
model.save("models/abuse")
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mmbert_core.data.labels import UNKNOWN, Labels
from mmbert_core.estimator.base import MultimodalEstimator
from mmbert_core.estimator.classes import Classes
from mmbert_core.estimator.frame_files import labelled_rows
from mmbert_core.runtime.errors import InputError, list_for_message


class MultimodalClassifier(MultimodalEstimator):
    """A classifier of text and columns for data frames; works in scikit-learn's tools, and without scikit-learn.

    Attributes after `fit` (N rows, K classes): `classes_` [K], the labels in order, with their dtype;
    `n_features_in_`, `feature_names_in_`, the columns of X without the label; `label_`, the label's name; `roles_`,
    column -> its `role` and the `reason`; `folder_`, the model's folder; `results_`, what `train` returns.
    """

    NAMES = (*MultimodalEstimator.NAMES[:-1], "positive_label", "model_path")
    _estimator_type = "classifier"  # for scikit-learn before 1.6

    def __init__(
        self,
        text: str | Sequence[str] | None = None,
        numbers: str | Sequence[str] | None = None,
        categories: str | Sequence[str] | None = None,
        dates: str | Sequence[str] | None = None,
        id: str | None = None,
        group: str | None = None,
        encoder: str | None = None,
        positive_label: Any = None,
        model_path: str | None = None,
        **settings: Any,
    ) -> None:
        """Nothing is read before `fit`. Raises `InputError` for a parameter that does not exist.

        `text` ... `dates`: the columns of a role, which then has these alone (`[]`: none); None: inferred from the
        frame as `mmbert init` does. `id`: copied to predictions; `group`: its rows stay together, in training or in
        validation; `[]`: none. `encoder`: a folder or a name on the hub. `positive_label`: class 1 of two (threshold,
        F1); None: `classes_[1]`. `model_path`: the run's folder, in which an interrupted `fit` resumes; None: a
        temporary one. `settings`: any other key of the config, such as max_epochs, lr, seed, fusion; a key that is not
        named has the value of the recommended recipe.
        """
        super().__init__(
            text=text,
            numbers=numbers,
            categories=categories,
            dates=dates,
            id=id,
            group=group,
            encoder=encoder,
            positive_label=positive_label,
            model_path=model_path,
            **settings,
        )

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags  # only scikit-learn asks for them

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(allow_nan=True, categorical=True, string=True),
        )

    # ---- classes ----

    @property
    def classes_(self) -> np.ndarray:
        """The classes [K] in order, with the dtype of the labels of `fit`."""
        if not self.__sklearn_is_fitted__():
            raise AttributeError(f"{type(self).__name__} has classes_ after fit")
        return self._classes.values

    def _fit_classes(self, labels: np.ndarray) -> Classes:
        return Classes.fit(labels)

    def _task_values(self, classes: Classes) -> dict[str, Any]:
        values = {"is_binary": len(classes) == 2, "num_classes": len(classes), "positive_label": None}
        if self.positive_label is not None:
            [values["positive_label"]] = classes.cells(np.array([self.positive_label]))
        elif len(classes) == 2:
            names = Labels.fit(classes.texts, num_classes=2).names
            if names[1] != classes.texts[1]:  # -1.0 and -2.0 are in another order as texts
                values["positive_label"] = classes.texts[1]
        return values

    # ---- predictions ----

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        """The predicted classes [N], with the dtype of `classes_`.

        Of two classes by the threshold that was chosen on the validation rows (`threshold_rule`), so that it may
        differ from the class of the larger probability. Raises `InputError` for a missing column or an invalid cell.
        """
        index_of = {text: index for index, text in enumerate(self._fitted_classes().texts)}
        return self.classes_[[index_of[text] for text in self._predictions(X)["pred"]]]

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray:
        """Probabilities [N, K] float64 in the order of `classes_`, not calibrated: what `mmbert predict` writes."""
        classes, predictor = self._fitted_classes(), self._fitted()
        predictions = self._predictions(X)
        if predictor.loaded.config.is_binary:
            positive = predictions["prob"].to_numpy(dtype=np.float64)
            columns = {text: positive if text == predictor.positive_label else 1 - positive for text in classes.texts}
            return np.stack(list(columns.values()), axis=1)
        probabilities = predictions[[f"prob_{text}" for text in classes.texts]].to_numpy(dtype=np.float64)
        return probabilities / probabilities.sum(axis=1, keepdims=True)  # float32 sums to 1 up to its rounding

    def predict_log_proba(self, X: pd.DataFrame) -> np.ndarray:
        """Logarithms of `predict_proba` [N, K]."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def score(self, X: pd.DataFrame, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of `predict`, 0..1. Without `y` the labels are the column of X that `fit` was given.

        Raises `InputError` where no label is one of `classes_`.
        """
        rows = labelled_rows(X, y, self.label_ if y is None and self._fitted() else None)
        labels = self._fitted().loaded.labels
        known = labels.lookup(self._classes.cells(rows.labels))
        if len(known) and (known == UNKNOWN).all():
            found = list_for_message(list(dict.fromkeys(rows.labels.tolist())))
            raise InputError(f"y: expected labels of {list_for_message(self.classes_.tolist())}, found {found}")
        correct = labels.lookup(list(self._predictions(rows.frame)["pred"])) == known
        return float(np.average(correct, weights=sample_weight))

    def _fitted_classes(self) -> Classes:
        self._fitted()
        return self._classes
