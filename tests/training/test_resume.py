"""Started again: what must be as it was, what may change, and that nothing shows of the interruption."""

import errno
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmbert_core import hooks
from mmbert_core.config import FREE_ON_RESUME, SETTINGS, Config
from mmbert_core.inference import model_folder
from mmbert_core.runtime import signals
from mmbert_core.runtime.errors import InputError, Stopped
from mmbert_core.training import checkpoint, finish, resume, start
from mmbert_core.training.resume import check_resumable
from mmbert_core.training.run_log import RunLog
from tests.support import tiny
from tests.training.conftest import (
    NO_VALIDATION,
    STEPS,
    Interrupted,
    before_each_step,
    die_before,
    lines_of,
    train,
    weights_in,
)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but TensorBoard's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


# ---- what a resume must agree with ----


FINGERPRINTS = {"train.csv": {"bytes": 10, "sha256": "a" * 64}, "val.csv": {"bytes": 10, "sha256": "b" * 64}}
PARAMETERS = [["first.weight", [3, 2]], ["first.bias", [3]]]
CONFIG = Config(text_name=("text",), label_name="label", model_path="run").to_dict()


def check(
    *,
    config: dict | None = None,
    fingerprints: dict | None = None,
    parameters: list | None = None,
    torch_version: str = "2.13",
) -> None:
    state = json.loads(
        json.dumps(
            {
                "step": 40,
                "config": CONFIG,
                "fingerprints": FINGERPRINTS,
                "parameters": PARAMETERS,
                "versions": {"torch": "2.13"},
                "resolved": {"pooling": "cls"},
            }
        )
    )
    check_resumable(
        state,
        config={**CONFIG, **(config or {})},
        fingerprints=FINGERPRINTS if fingerprints is None else fingerprints,
        parameters=PARAMETERS if parameters is None else parameters,
        versions={"torch": torch_version},
        free_keys=FREE_ON_RESUME,
    )


@pytest.mark.parametrize(
    "parameters",
    (
        [["first.weight", [3, 2]]],
        [["first.weight", [2, 2]], ["first.bias", [3]]],
        [["other.weight", [3, 2]], ["first.bias", [3]]],
    ),
)
def test_another_model_under_the_same_name_is_refused(parameters):
    check()
    with pytest.raises(
        InputError, match="encoder: expected a model whose parameter is .* in the checkpoint at step 40, found "
    ):
        check(parameters=parameters)


def test_other_versions_are_said_and_allowed(caplog):
    check(torch_version="2.14")
    assert caplog.messages == [
        "torch was 2.13 at the checkpoint and is 2.14 now: numbers may differ in their last digits"
    ]


def test_a_checkpoint_that_is_older_than_a_key_had_its_default(monkeypatch):
    monkeypatch.delitem(CONFIG, "tsv_quoting")
    check(config={"tsv_quoting": "auto"})
    with pytest.raises(InputError, match="tsv_quoting was 'auto' in the checkpoint at step 40 and is 'none' now"):
        check(config={"tsv_quoting": "none"})


def test_what_auto_pooling_meant_may_be_said():
    check(config={"pooling": "cls"})


@pytest.mark.parametrize("key", SETTINGS)
def test_every_key_is_frozen_unless_it_is_free(key):
    if key in FREE_ON_RESUME:
        check(config={key: "another"})
    else:
        with pytest.raises(InputError) as error:
            check(config={key: "another"})
        line = str(error.value)
        assert (
            key in line and "'another'" in line and repr(CONFIG[key]) in line and "step 40" in line and "\n" not in line
        )


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("train.csv", {"train.csv": {"bytes": 10, "sha256": "c" * 64}}),
        ("more.csv", {"more.csv": {"bytes": 1, "sha256": "d" * 64}}),
        ("val.csv", {"val.csv": None}),
    ],
)
def test_changed_new_and_vanished_files_are_refused(path, change):
    check()
    fingerprints = {name: value for name, value in {**FINGERPRINTS, **change}.items() if value is not None}
    with pytest.raises(InputError, match=f"^{path} has changed since the checkpoint at step 40"):
        check(fingerprints=fingerprints)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, files) -> Config:
    """A finished run over its own data files, to be started again with changes."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("train.csv", "val.csv"):
        shutil.copy(files / name, folder / name)
    values = tiny.settings(
        files,
        train_path=(str(folder / "train.csv"),),
        val_path=(str(folder / "val.csv"),),
        test_path=(),
        cache_path=str(folder / "cache"),
        model_path=str(folder / "run"),
        max_epochs=1,
        save_every=2,
    )
    config = Config(**values)
    train(config)
    return config


REFUSED = {
    "lr": 2e-3,
    "batch_size": 4,
    "seed": 1,
    "max_epochs": 3,
    "num_classes": 3,
    "precision": "bf16",
    "warmup_steps": 0,
    "weight_decay": 0.1,
    "class_weights": (1.0, 2.0),
    "tab_field_list": ("age",),
    "test_path": "val_path",
    "early_stop_metric": "val_loss",
}
ALLOWED = {"log_every": 7, "save_every": 1, "keep_checkpoints": 9, "num_threads": 2, "cache_path": "elsewhere"}


def test_auto_pooling_stays_what_it_was_when_the_run_began(finished, monkeypatch):
    """Files that say how a sentence encoder was trained may come into its folder later."""
    resolved = json.loads((Path(finished.model_path) / "config.json").read_text())["resolved"]["pooling"]
    monkeypatch.setattr(model_folder, "sentence_pooling", lambda name: "mean")
    before = content(Path(finished.model_path))
    assert (
        (finished.pooling, resolved) == ("auto", "pooler")
        and train(finished)
        and train(replace(finished, pooling="pooler"))
    )
    with pytest.raises(InputError, match="pooling was 'auto' in the checkpoint"):
        train(replace(finished, pooling="mean"))
    monkeypatch.setattr(start, "resolve_stored_pooling", lambda config: "cls")  # of as many parameters
    monkeypatch.setattr(
        resume,
        "parameter_shapes",
        lambda model: json.loads(
            (next((Path(finished.model_path) / "checkpoints").glob("step-*")) / "state.json").read_text()
        )["parameters"],
    )
    with pytest.raises(InputError, match="pooling was pooler in the checkpoint at step .* and is cls now"):
        train(finished)
    assert content(Path(finished.model_path)) == before


def test_auto_pooling_of_a_run_that_had_none_is_decided_anew(finished):
    """Stopped before its first checkpoint, a run may begin again with other settings."""
    path = Path(finished.model_path) / "config.json"
    before = path.read_text()
    record = json.loads(before)
    path.write_text(
        json.dumps(
            {
                **record,
                "config": {**record["config"], "pooling": "cls"},
                "resolved": {**record["resolved"], "pooling": "cls"},
            }
        )
    )
    try:
        assert start.resolve_stored_pooling(finished) == "auto"
    finally:
        path.write_text(before)


@pytest.mark.parametrize("key", REFUSED)
def test_a_changed_setting_stops_a_started_run_before_it_writes(finished, key):
    new = finished.val_path if REFUSED[key] == "val_path" else REFUSED[key]
    changes = {key: new, **({"is_binary": False} if key == "num_classes" else {})}
    before = content(Path(finished.model_path))
    if key == "num_classes":  # the data have two classes: refused even earlier
        with pytest.raises(InputError, match="num_classes"):
            train(replace(finished, **changes))
    else:
        old = finished.to_dict()[key]
        with pytest.raises(InputError) as error:
            train(replace(finished, **changes))
        assert f"{key} was {old!r}" in str(
            error.value
        ) and f"is {replace(finished, **changes).to_dict()[key]!r} now" in str(error.value)
    assert content(Path(finished.model_path)) == before


@pytest.mark.parametrize("key", ALLOWED)
def test_a_setting_that_changes_no_result_may_change(finished, tmp_path, key):
    new = str(tmp_path / "cache") if key == "cache_path" else ALLOWED[key]
    results, _, _ = train(replace(finished, **{key: new}))
    assert results.steps == 5


def test_micro_batches_may_change_for_a_run_that_ran_out_of_memory(config_of, caplog):
    config = config_of(save_every=2, keep_checkpoints=100)
    train(config)
    before = weights_in(config)
    results, _, _ = train(replace(config, resume=4, microbatches_per_step=3))
    assert (results.microbatches_asked, results.microbatches_per_step) == (3, 3) and weights_in(config) != before
    assert (
        "microbatches_per_step was 2 at the checkpoint and is 3 now: steps have the same rows, but other dropout"
        in caplog.messages
    )
    for again in (3, "auto"):  # auto: as the checkpoint has it
        results, _, _ = train(replace(config, resume=6, microbatches_per_step=again))
        assert results.microbatches_per_step == 3
    assert sum("other dropout" in message for message in caplog.messages) == 1


def test_a_restart_resumes_from_the_step_that_a_run_was_sent_back_to(config_of, monkeypatch):
    """Steps beyond the asked one are of another life: a restart, which looks for the newest, must not find them."""
    config = config_of(save_every=2, keep_checkpoints=100)
    train(config)
    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        die_before(patches, step=6)
        train(replace(config, resume=4))
    started = []
    with monkeypatch.context() as patches:
        before_each_step(patches, lambda run, order: started.append(run.state.step))
        train(config)
    assert started[0] in (4, 5)  # 5: the best validation


def test_a_run_may_move(finished, tmp_path):
    shutil.copytree(finished.model_path, tmp_path / "moved")
    results, _, _ = train(replace(finished, model_path=str(tmp_path / "moved"), resume=4))
    assert results.steps == 5
    last = "checkpoints/step-00000005"
    assert (
        content(tmp_path / "moved" / last)["model.safetensors"]
        == content(Path(finished.model_path) / last)["model.safetensors"]
    )


def test_changed_data_stop_a_started_run(finished):
    path = Path(finished.train_path[0])
    old = path.read_bytes()
    before = content(Path(finished.model_path))
    try:
        path.write_bytes(old.replace(b"refund", b"refuse", 1))
        with pytest.raises(InputError, match=f"{path} has changed since the checkpoint at step 5"):
            train(finished)
    finally:
        path.write_bytes(old)
    assert content(Path(finished.model_path)) == before
    assert train(finished)[0].steps == 5


# ---- resuming ----


def figures_of(config: Config) -> list[tuple]:
    """What does not depend on the clock."""
    return [
        tuple(line.get(key) for key in ("step", "epoch", "train_loss", "lr", "grad_norm", "val_loss", "val/f1_score"))
        for line in tiny.metrics_lines(config.model_path)
    ]


def test_a_resumed_run_writes_the_lines_of_an_uninterrupted_one(config_of, tmp_path, monkeypatch):
    straight = config_of(save_every=4, val_check_interval=3, model_path=str(tmp_path / "straight"))
    train(straight)
    config = replace(straight, model_path=str(tmp_path / "killed"))
    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        die_before(patches, step=8)
        train(config)
    metrics = Path(config.model_path) / "metrics.jsonl"
    assert [line["step"] for line in lines_of(config)] == list(range(1, 8))
    with open(metrics, "a") as stream:
        stream.write('{"step": 8, "epoch": 1, "train_lo')  # torn
    started = []
    with monkeypatch.context() as patches:
        before_each_step(patches, lambda run, order: started.append(run.state.step))
        train(config)
    assert started[0] in (4, 6)  # the newest checkpoint: of save_every, or of the best validation
    assert figures_of(config) == figures_of(straight)
    assert [line["step"] for line in lines_of(config)] == list(range(1, STEPS + 1))
    assert weights_in(config) == weights_in(straight)


@pytest.mark.parametrize("where", ("between steps", "before the model is written"))
def test_a_resumed_run_chooses_the_same_threshold_and_calibration(config_of, tmp_path, monkeypatch, where):
    """Also when the best step was validated before the resume, so that its validation rows are evaluated again."""
    val = tiny.write_table(tmp_path / "val.csv", 220, seed=6)
    straight = config_of(
        save_every=3,
        val_check_interval=2,
        val_path=(str(val),),
        lr=2e-2,
        run_scheduler=False,
        model_path=str(tmp_path / "straight"),
    )
    results, _, _ = train(straight)
    kept = (Path(straight.model_path) / "thresholds.json").read_bytes()
    assert (
        all(entry["reason"] is None for entry in json.loads(kept).values())
        and json.loads(kept)["threshold"]["value"] != 0.5
    )
    assert results.best_step < STEPS  # the weights at the end are not those that are evaluated
    config = replace(straight, model_path=str(tmp_path / "killed"))

    def die(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        die_before(patches, step=8) if where == "between steps" else patches.setattr(finish, "save_model_folder", die)
        train(config)
    assert not (Path(config.model_path) / "thresholds.json").exists()
    assert train(config)[0].best_step == results.best_step
    assert (Path(config.model_path) / "thresholds.json").read_bytes() == kept
    for name in ("baselines.json", "baselines.safetensors"):
        assert (Path(config.model_path) / name).read_bytes() == (Path(straight.model_path) / name).read_bytes()


def test_resuming_from_an_earlier_step(config_of, caplog):
    config = config_of(save_every=2, keep_checkpoints=100)
    train(config)
    before, figures = weights_in(config), figures_of(config)
    results, _, _ = train(replace(config, resume=4))
    assert results.steps == STEPS and weights_in(config) == before and figures_of(config) == figures
    assert any(message.startswith("resuming from") and message.endswith("step-00000004") for message in caplog.messages)


def test_a_best_checkpoint_that_is_lost_does_not_stop_the_run(config_of, caplog):
    """Resuming from a step whose best checkpoint is gone: the best is chosen among what follows."""
    config = config_of(save_every=1, keep_checkpoints=100, val_check_interval=1)
    train(config)
    folder = Path(config.model_path) / "checkpoints"
    best_at = {
        step: json.loads((checkpoint.step_folder(folder, step) / "state.json").read_text())["best_step"]
        for step in range(1, STEPS)
    }
    last, best = next((step, best) for step, best in best_at.items() if best != step)
    for step in checkpoint.list_steps(folder):
        if step > last or step == best:
            shutil.rmtree(checkpoint.step_folder(folder, step))
    results, _, _ = train(config)
    assert results.steps == STEPS and results.best_step > last
    assert f"the best step so far, {best}, is lost" in caplog.text
    assert weights_in(config) == weights_in(config, results.best_step)


def test_a_trained_model_without_checkpoints_is_not_overwritten(config_of):
    config = config_of(max_epochs=1)
    train(config)
    shutil.rmtree(Path(config.model_path) / "checkpoints")
    before = content(Path(config.model_path))
    with pytest.raises(InputError, match="found a trained model without checkpoints: choose another model_path"):
        train(config)
    assert content(Path(config.model_path)) == before


def test_ranks_that_read_other_data_are_refused(config_of, monkeypatch):
    """What another node's stale file would look like to this rank."""

    def gather(items):
        other = {**items[0], items_key(items[0]): "0" * 64}
        return [items, [other]]

    def items_key(here):
        return next(key for key in here if key.endswith("train.csv"))

    monkeypatch.setattr(start.distributed, "all_gather_objects", gather)
    with pytest.raises(
        InputError,
        match=r"train.csv: expected the same on all ranks, found '[0-9a-f]{64}' on rank 0 and '0{64}' on rank 1",
    ):
        train(config_of())


def test_a_finished_run_started_again_does_nothing_and_says_so(config_of, files, monkeypatch, caplog):
    config = config_of(test_path=(str(files / "test.csv"),))
    results, _, _ = train(config)
    before = content(Path(config.model_path))
    caplog.clear()
    die_before(monkeypatch, step=STEPS + 1)
    again, _, _ = train(config)
    assert again == results
    assert content(Path(config.model_path)) == before
    assert f"{config.model_path}: this run is finished at step {STEPS}; nothing to do" in caplog.messages


def test_halves_of_files_are_cleared_by_the_next_start(config_of, files):
    config = config_of(test_path=(str(files / "test.csv"),))
    train(config)
    run = Path(config.model_path)
    [tested] = run.glob("multimodal_bert-*")
    halves = [
        run / ".tmp-features.json-16793",
        run / ".tmp-encoder-1/vocab.txt",
        run / ".tmp-model.safetensors",
        run / ".tmp-old-encoder-9/config.json",
        tested / ".tmp-test_result_0.tsv-1",
    ]
    elsewhere = run.parent / "elsewhere"
    (run / "multimodal_bert-link").symlink_to(elsewhere)
    # predictions into this folder may be running
    others = [
        run / ".tmp-out.tsv-77",
        run / ".tmp-cache_out.tsv-77",
        run / ".tmp-encoder-out.tsv-77",
        run / "notes.txt",
        elsewhere / ".tmp-theirs",
    ]
    for path in (*halves, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    train(config)
    assert [
        path for path in (*halves, run / ".tmp-encoder-1", run / ".tmp-old-encoder-9") if path.exists()
    ] == [] and all(path.exists() for path in others)


@pytest.mark.parametrize("function", ("save_model_folder", "write_json"))
def test_a_run_that_dies_while_it_ends_is_ended_by_the_next_start(config_of, files, monkeypatch, function):
    """Its results, of which an interrupted start may have left some, are written last."""
    config = config_of(test_path=(str(files / "test.csv"),), save_every=5)
    expected, _, _ = train(config)
    weights = weights_in(config)

    def die(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        patches.setattr(finish, function, die)
        train(replace(config, resume=5))
    assert not (Path(config.model_path) / "train_results.json").exists()
    die_before(monkeypatch, step=STEPS + 1)  # nothing is left to train
    results, _, _ = train(config)
    assert results.test_metrics == expected.test_metrics and results.best_step == expected.best_step
    assert weights_in(config) == weights


@pytest.mark.parametrize("where", ("on_test_epoch_end", "write_json", "close"))
def test_a_run_has_one_test_folder_wherever_its_end_was_killed(config_of, files, monkeypatch, where):
    """Folders of `mmbert evaluate` in the run's folder stay. `close`: killed after the last file: no repeat."""
    config = config_of(test_path=(str(files / "test.csv"),), max_epochs=1)
    evaluated = Path(config.model_path) / "multimodal_bert-2026-01-01-00-00-00"
    evaluated.mkdir(parents=True)
    (evaluated / "test_result_0.tsv").write_text("another's")

    def die(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        patches.setattr({"on_test_epoch_end": hooks, "write_json": finish, "close": RunLog}[where], where, die)
        train(config)
    results, _, _ = train(config)
    [own] = set(Path(config.model_path).glob("multimodal_bert-*")) - {evaluated}
    assert results.test_folder == own and {"test_result_0.tsv", "test_metrics.json", "report.html"} <= {
        path.name for path in own.iterdir()
    }
    assert (evaluated / "test_result_0.tsv").read_text() == "another's" and len(list(evaluated.iterdir())) == 1
    before = content(Path(config.model_path))
    assert train(config)[0] == results and content(Path(config.model_path)) == before


def test_an_old_checkpoint_that_could_not_be_removed_is_gone_in_the_end(config_of, monkeypatch):
    """Also one that a rotation was killed before: the next start removes it."""
    config = config_of(save_every=1, keep_checkpoints=1, max_epochs=1, **NO_VALIDATION)
    plain, refused = checkpoint.remove_path, []

    def refuse(path):
        if path.name == "step-00000004":  # the last rotation of the steps
            refused.append(path)
            if len(refused) == 1:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        plain(path)

    monkeypatch.setattr(checkpoint, "remove_path", refuse)
    train(config)
    folder = Path(config.model_path) / "checkpoints"
    assert len(refused) == 2 and checkpoint.list_steps(folder) == [5]
    shutil.copytree(checkpoint.step_folder(folder, 5), checkpoint.step_folder(folder, 4))
    train(config)
    assert checkpoint.list_steps(folder) == [5]


@pytest.mark.parametrize("step", (3, 5))
def test_a_run_that_a_signal_stopped_ends_with_the_checkpoints_of_one_that_did_not(
    config_of, tmp_path, monkeypatch, step
):
    """Step 5 has a validation, which the signal interrupts."""
    config = config_of(save_every=4, keep_checkpoints=2, model_path=str(tmp_path / "stopped"))

    def stop(run, order):
        if run.state.step + 1 == step:
            signals._state.first = signal.SIGTERM

    with monkeypatch.context() as patches, pytest.raises(Stopped):
        before_each_step(patches, stop)
        train(config)
    signals._state = signals._State()
    assert checkpoint.list_steps(Path(config.model_path) / "checkpoints")[0] == step
    train(config)
    straight = replace(config, model_path=str(tmp_path / "straight"))
    train(straight)
    assert checkpoint.list_steps(Path(config.model_path) / "checkpoints") == checkpoint.list_steps(
        Path(straight.model_path) / "checkpoints"
    )
    assert weights_in(config) == weights_in(straight)


def test_overflowing_steps_are_skipped_and_counted_also_over_a_resume(config_of, tmp_path, monkeypatch):
    """Loss scaling as fp16 has it, in fp32: gradients of steps 2 and 3 overflow."""
    now = [0]

    def configure_optimizers(model, *arguments):
        model.final_merge_network.linear_layer_final.bias.register_hook(
            lambda gradient: gradient * math.inf if now[0] in (2, 3) else gradient
        )
        return plain(model, *arguments)

    plain = start.configure_optimizers
    monkeypatch.setattr(start, "configure_optimizers", configure_optimizers)
    monkeypatch.setattr(
        start,
        "build_scaler",
        lambda precision, device: torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3),
    )
    before_each_step(monkeypatch, lambda run, order: now.__setitem__(0, run.state.step + 1))
    straight = config_of(
        model_path=str(tmp_path / "straight"), save_every=1, keep_checkpoints=100, warmup_steps=0, **NO_VALIDATION
    )
    results, _, _ = train(straight)
    assert results.skipped_steps == 2 and results.steps == STEPS
    lines = lines_of(straight)
    assert [line["lr"] for line in lines] == pytest.approx(
        [1e-3 * (1 - done / STEPS) for done in (0, 1, 1, 1, 2, 3, 4, 5, 6, 7)]
    )
    assert [line["grad_norm"] is None for line in lines] == [step in (2, 3) for step in range(1, STEPS + 1)]

    config = replace(straight, model_path=str(tmp_path / "killed"))
    with monkeypatch.context() as patches, pytest.raises(Interrupted):
        die_before(patches, step=5)
        train(config)
    state = json.loads((checkpoint.step_folder(Path(config.model_path) / "checkpoints", 4) / "state.json").read_text())
    assert state["scaler"]["scale"] == 256.0 and state["scaler"]["_growth_tracker"] == 1 and state["skipped_steps"] == 2
    results, _, _ = train(config)
    assert (
        results.skipped_steps == 2
        and figures_of(config) == figures_of(straight)
        and weights_in(config) == weights_in(straight)
    )
    last = json.loads(
        (checkpoint.step_folder(Path(config.model_path) / "checkpoints", STEPS) / "state.json").read_text()
    )
    assert last["scaler"]["scale"] == 1024.0  # grown twice since
