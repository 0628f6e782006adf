"""The end of a run: the best step's model folder, the test rows, the report."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmbert_core import hooks
from mmbert_core.data.dataset import Batch
from mmbert_core.evaluation.blending import BlendRecord
from mmbert_core.inference import scoring
from mmbert_core.inference.model_folder import LoadedModel, save_model_folder
from mmbert_core.report.build import PAGE, write_report
from mmbert_core.report.evaluated_rows import EvaluatedRows
from mmbert_core.report.formatting import BEFORE_FINE_TUNING
from mmbert_core.report.model_card import write_card
from mmbert_core.report.results import listed_figures
from mmbert_core.report.run_sections import data_section, training_section
from mmbert_core.report.typed_json import to_json
from mmbert_core.runtime import distributed, signals
from mmbert_core.runtime.errors import RunError, Stopped, phase
from mmbert_core.runtime.memory import peak_mb
from mmbert_core.storage.files import remove_stale_temporaries, write_json
from mmbert_core.training import checkpoint
from mmbert_core.training.average import swap_average
from mmbert_core.training.blend_fit import blend_with_members
from mmbert_core.training.checkpoint import TrainState
from mmbert_core.training.decision_fit import fit_decision
from mmbert_core.training.run import Run, rotate_checkpoints
from mmbert_core.training.run_folder import RESULTS
from mmbert_core.training.validation import evaluate

logger = logging.getLogger(__name__)

ROWS_TO_CHECK = 32  # training rows whose probabilities are checked when there are no validation rows


def finish(run: Run) -> dict[str, Any]:
    """Collective. Load the best weights, fit the decision, write the model folder, test, write train_results.json.

    Returns what train_results.json holds.
    Raises `RunError`, before anything of the model is written, when every step was skipped or when the model's
    probabilities are not finite.
    """
    distributed.on_main(lambda: check_not_all_skipped(run.state))
    best = run.state.step if run.state.best_step is None else run.state.best_step
    if best != run.state.step:
        run.model.load_state_dict(weights_for_all(run, best))
    else:
        swap_average(run.optimizer)  # for good: no step follows
    run.model.auxiliary_heads = None  # have served their purpose
    val_preds = validation_of_best(run)
    distributed.on_main(lambda: check_finite_predictions(run, best, val_preds))
    with phase("blend, threshold, calibration and baselines"):
        blend, val_preds = blend_with_members(run, val_preds)
        loaded = distributed.on_main(lambda: model_with_decision(run, val_preds, blend), share=False, long_timeout=True)
    with phase("writing the model folder"):
        distributed.on_main(lambda: save_model_folder(run.folder, checkpoint.weights_of(run.model), loaded))
    which = f"step 0 ({BEFORE_FINE_TUNING})" if best == 0 else f"step {best}"
    run.log.say(f"model of {which} written to {run.folder}")
    test_figures, test_folder = test(run, loaded) if run.data.test is not None else (None, None)
    best_figures = {"step": best, "metric": run.state.best_metric, "value": run.state.best_value}
    distributed.on_main(
        lambda: write_card(
            run.folder, loaded, data=to_json(data_section(run.data)), best=best_figures, test=test_figures
        )
    )
    results = results_record(run, best, test_figures, test_folder)
    distributed.on_main(lambda: remove_old_checkpoints(run))
    distributed.on_main(lambda: write_json(run.folder / RESULTS, results))
    return results


def results_record(
    run: Run, best: int, test_figures: dict[str, Any] | None, test_folder: Path | None
) -> dict[str, Any]:
    """What train_results.json holds."""
    state = run.state
    return {
        "steps": state.step,
        "epochs": state.rows_trained / len(run.data.train),
        "best_step": best,
        "best_metric": state.best_metric,
        "best_value": state.best_value,
        "rows": state.rows_trained,
        "train_rows": len(run.data.train),
        "skipped_steps": state.skipped_steps,
        "train_seconds": state.train_seconds,
        "train_rows_per_second": state.rows_trained / state.train_seconds,
        "peak_memory_mb": peak_mb(run.context.device),
        "world_size": run.context.world_size,
        **run.resolved,
        "test_folder": str(test_folder) if test_folder else None,
        "test_metrics": test_figures,
    }


def validation_of_best(run: Run) -> np.ndarray | None:
    """Collective. The best step's predictions of the validation rows [N] or [N, K]; None without validation rows.

    Computed again, with the weights that the model now has, when the best step was validated before a resume.
    """
    if run.data.val is None or run.best_validation is not None:
        return run.best_validation
    outputs = hooks.on_validation_epoch_start()

    def step(batch: Batch, index: int) -> None:
        hooks.validation_step(run.model, batch, index, outputs, task=run.task)

    if not evaluate(run, run.data.val, step):
        signals.ignore()
        raise Stopped(
            "stopped by a signal while the validation rows were evaluated; the same command (resume: auto) repeats that"
        )
    return scoring.gather_results(outputs, len(run.data.val)).preds


def remove_old_checkpoints(run: Run) -> None:
    """Rank 0 only. Try again to remove what could not be removed after the last save."""
    rotate_checkpoints(run)
    remove_stale_temporaries(run.checkpoints)


def check_not_all_skipped(state: TrainState) -> None:
    """Rank 0 only. Raise `RunError` when every step was left out; warn when some were."""
    reason = "because their loss or gradient was not finite"
    if state.skipped_steps >= state.step and state.best_step != 0:
        nothing = "nothing was trained, and no model is written; see the first of these errors"
        raise RunError(f"all {state.step} steps were left out {reason}: {nothing}")
    if state.skipped_steps:
        logger.warning("%d of %d steps were left out %s", state.skipped_steps, state.step, reason)


def check_finite_predictions(run: Run, step: int, val_preds: np.ndarray | None) -> None:
    """Rank 0 only. Raise `RunError` unless all predictions of the model of `step` are finite.

    `val_preds` [N] or [N, K] are those of the validation rows; without them the first training rows are evaluated.
    """
    dataset, preds = (run.data.train, first_predictions(run)) if val_preds is None else (run.data.val, val_preds)
    non_finite_rows = scoring.non_finite_rows(preds)
    if len(non_finite_rows):
        first = dataset.row_location(int(non_finite_rows[0]))
        found = f"{len(non_finite_rows)} of {len(preds)} {dataset.name} rows, first {first}"
        advice = "choose another model_path with a lower lr, or gradient_clip_val: 1.0"
        raise RunError(
            f"the model of step {step} gives probabilities that are not finite: {found}; no model is written: {advice}"
        )


def first_predictions(run: Run) -> np.ndarray:
    """Probabilities [N] or [N, K] of the first `ROWS_TO_CHECK` training rows, with the current weights."""
    batch = run.data.train.batch(np.arange(min(ROWS_TO_CHECK, len(run.data.train))))
    run.model.eval()
    with torch.no_grad():
        _, preds, _ = hooks.run_epoch(run.model, batch, "pred", task=run.task)
    run.model.train()
    return preds.numpy(force=True)


def model_with_decision(run: Run, val_preds: np.ndarray | None, blend: BlendRecord | None) -> LoadedModel:
    """Rank 0 only. The trained model with its blend, threshold, calibration and baselines."""
    decision = fit_decision(run.data, run.config, val_preds)
    data = run.data
    return LoadedModel(run.model, run.config, data.features, data.labels, data.tokenizer, run.resolved, decision, blend)


def weights_for_all(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Collective. Rank 0 reads a step's weights, the others receive them."""
    weights = distributed.on_main(lambda: checkpoint.read_weights(run.checkpoints, step), share=False)
    return distributed.broadcast_tensors(weights)


def test(run: Run, loaded: LoadedModel | None) -> tuple[dict[str, Any], Path]:
    """Collective. Evaluate the test rows with the current weights and write the report.

    Returns what test_metrics.json holds, and the folder of the test. `loaded` is used on rank 0 only.
    """
    dataset = run.data.test
    outputs, folder = hooks.on_test_epoch_start(run.folder, run.state.test_folder)

    def step(batch: Batch, index: int) -> None:
        hooks.test_step(run.model, batch, index, outputs, task=run.task, has_labels=dataset.has_labels)

    if not evaluate(run, dataset, step):
        distributed.on_main(folder.rmdir)
        signals.ignore()
        raise Stopped(
            "stopped by a signal while the test rows were evaluated; the model is written, and the same command "
            "(resume: auto) repeats the test"
        )
    decision = loaded.decision if loaded else None
    figures, result = hooks.on_test_epoch_end(
        outputs, dataset, folder, config=run.config, class_names=run.data.labels.names, decision=decision
    )
    distributed.on_main(lambda: report(run, loaded, result, figures, folder), long_timeout=True)
    listed, _ = listed_figures(figures, "test", run.config)
    test_values = {name: value for name, value in listed.items() if name.startswith("test")}
    run.log.record({"step": run.state.step, **test_values})
    run.log.say(f"{len(dataset)} test rows scored: {folder / 'test_result_0.tsv'}")
    return figures, folder


def report(run: Run, loaded: LoadedModel, result: scoring.EpochResult, figures: dict[str, Any], folder: Path) -> None:
    """Rank 0 only. Write report.html and report.json of the test rows."""

    def evaluated_rows() -> EvaluatedRows:
        training = training_section(run.folder, run.state.best_step, run.state.best_metric)
        return EvaluatedRows(
            loaded,
            run.task,
            run.data.test,
            result.preds,
            result.ids,
            figures,
            str(run.folder),
            training,
            data_section(run.data),
            warnings=run.data.warnings,
            slice_columns=run.config.slice_columns,
        )

    run.model.eval()
    if write_report(evaluated_rows, folder):
        run.log.say(f"report: {folder / PAGE}")
    run.model.train()
