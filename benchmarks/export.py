"""Batch prediction of the ONNX export with onnxruntime and of ours in PyTorch.

    python -m benchmarks.export examples/womens_reviews.yaml --json export.json

Needs the extra `onnx`; both compute on the CPU in float32, with the same number of threads. Both get tokenised rows in
the same batches (sorted by length); ours packs their texts, the graph computes the padding.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.common import Contender, Work, alternate, opened, parser, report
from benchmarks.inference import Bench, ours
from mmbert_core.data.batches import evaluation_batches
from mmbert_core.export.exporter import MODEL_FILES, export_model
from mmbert_core.inference import scoring
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.training.start import prepare_model


def onnx(bench: Bench) -> Callable[[int], dict[str, float]]:
    import onnxruntime

    config, data = bench.config, bench.data
    model = prepare_model(config, data)
    resolved = {"pooling": model.pooling, "precision": "fp32"}
    loaded = LoadedModel(model.eval(), config, data.features, data.labels, data.tokenizer, resolved)
    work = replace(Work.of(model.text_subnetwork), ends_at_first_tokens=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export_model(loaded, f"{folder}/exported", format="onnx")
        session = onnxruntime.InferenceSession(
            f"{folder}/exported/{MODEL_FILES['onnx']}", options, providers=["CPUExecutionProvider"]
        )

    def round_(number: int) -> dict[str, float]:
        positions = bench.positions(number)
        started = time.perf_counter()
        for rows in evaluation_batches(data.train.lengths[positions], token_budget=scoring.TOKEN_BUDGETS["cpu"]):
            batch = data.train.batch(positions[rows])
            session.run(
                ["probabilities"], {each.name: getattr(batch, each.name).numpy() for each in session.get_inputs()}
            )
        return bench.figures(time.perf_counter() - started, work, positions)

    return round_


def main() -> None:
    parsed = parser(__doc__.splitlines()[0])
    parsed.add_argument("--rows", type=int, default=512, help="rows of a round (%(default)s)")
    arguments = parsed.parse_args()
    with opened(arguments) as (config, data, context):
        context = replace(context, device=torch.device("cpu"))
        bench = Bench(replace(config, precision="fp32"), data, context, arguments.rows)
        contenders = [Contender("mmbert_core", ours(bench)), Contender("onnxruntime", onnx(bench))]
        for contender in contenders:  # warm-up
            contender.run(0)
        alternate(contenders, arguments.rounds)
        extra = {"rows_a_round": arguments.rows, "precision": bench.precision}
        report(contenders, figure="rows/s", unit="predicted rows per second", extra=extra, arguments=arguments)


if __name__ == "__main__":
    main()
