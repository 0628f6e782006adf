"""The section of a report about wrong rows: the most confident ones, and how much each word contributed.

N rows, K classes.
"""

import numpy as np

from mmbert_core.data.encoding import max_cell_characters
from mmbert_core.data.tokens import join_texts, keeps_end
from mmbert_core.evaluation.metrics import EPS
from mmbert_core.evaluation.thresholds import predicted_classes
from mmbert_core.inference.attributions import Attributions, explain_rows
from mmbert_core.report.evaluated_rows import EvaluatedRows
from mmbert_core.report.report_schema import Errors, WrongRow
from mmbert_core.report.typed_json import Missing
from mmbert_core.tables.table import Roles, read_chunks

MAX_ERRORS = 20
# One explanation costs as much as scoring 48 rows: 16 steps, each a forward pass and a backward pass of twice its cost.
# With one for 200 rows, all explanations take about a quarter of the time of scoring.
MIN_EXPLAINED, ROWS_PER_EXPLANATION = 3, 200


def errors_section(evaluated: EvaluatedRows) -> Errors | Missing:
    """The most confident wrong rows; for the first of them, how much each word contributed."""
    preds, labels, dataset = evaluated.preds, evaluated.labels, evaluated.dataset
    chosen = predicted_classes(preds, threshold=evaluated.threshold)
    of_chosen = np.where(chosen == 1, preds, 1 - preds) if preds.ndim == 1 else preds[np.arange(len(preds)), chosen]
    confidence = of_chosen if preds.ndim == 2 else distance_to(evaluated.threshold, preds)
    wrong = np.flatnonzero(chosen != labels)
    if len(wrong) == 0:
        return Missing("no row was predicted wrong")
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")[:MAX_ERRORS]]
    attributions, num_explained = attributions_of(evaluated, worst, chosen)
    columns = dataset.cells(worst)
    rows = [
        WrongRow(
            location=dataset.row_location(int(row)),
            id=evaluated.ids[row] if evaluated.ids else None,
            label=evaluated.class_names[labels[row]],
            pred=evaluated.class_names[chosen[row]],
            prob=float(of_chosen[row]),
            columns={name: str(values[index]) for name, values in columns.items()},
            tokens=[list(span) for span in attributions[index]],
            method="integrated gradients" if index < num_explained else None,
        )
        for index, row in enumerate(worst)
    ]
    return Errors(rows=rows)


def attributions_of(evaluated: EvaluatedRows, rows: np.ndarray, chosen: np.ndarray) -> tuple[list[Attributions], int]:
    """The text of each row as (span, weight) pairs, and the number of rows explained; the weights of the rest are 0."""
    texts, num_explained = texts_of(evaluated, rows), max(MIN_EXPLAINED, len(evaluated.preds) // ROWS_PER_EXPLANATION)
    attributions: list[Attributions] = []
    for row, text in list(zip(rows, texts, strict=True))[:num_explained]:  # one by one: together they take much memory
        attributions += explain_rows(
            evaluated.loaded, evaluated.dataset, [row], predicted=[chosen[row]], texts=[text], task=evaluated.task
        )
    return attributions + [[(text, 0.0)] if text else [] for text in texts[num_explained:]], num_explained


def distance_to(threshold: float, preds: np.ndarray) -> np.ndarray:
    """[N]: 0 for a probability equal to the threshold, 1 for a probability of 0 or 1.

    So the confidences of false negatives and false positives are comparable.
    """
    preds, threshold = preds.astype(np.float64), max(threshold, 0.0)
    above, below = (preds - threshold) / max(1 - threshold, EPS), (threshold - preds) / max(threshold, EPS)
    return np.where(preds > threshold, above, below)


def texts_of(evaluated: EvaluatedRows, positions: np.ndarray) -> list[str]:
    """The texts of the rows at `positions`, read again from the files: the dataset has only token ids."""
    config, encoded = evaluated.loaded.config, evaluated.dataset.encoded
    columns = config.text_name
    if not columns:
        return [""] * len(positions)
    roles = Roles.from_config(config)
    max_characters = max_cell_characters(roles, max_length=config.max_length, max_chunks=config.max_chunks)
    index_of_row = {int(row): index for index, row in enumerate(evaluated.dataset.rows[positions])}
    texts, first = [""] * len(positions), 0
    for chunk in read_chunks(
        encoded.paths,
        list(columns),
        max_characters=max_characters,
        keep_end=keeps_end(evaluated.loaded.tokenizer),
        tsv_quoting=encoded.tsv_quoting,
    ):
        if first > max(index_of_row):
            break
        rows_of_chunk = [row for row in index_of_row if first <= row < first + len(chunk)]
        for row in rows_of_chunk:
            cells = {name: [chunk.cells[name][row - first]] for name in columns}
            [texts[index_of_row[row]]] = join_texts(cells, columns)
        first += len(chunk)
    return texts
