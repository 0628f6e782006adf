"""What every rank runs for D1 to D3: `rows_worker.py FOLDER ROWSxBATCH...`, alone or under torchrun.

For both models of FOLDER, and each table rows<ROWS>.csv in batches of at most BATCH rows: the figures of the
validation, the file and figures of the test stage, the file of `predict`; into
FOLDER/by<processes>/<model>-rows<ROWS>-batch<BATCH>.
"""

import sys
from functools import partial
from pathlib import Path

from mmbert_core import hooks
from mmbert_core.data import batches
from mmbert_core.inference import scoring
from mmbert_core.predictor import Predictor
from mmbert_core.report import results
from mmbert_core.runtime import distributed, ranks, workers
from mmbert_core.storage.files import write_json
from mmbert_core.tables.table import Roles, read_chunks


def evaluate(scorer: Predictor, table: Path, folder: Path) -> None:
    """Collective. Validation and test of a table's rows with the hooks, as the training loop calls them."""
    config, names = scorer.loaded.config, scorer.loaded.labels.names
    chunks = list(read_chunks([str(table)], Roles.from_config(config).inputs(), optional=(config.label_name,)))
    if not chunks:  # the table has only a header
        return
    dataset = scorer._encode(chunks[0])
    validated, tested = hooks.on_validation_epoch_start(), []
    scorer.loaded.model.eval()
    for item in scoring.own_batches(dataset, scorer.context):
        if item is not None:
            hooks.validation_step(scorer.loaded.model, item[1], item[0], validated, task=scorer.task)
            hooks.test_step(scorer.loaded.model, item[1], item[0], tested, task=scorer.task, has_labels=True)
    values, _ = hooks.on_validation_epoch_end(validated, len(dataset), config=config, class_names=names)
    hooks.on_test_epoch_end(tested, dataset, folder, config=config, class_names=names, decision=scorer.loaded.decision)
    if scorer.context.is_main:
        write_json(folder / "validation.json", values)


def main() -> None:
    folder, pairs = Path(sys.argv[1]), [tuple(map(int, word.split("x"))) for word in sys.argv[2:]]
    results.write_plots = lambda *_, **__: []  # plots take longer than the rest
    context = ranks.read_context()
    ranks.set_threads(1, context)
    with workers.process_group(context):
        for model in ("two", "three"):
            scorer = Predictor.from_folder(folder / model, context)
            for num_rows, max_rows in pairs:
                scoring.evaluation_batches = partial(batches.evaluation_batches, max_rows=max_rows)
                out = folder / f"by{context.world_size}" / f"{model}-rows{num_rows}-batch{max_rows}"
                distributed.on_main(lambda: out.mkdir(parents=True))
                evaluate(scorer, folder / f"rows{num_rows}.csv", out)
                scorer.predict_file([str(folder / f"rows{num_rows}.csv")], out / "predicted.tsv")


if __name__ == "__main__":
    main()
