"""What tests/runtime/test_forks.py runs in a process of its own: `MODEL_FOLDER THREADS FORKS [PRECISION]`.

Prints one JSON object a child: its largest difference from the parent's probabilities. The first child runs while
nothing else does and has a child of its own; the others are forked while two threads predict. A child that takes two
minutes is ended and printed as "hangs".
"""

import json
import logging
import multiprocessing
import sys
import threading
from typing import Any

import torch

from mmbert_core.predictor import Predictor

SECONDS = 120.0
ROWS = [
    {"text": "refund pay now please " * (1 + row % 7), "age": row % 50, "amount": 1.5, "kind": "abc"[row % 3]}
    for row in range(400)
]


def probability_columns(row: dict[str, Any]) -> list[str]:
    return [name for name in row if name.startswith("prob")]


def compare(
    predictor: Predictor, folder: str, expected: list[dict[str, Any]], explained: dict[str, Any], depth: int
) -> None:
    """In a child: predict in two threads and with a newly loaded model; explain; then a child of its own."""
    found = predictor.predict(ROWS)
    again = Predictor.from_folder(folder).predict(ROWS[:50])
    thread = threading.Thread(target=lambda: found.extend(predictor.predict(ROWS)))
    thread.start()
    thread.join()
    pairs = [*zip(found, expected * 2, strict=True), *zip(again, expected, strict=False)]
    differences = [abs(ours[name] - theirs[name]) for ours, theirs in pairs for name in probability_columns(theirs)]
    weights = zip(predictor.explain(ROWS[3])["tokens"], explained["tokens"], strict=True)
    differences += [0.1 * abs(ours[1] - theirs[1]) for ours, theirs in weights]  # sixteen gradients round more
    print(json.dumps({"depth": depth, "difference": max(differences), "threads": torch.get_num_threads()}), flush=True)
    if depth:
        fork(compare, predictor, folder, expected, explained, depth - 1)


def fork(target: Any, *arguments: Any) -> None:
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        print(json.dumps("hangs"), flush=True)
        child.kill()
    elif child.exitcode:
        print(json.dumps(f"ended with {child.exitcode}"), flush=True)


def main(folder: str, threads: str, forks: str, precision: str = "auto") -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(threads))
    predictor = Predictor.from_folder(folder, precision=precision)
    expected, explained = predictor.predict(ROWS), predictor.explain(ROWS[3])
    fork(compare, predictor, folder, expected, explained, 1)
    stop = threading.Event()

    def predict_until_stopped() -> None:
        while not stop.is_set():
            predictor.predict(ROWS[:64])

    for _ in range(2):
        threading.Thread(target=predict_until_stopped).start()
    try:
        for _ in range(int(forks) - 1):
            fork(compare, predictor, folder, expected, explained, 0)
    finally:
        stop.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
