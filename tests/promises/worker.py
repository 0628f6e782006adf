"""What the promise tests run on every rank, alone or under torchrun: `worker.py FOLDER TASK...`.

Results go to FOLDER as JSON.
"""

import json
import shutil
import sys
from pathlib import Path

from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.config_reader import config_from_dict
from mmbert_core.predictor import Predictor
from mmbert_core.runtime import distributed, ranks, workers
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.storage.files import sha256_of
from mmbert_core.training import head_first as head_first_stage
from mmbert_core.training import loop
from tests.support import tiny

KILLED_STEPS = 7  # of the resume task: 2 epochs of 4 steps, short last ones


def steps(folder: Path, context: DistContext) -> None:
    """Train with dropout and class weights; note the rows of every step."""
    seen: list[tuple[int, list[int]]] = []
    plain_step, step = hooks.training_step, [0]

    def noting_step(model, batch, batch_idx, **options):
        if options["weight_sum"] != float("inf"):  # the row without weight of an idle rank
            seen.append((step[0], batch.row_index.tolist()))
        return plain_step(model, batch, batch_idx, **options)

    plain_train = loop.train_one_step

    def noting_train(run, order):
        step[0] = run.state.step
        return plain_train(run, order)

    hooks.training_step, loop.train_one_step = noting_step, noting_train
    try:
        config = Config(
            **tiny.settings(
                folder,
                num_rows=501,
                class_weights=(1.0, 3.0),
                batch_size=25,
                microbatches_per_step=12,
                lr=2e-5,
                max_epochs=1,
                warmup_steps=0,
                model_path=str(folder / f"run{context.world_size}"),
            )
        )
        tiny.train(config, context)
    finally:
        hooks.training_step, loop.train_one_step = plain_step, plain_train
    gathered = [item for of_rank in distributed.all_gather_objects(seen) for item in of_rank]
    rows: dict[int, list[int]] = {}
    for number, batch_rows in gathered:
        rows.setdefault(number, []).extend(batch_rows)
    if context.is_main:
        result = {
            "rows": [sorted(rows[number]) for number in sorted(rows)],
            "losses": [x["train_loss"] for x in tiny.metrics_lines(config.model_path) if "train_loss" in x],
        }
        (folder / f"steps{context.world_size}.json").write_text(json.dumps(result))


def score(folder: Path, context: DistContext) -> None:
    """With the model of `run1`: the test stage of a resumed run, and predictions of tables of 1 to 97 rows."""
    copy = folder / f"again{context.world_size}"

    def copy_finished_run() -> None:
        shutil.copytree(folder / "run1", copy)
        (copy / "train_results.json").unlink()
        shutil.rmtree(next(copy.glob("multimodal_bert-*")))

    distributed.on_main(copy_finished_run)
    saved = json.loads((folder / "run1/config.json").read_text())["config"]
    results = tiny.train(config_from_dict({**saved, "model_path": str(copy)}), context)
    assert results.steps == 21
    predictor = Predictor.from_folder(folder / "run1", context)
    for num_rows in (1, 2, 3, 5, 97):
        predictor.predict_file(
            [str(folder / f"rows{num_rows}.csv")], folder / f"rows{num_rows}-by{context.world_size}.tsv"
        )


class Interrupted(Exception):
    """Simulates a kill of every rank right after a checkpoint."""


def resume(folder: Path, context: DistContext) -> None:
    """A run without interruption, then for every step k one interrupted after step k's checkpoint and resumed."""
    plain_save = loop.save
    digests = {}
    for killed_after in range(KILLED_STEPS + 1):

        def interrupted_save(run):
            plain_save(run)
            if run.state.step == killed_after:
                raise Interrupted

        model_path = folder / f"resume{context.world_size}-{killed_after}"
        config = Config(
            **tiny.settings(
                folder,
                num_rows=27,
                batch_size=8,
                max_epochs=2,
                save_every=1,
                keep_checkpoints=100,
                val_check_interval=0.5,
                gradient_clip_val=1.0,
                weight_decay=0.01,
                head_lr=3e-3,
                model_path=str(model_path),
            )
        )
        loop.save = interrupted_save if killed_after else plain_save
        try:
            tiny.train(config, context)
            assert killed_after == 0, "the run should have been interrupted"
        except Interrupted:
            loop.save = plain_save
            tiny.train(config, context)
        loop.save = plain_save
        if context.is_main:
            last = model_path / "checkpoints/step-00000008"
            state = json.loads((last / "state.json").read_text())
            digests[killed_after] = {
                "weights": sha256_of(last / "model.safetensors"),
                "moments": sha256_of(last / "optimizer.safetensors"),
                "step": state["step"],
                "scheduler": state["scheduler"],
                "best": [state["best_step"], state["best_value"]],
                "model": sha256_of(model_path / "model.safetensors"),
                "losses": [
                    (x["step"], x["train_loss"], x["lr"]) for x in tiny.metrics_lines(model_path) if "train_loss" in x
                ],
                "validations": [(x["step"], x["val_loss"]) for x in tiny.metrics_lines(model_path) if "val_loss" in x],
            }
    if context.is_main:
        (folder / f"resume{context.world_size}.json").write_text(json.dumps(digests))


HEAD_FIRST_KILLS = ("", "in the fit", "before the validation of step 0", "after step 0", "after step 3")


def head_first(folder: Path, context: DistContext) -> None:
    """A run whose head is fitted first, then one that is killed and resumed for each of HEAD_FIRST_KILLS."""
    kills = HEAD_FIRST_KILLS if context.world_size < 3 else HEAD_FIRST_KILLS[:1]
    digests = {}
    for number, kill in enumerate(kills):
        model_path = folder / f"head{context.world_size}-{number}"
        config = Config(
            **tiny.settings(
                folder,
                test_path=(),
                val_check_interval=0.5,
                save_every=1,
                keep_checkpoints=100,
                head_first="always",
                model_path=str(model_path),
            )
        )
        if kill:
            train_until(kill, config, context)
        tiny.train(config, context)
        if context.is_main:
            first, last = model_path / "checkpoints/step-00000000", model_path / "checkpoints/step-00000008"
            lines = tiny.metrics_lines(model_path)
            digests[kill] = {
                "step 0": sha256_of(first / "model.safetensors"),
                "weights": sha256_of(last / "model.safetensors"),
                "moments": sha256_of(last / "optimizer.safetensors"),
                "model": sha256_of(model_path / "model.safetensors"),
                "head": [[x["head_train_loss"], x["head_val_loss"]] for x in lines if "head_epoch" in x],
                "losses": [x["train_loss"] for x in lines if "train_loss" in x],
                "validations": [[x["step"], x["val_loss"]] for x in lines if "val_loss" in x],
            }
    if context.is_main:
        (folder / f"head_first{context.world_size}.json").write_text(json.dumps(digests))


def train_until(kill: str, config: Config, context: DistContext) -> None:
    """A training in which every rank is killed there."""
    plain_save, plain_validate, plain_stop = loop.save, loop.validate, head_first_stage.stop_if_asked

    def interrupted_save(run):
        plain_save(run)
        if f"after step {run.state.step}" == kill:
            raise Interrupted

    def interrupt(*_):
        raise Interrupted

    try:
        loop.save = interrupted_save
        if kill == "in the fit":
            head_first_stage.stop_if_asked = interrupt
        elif kill == "before the validation of step 0":
            loop.validate = interrupt
        tiny.train(config, context)
        raise AssertionError("the run should have been interrupted")
    except Interrupted:
        pass
    finally:
        loop.save, loop.validate, head_first_stage.stop_if_asked = plain_save, plain_validate, plain_stop


def main() -> None:
    folder, tasks = Path(sys.argv[1]), sys.argv[2:]
    context = ranks.read_context()
    ranks.set_threads(1, context)
    with workers.process_group(context):
        for task in tasks:
            {"steps": steps, "score": score, "resume": resume, "head_first": head_first}[task](folder, context)


if __name__ == "__main__":
    main()
