"""Batch prediction of ours and HF Trainer.predict, and the time of one row.

    python -m benchmarks.inference examples/womens_reviews.yaml --json inference.json

Needs the extra `bench`. All get tokenised rows; ours makes its own batches (sorted by length); the peer has batches of
`batch_size` rows in the order of the data, and larger ones of sorted rows. One row is timed from the dict to the
result, tokenisation included.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from benchmarks.common import Collator, Contender, PeerModel, Rows, Work, alternate, opened, parser, report
from mmbert_core import hooks
from mmbert_core.config import Config
from mmbert_core.data.batches import evaluation_batches
from mmbert_core.data.prepare import Data
from mmbert_core.inference import scoring
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.inference.precision import resolve_precision
from mmbert_core.model.int8 import quantise_linears
from mmbert_core.model.losses import build_loss_op
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.tables.table import Roles
from mmbert_core.training.start import prepare_model

LATENCY_TOKENS, LATENCY_CALLS = 80, 105


class Bench:
    """Other rows in every round. The model is the loaded encoder with a new head: speed does not depend on weights."""

    def __init__(self, config: Config, data: Data, context: DistContext, rows: int) -> None:
        self.config, self.data, self.context, self.rows = config, data, context, rows
        self.precision = resolve_precision(config.precision, context.device)

    def positions(self, number: int) -> np.ndarray:
        indices = range(number * self.rows, (number + 1) * self.rows)
        return np.take(np.arange(len(self.data.train)), indices, mode="wrap")

    def figures(self, seconds: float, work: Work, positions: np.ndarray) -> dict[str, float]:
        lengths = self.data.train.lengths[positions]
        return {
            "rows/s": len(positions) / seconds,
            "tokens/s": lengths.sum() / seconds,
            "useful GFLOP/s": work.forward(lengths) / seconds / 1e9,
        }


def ours(bench: Bench, *, int8: bool = False) -> Callable[[int], dict[str, float]]:
    model = prepare_model(bench.config, bench.data).to(bench.context.device).eval()
    work = Work.of(model.text_subnetwork)
    if int8:
        quantise_linears(model.text_subnetwork.encoder)
    task = scoring.Task(bench.config.is_binary, build_loss_op(None), bench.precision, bench.context.device)

    def round_(number: int) -> dict[str, float]:
        positions = bench.positions(number)
        dataset = bench.data.train
        started = time.perf_counter()
        with torch.inference_mode():
            budget = scoring.TOKEN_BUDGETS[bench.context.device.type]
            for index, rows in enumerate(evaluation_batches(dataset.lengths[positions], token_budget=budget)):
                preds, _ = hooks.predict_step(model, dataset.batch(positions[rows]), index, task=task)
                preds.numpy(force=True)
        return bench.figures(time.perf_counter() - started, work, positions)

    return round_


def trainer(bench: Bench, *, batch_size: int, by_length: bool = False) -> Callable[[int], dict[str, float]]:
    """`by_length`: the rows are sorted first."""
    from transformers import Trainer, TrainingArguments

    model = PeerModel(bench.config, bench.data)
    work = Work.of(model.network.text_subnetwork)

    def round_(number: int) -> dict[str, float]:
        positions = bench.positions(number)
        positions = positions[np.argsort(-bench.data.train.lengths[positions])] if by_length else positions
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_eval_batch_size=batch_size,
                use_cpu=bench.context.device.type == "cpu",
                report_to=[],
                disable_tqdm=True,
                bf16=bench.precision == "bf16",
                fp16=bench.precision == "fp16",
                remove_unused_columns=False,
                label_names=["labels"],
            )
            hf_trainer = Trainer(model, settings, data_collator=Collator(bench.data.tokenizer))
            rows = Rows(bench.data.train, positions)
            started = time.perf_counter()
            hf_trainer.predict(rows)
            seconds = time.perf_counter() - started
            hf_trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            return bench.figures(seconds, work, positions)

    return round_


def latency(bench: Bench, precision: str) -> dict[str, float]:
    """Milliseconds from a dict to its probability, for a text of LATENCY_TOKENS tokens."""
    model = prepare_model(bench.config, bench.data)
    resolved = {"pooling": model.pooling, "precision": bench.precision}
    loaded = LoadedModel(
        model.eval(), bench.config, bench.data.features, bench.data.labels, bench.data.tokenizer, resolved
    )
    predictor = Predictor(loaded, bench.context, precision=precision)
    words = bench.data.tokenizer.convert_ids_to_tokens(list(range(len(bench.data.tokenizer))))
    word = next(word for word in words if word.isalpha() and len(word) > 3)
    row = {
        **dict.fromkeys(Roles.from_config(bench.config).inputs(), ""),
        bench.config.text_name[0]: " ".join([word] * (LATENCY_TOKENS - 2)),
    }
    times = []
    for _ in range(LATENCY_CALLS):
        started = time.perf_counter()
        predictor.predict(row)
        times.append(1e3 * (time.perf_counter() - started))
    return {
        f"one_row_ms_{precision}_median": statistics.median(times[5:]),
        f"one_row_ms_{precision}_p95": sorted(times[5:])[int(0.95 * len(times[5:]))],
    }


def quality(bench: Bench, folder: str, precisions: list[str]) -> dict[str, float]:
    """AUROC of a trained model on the test rows in each precision."""
    dataset = bench.data.test
    found = {}
    for precision in precisions:
        preds = Predictor.from_folder(folder, bench.context, precision=precision).score(dataset).preds
        found[f"auroc_{precision}"] = float(
            binary_auroc(torch.from_numpy(preds), torch.from_numpy(dataset.label_index))
        )
    return found


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=512, help="rows of a round (%(default)s)")
    options.add_argument(
        "--trained",
        metavar="MODEL_PATH",
        help="a model folder of this config with two classes: its AUROC on the test rows in each precision",
    )
    options.add_argument("--alone", action="store_true", help="without the peer, which needs accelerate")
    arguments = options.parse_args()
    with opened(arguments) as (config, data, context):
        bench = Bench(config, data, context, arguments.rows)
        precisions = [bench.precision, *(["int8"] if context.device.type == "cpu" else [])]
        contenders = [
            Contender(f"mmbert_core, {precision}", ours(bench, int8=precision == "int8")) for precision in precisions
        ]
        if not arguments.alone:
            size = config.batch_size
            contenders.append(Contender(f"HF Trainer.predict, batches of {size}", trainer(bench, batch_size=size)))
            contenders.append(
                Contender(
                    f"HF Trainer.predict, rows sorted by length, batches of {4 * size}",
                    trainer(bench, batch_size=4 * size, by_length=True),
                )
            )
        for contender in contenders:  # warm-up
            contender.run(0)
        alternate(contenders, arguments.rounds)
        extra = {"rows_a_round": arguments.rows, "precision": bench.precision}
        for precision in precisions:
            extra |= latency(bench, precision)
        extra |= quality(bench, arguments.trained, precisions) if arguments.trained else {}
        report(contenders, figure="rows/s", unit="predicted rows per second", extra=extra, arguments=arguments)


if __name__ == "__main__":
    main()
