"""What every estimator does: fit from data frames by the run of a config, save, load, evaluate, be pickled."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from mmbert_core.config import SETTINGS, Config
from mmbert_core.config_reader import read_config
from mmbert_core.config_recipe import RECOMMENDED
from mmbert_core.data.column_roles import LABEL, ColumnRole
from mmbert_core.estimator.classes import Classes
from mmbert_core.estimator.evaluation import Evaluation
from mmbert_core.estimator.frame_files import (
    LabelledRows,
    check_frame,
    csv_of,
    frames_in_errors,
    labelled_eval_set,
    labelled_rows,
    written_rows,
)
from mmbert_core.estimator.frame_roles import GIVEN, ROLES, config_columns, given_columns, log_inferred, roles_of
from mmbert_core.estimator.parameters import ADVICE, ROLE_KEYS, Parameters, check_names
from mmbert_core.estimator.stored import (
    TemporaryFolder,
    copy_model,
    read_estimator,
    read_model,
    write_estimator,
    write_model,
)
from mmbert_core.predictor import Predictor
from mmbert_core.runtime import ranks
from mmbert_core.runtime.errors import InputError
from mmbert_core.runtime.log_handler import visible_lines
from mmbert_core.tables.table import Roles
from mmbert_core.training.results import Results
from mmbert_core.training.run_folder import check_folder, check_no_links
from mmbert_core.training.train import train

logger = logging.getLogger(__name__)

REPORTS = Path("reports")  # of models in a temporary folder
NOT_OF_A_MODEL = ("resume", "cache_path", "model_path", "recipe")  # keys that `from_folder` does not take as parameters

Self = TypeVar("Self", bound="MultimodalEstimator")


class MultimodalEstimator(Parameters):
    """Base of the estimators. Its parameters are roles of columns, the encoder, and any key of the config."""

    NAMES = (*ROLE_KEYS, "encoder", "model_path")

    def __init__(self, **parameters: Any) -> None:
        check_names(parameters, self.NAMES)
        for name in self.NAMES:
            setattr(self, name, None)
        for name, value in parameters.items():
            setattr(self, name, value)

    # ---- what a kind of estimator decides ----

    def _fit_classes(self, labels: np.ndarray) -> Classes:
        """The classes of the labels [N]."""
        raise NotImplementedError

    def _task_values(self, classes: Classes) -> dict[str, Any]:
        """The keys of the config that say what the task is."""
        raise NotImplementedError

    # ---- training ----

    def fit(self: Self, X: pd.DataFrame, y: Any = None, label: str | None = None, eval_set: Any = None) -> Self:
        """Train on a data frame, as the command line does on a file of the same cells; returns the estimator.

        `y` [N]: the labels (array, series, list), or `label`: the column of X that holds them. `eval_set`: validation
        rows, a pair (X, y) or a frame with the label's column; without it, `val_fraction` of the rows (0.1).
        A missing value of any kind is an empty cell. Logged: every inferred role, and what a training logs.
        Raises `InputError` for a mistake in parameters or data, `RunError` when the training itself fails.
        """
        if (num_processes := ranks.read_context().world_size) > 1:
            raise InputError(f"fit: expected one process, found {num_processes}: for several use train.py or `train`")
        with visible_lines(is_main=True):
            rows = labelled_rows(X, y, label)
            validation = labelled_eval_set(eval_set, rows.label)
            classes = self._fit_classes(rows.labels)
            parameters = self.get_params()
            given, date_order = given_columns(parameters), parameters.get("date_order")
            roles = roles_of(rows.frame, rows.label, classes.cells(rows.labels), given, date_order=date_order)
            log_inferred(roles)
            temporary = TemporaryFolder() if self.model_path is None else None
            folder = Path(self.model_path) if temporary is None else temporary.path
            values = self.config_values() | self._task_values(classes) | config_columns(roles, given)
            values |= {"date_order": roles.date_order, "label_name": rows.label, "model_path": str(folder)}
            with frames_in_errors({}):
                config = read_config(None, values)
            results = train_on_frames(config, {"train": rows, "val": validation}, classes)
            write_estimator(folder, classes, [str(name) for name in rows.frame.columns], roles.roles)
            if temporary is not None:
                for name in ("checkpoints", "cache"):
                    shutil.rmtree(folder / name, ignore_errors=True)
                logger.info("the model is in a temporary folder, which ends with this object: save(folder) keeps it")
            self._load(folder, temporary)
            self.results_ = results
        return self

    # ---- the trained model ----

    def _load(self, folder: Path, temporary: TemporaryFolder | None, predictor: Predictor | None = None) -> None:
        """Take the model of a folder, which is checked. Sets the attributes that a fitted estimator has."""
        predictor = predictor or Predictor.from_folder(folder)
        config, names = predictor.loaded.config, predictor.loaded.labels.names
        stored = read_estimator(folder, names)
        self._classes, columns, roles = stored or (Classes.from_names(names), None, roles_in_config(config))
        self._predictor, self._temporary, self.folder_ = predictor, temporary, folder
        self.label_ = config.label_name
        self.roles_ = roles
        self.feature_names_in_ = np.array(columns or Roles.from_config(config).inputs(), dtype=object)
        self.n_features_in_ = len(self.feature_names_in_)

    def _fitted(self) -> Predictor:
        if not self.__sklearn_is_fitted__():
            raise InputError(f"this {type(self).__name__} is not fitted yet: call fit first")
        return self._predictor

    def __sklearn_is_fitted__(self) -> bool:
        return "_predictor" in vars(self)

    def _predictions(self, X: pd.DataFrame) -> pd.DataFrame:
        """The columns of a prediction file for N rows."""
        return self._fitted().predict(check_frame(X))

    def report(
        self,
        X: pd.DataFrame,
        y: Any = None,
        label: str | None = None,
        folder: str | Path | None = None,
        slice_columns: Sequence[str] = (),
    ) -> Evaluation:
        """Evaluate labelled rows as `mmbert evaluate` does: figures, intervals, baselines, predictions and the page.

        Labels as in `fit`; with neither, the column that `fit` was given. The files are written to a new folder in
        `folder`: by default the model's, or `reports` where the model is in a temporary folder. `slice_columns`:
        columns for each of whose values the metrics are also computed. Raises `InputError`.
        """
        predictor = self._fitted()
        config = predictor.loaded.config
        rows = labelled_rows(X, y, self.label_ if y is None and label is None else label)
        inputs = dict.fromkeys([*Roles.from_config(config).inputs(), *slice_columns])
        cells = {config.label_name: self._classes.cells(rows.labels)}
        text = csv_of(rows.frame, inputs, config.slice_columns, cells)
        parent = folder or (REPORTS if self._temporary is not None else self.folder_)
        check_folder("folder", str(parent))
        temporary = TemporaryFolder()
        with visible_lines(is_main=True), written_rows(temporary.path, {"test": text}) as paths:
            with frames_in_errors({paths["test"]: "X"}):
                figures, written = predictor.evaluate_file([str(paths["test"])], parent, slice_columns=slice_columns)
            evaluation = Evaluation.from_figures(figures, written, config)
            logger.info("report: %s", evaluation.page or f"none; the figures are in {written}")
        return evaluation

    # ---- on disk and as bytes ----

    def save(self, folder: str | Path) -> None:
        """Copy the model to a new folder, for `from_folder` and for every command that takes a model folder.

        Raises `InputError` for a folder that is not empty.
        """
        self._fitted()
        copy_model(self.folder_, Path(folder))

    @classmethod
    def from_folder(cls: type[Self], folder: str | Path) -> Self:
        """The estimator of a model folder: one that `save` or `fit` wrote, or that of any run of the same task.

        Its parameters are those with which the model was trained, roles included. Without estimator.json, which
        estimators write, the classes are texts. Raises `InputError` for a folder that is incomplete or damaged.
        """
        predictor = Predictor.from_folder(folder)
        estimator = cls(**cls._parameters_of(predictor.loaded.config))
        estimator._load(Path(folder), None, predictor)
        return estimator

    @classmethod
    def _parameters_of(cls, config: Config) -> dict[str, Any]:
        """The parameters with which a run of this config is repeated."""
        values = config.to_dict()
        roles = {name: values[key] or [] for name, key in ROLE_KEYS.items()}
        task = {key: values[key] for key in (*ROLE_KEYS.values(), "label_name", "is_binary", "num_classes")}
        recipe = values["recipe"] or "original"
        defaults = read_config(None, {**task, "recipe": recipe, "model_path": config.model_path, "resume": "never"})
        not_set = {*NOT_OF_A_MODEL, *ADVICE, *cls.NAMES}
        changed = {
            key: values[key]
            for key, default in defaults.to_dict().items()
            if key not in not_set and values[key] != default
        }
        own = {name: values[name] for name in cls.NAMES if name in SETTINGS and name != "model_path"}
        return {**roles, **own, **changed, **({} if recipe == RECOMMENDED else {"recipe": recipe})}

    def __getstate__(self) -> dict[str, Any]:
        """Parameters and, of a fitted estimator, the bytes of its model folder's files."""
        state = {"parameters": self.get_params(), "files": None, "results": vars(self).get("results_")}
        if self.__sklearn_is_fitted__():
            state["files"] = read_model(self.folder_)
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Write the files to a temporary folder and load it. Raises `InputError` as `from_folder` does."""
        MultimodalEstimator.__init__(self, **state["parameters"])
        if state["files"] is not None:
            temporary = TemporaryFolder()
            write_model(state["files"], temporary.path)
            self._load(temporary.path, temporary)
        if state["results"] is not None:
            self.results_ = state["results"]


def train_on_frames(config: Config, splits: Mapping[str, LabelledRows | None], classes: Classes) -> Results:
    """`train` on files of the rows of `train` and `val`, which are in the run's folder while it reads them.

    Raises `InputError` and `RunError`, about the frames.
    """
    check_folder("model_path", config.model_path)
    check_no_links(Path(config.model_path))
    inputs, group = Roles.from_config(config).inputs(), [config.group_name] * (config.group_name is not None)
    texts, names = {}, {"train": "X", "val": "eval_set"}
    for name, rows in splits.items():
        if rows is not None:
            needed = dict.fromkeys([*inputs, *(group if name == "train" else [])])
            texts[name] = csv_of(rows.frame, needed, group, {rows.label: classes.cells(rows.labels)})
    with written_rows(Path(config.model_path), texts) as paths:
        files = {f"{name}_path": (str(path),) for name, path in paths.items()}
        with frames_in_errors({path: names[name] for name, path in paths.items()}):
            return train(replace(config, **files))


def roles_in_config(config: Config) -> dict[str, ColumnRole]:
    """The roles of the columns that a config names."""
    columns = {LABEL: [config.label_name]}
    for name, key in ROLE_KEYS.items():
        value = getattr(config, key)
        columns[ROLES[name]] = [value] if isinstance(value, str) else list(value or ())
    roles: dict[str, ColumnRole] = {}
    for role in (*ROLES.values(), LABEL):
        for name in columns[role]:
            roles.setdefault(name, ColumnRole(role, GIVEN))
    return roles
