"""Time and memory from 10^4 to 10^7 generated rows, and two processes compared with one.

    python -m benchmarks.scaling rows --sizes 10000 100000 1000000          # a tiny encoder: mainly the data path
    python -m benchmarks.scaling processes examples/womens_reviews.yaml      # 1 process x all threads, 2 x half

Every measurement runs in a process of its own, whose peak memory is the kernel's figure (VmHWM).
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from benchmarks.common import machine, table
from mmbert_core.config import Config
from mmbert_core.data.batches import epoch_order, step_rows
from mmbert_core.data.cache import open_or_build_cache
from mmbert_core.data.prepare import prepare
from mmbert_core.data.tokens import load_tokenizer
from mmbert_core.predictor import Predictor
from mmbert_core.runtime.memory import peak_mb
from mmbert_core.runtime.ranks import read_context, set_threads
from mmbert_core.tables.table import Roles
from mmbert_core.training import loop
from mmbert_core.training.run_folder import locked_folder
from mmbert_core.training.start import prepare_model, start_run

STEPS = 200
SYLLABLES = [first + second for first in "bcdfghjklmnprstvz" for second in ("a", "e", "i", "o", "u", "an", "er")]
MAX_PREDICTED_ROWS = 1_000_000


# ---- generated tables ----


def write_encoder(folder: Path) -> None:
    """One layer of width 32 with random weights, and a WordPiece tokenizer of syllables."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SYLLABLES, *(f"##{syllable}" for syllable in SYLLABLES)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)


def write_table(path: Path, num_rows: int, seed: int = 0) -> None:
    """5 to 40 words of 1 to 3 syllables, two numbers, a category of 50 values, a label that follows from a number."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(SYLLABLES, size)) for size in rng.integers(1, 4, size=20_000)]
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("row_id,text,age,amount,kind,label\n")
        for start in range(0, num_rows, 50_000):
            count = min(50_000, num_rows - start)
            lengths = rng.integers(5, 41, size=count)
            picks = iter(rng.integers(0, len(words), size=int(lengths.sum())).tolist())
            ages, amounts, kinds = (
                rng.integers(0, 100, count).tolist(),
                rng.lognormal(size=count).round(2).tolist(),
                rng.integers(0, 50, count).tolist(),
            )
            for row, length in enumerate(lengths.tolist()):
                text = " ".join(words[next(picks)] for _ in range(length))
                label = int(ages[row] > 50)
                stream.write(f"{start + row},{text},{ages[row]},{amounts[row]},k{kinds[row]},{label}\n")


def config_for(folder: Path, name: str) -> Config:
    small = folder / "small.csv"
    return Config(
        train_path=str(folder / f"{name}.csv"),
        val_path=str(small),
        model_path=str(folder / f"run-{name}"),
        cache_path=str(folder / "cache"),
        text_name=("text",),
        label_name="label",
        id_name="row_id",
        tab_field_list=("age", "amount"),
        cat_field_list=("kind",),
        encoder=str(folder / "encoder"),
        max_length=128,
        max_epochs=1,
        save_every=10**9,
        num_threads=1,
    )


# ---- what runs in a process of its own ----


def stage_cache(folder: Path, num_rows: int) -> dict[str, float]:
    """Read, tokenise and store the table."""
    config = config_for(folder, str(num_rows))
    roles, tokenizer = Roles.from_config(config), load_tokenizer(config.encoder)
    open_or_build_cache(
        config.val_path, roles, tokenizer, max_length=config.max_length, max_chunks=1, cache_path=config.cache_path
    )
    before, started = peak_mb(), time.perf_counter()
    rows = open_or_build_cache(
        config.train_path, roles, tokenizer, max_length=config.max_length, max_chunks=1, cache_path=config.cache_path
    )
    assert rows.num_rows == num_rows
    return {"seconds": time.perf_counter() - started, "mb_of_imports": before, "peak_mb": peak_mb()}


def stage_tokenizer(folder: Path, num_rows: int) -> dict[str, float]:
    """The bare tokenizer on up to 100,000 of the texts."""
    backend = BertTokenizerFast.from_pretrained(folder / "encoder").backend_tokenizer
    with open(folder / f"{num_rows}.csv", encoding="utf-8") as stream:
        next(stream)
        texts = [line.split(",")[1] for _, line in zip(range(100_000), stream)]
    started = time.perf_counter()
    for first in range(0, len(texts), 1024):
        backend.encode_batch_fast(texts[first : first + 1024])
    return {"texts_per_second": len(texts) / (time.perf_counter() - started)}


def stage_train(folder: Path, num_rows: int) -> dict[str, float]:
    """The start from the cache until step 1, then the batches of 10 x STEPS steps without a model, then STEPS steps."""
    started = time.perf_counter()
    config = config_for(folder, str(num_rows))
    data, context = prepare(config), read_context()
    set_threads(1, context)
    model = prepare_model(config, data)
    prepared = time.perf_counter() - started
    order = epoch_order(num_rows, config.seed, 0)
    steps = min(STEPS, num_rows // config.batch_size)
    batches = min(10 * STEPS, num_rows // config.batch_size)
    started = time.perf_counter()
    for index in range(batches):
        data.train.batch(step_rows(order, index, config.batch_size))
    batched_rate = batches * config.batch_size / (time.perf_counter() - started)
    with locked_folder(config):
        started = time.perf_counter()
        run = start_run(config, data, model, context)
        start_seconds = prepared + time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(steps):
            loop.train_one_step(run, order)
        trained = time.perf_counter() - started
    return {
        "start_seconds": start_seconds,
        "batched_rows_per_second": batched_rate,
        "trained_rows_per_second": steps * config.batch_size / trained,
        "peak_mb": peak_mb(),
    }


def stage_finish(folder: Path, num_rows: int) -> dict[str, float]:
    """A model folder, for the prediction."""
    config = config_for(folder, "first")
    data, context = prepare(config), read_context()
    model = prepare_model(config, data)
    return {"steps": loop.fit(config, data, model, context).steps}


def stage_predict(folder: Path, num_rows: int) -> dict[str, float]:
    set_threads(1, read_context())
    predictor = Predictor.from_folder(folder / "run-first")
    before, started = peak_mb(), time.perf_counter()
    count = predictor.predict_file([str(folder / f"{num_rows}.csv")], folder / "predictions.tsv")
    return {"rows_per_second": count / (time.perf_counter() - started), "mb_of_imports": before, "peak_mb": peak_mb()}


STAGES = {
    "cache": stage_cache,
    "tokenizer": stage_tokenizer,
    "train": stage_train,
    "finish": stage_finish,
    "predict": stage_predict,
}


def in_a_process(stage: str, folder: Path, num_rows: int) -> dict[str, float]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.scaling", "stage", stage, str(folder), str(num_rows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - started}
    print(
        f"{num_rows:>10,} rows  {stage}: " + "  ".join(f"{name} {value:,.1f}" for name, value in figures.items()),
        file=sys.stderr,
        flush=True,
    )
    return figures


# ---- the two questions ----


def measure_rows(sizes: list[int], json_path: Path | None) -> None:
    record: dict[str, Any] = {"machine": {**machine(), "threads": 1}, "sizes": {}}
    with tempfile.TemporaryDirectory(prefix="mmbert-scaling-") as name:
        folder = Path(name)
        write_encoder(folder / "encoder")
        write_table(folder / "small.csv", 1000, seed=1)
        write_table(folder / "first.csv", 1000, seed=2)
        in_a_process("finish", folder, 1000)
        for num_rows in sizes:
            write_table(folder / f"{num_rows}.csv", num_rows)
            figures = {stage: in_a_process(stage, folder, num_rows) for stage in ("tokenizer", "cache", "train")}
            if num_rows <= MAX_PREDICTED_ROWS:
                figures["predict"] = in_a_process("predict", folder, num_rows)
            record["sizes"][num_rows] = figures
            for path in (folder / f"{num_rows}.csv", folder / "predictions.tsv"):
                path.unlink(missing_ok=True)
            subprocess.run(["rm", "-rf", str(folder / "cache")], check=True)
    print(rows_table(record["sizes"]))
    if json_path:
        json_path.write_text(json.dumps(record, indent=1) + "\n")


def rows_table(sizes: dict[int, dict[str, dict[str, float]]]) -> str:
    """`sizes`: number of rows -> stage -> figures."""
    header = ["rows", "token cache, s", "of the bare tokenizer's rate", "peak MB", "start from it, to step 1, s"]
    header += ["batches, rows/s", "training, rows/s", "peak MB", "prediction, rows/s", "peak MB"]
    rows = []
    for num_rows, figures in sizes.items():
        cache, train, predict = figures["cache"], figures["train"], figures.get("predict")
        share = num_rows / cache["seconds"] / figures["tokenizer"]["texts_per_second"]
        cells = [f"{num_rows:,}", f"{cache['seconds']:,.1f}", f"{share:.0%}", f"{cache['peak_mb']:,.0f}"]
        cells += [f"{train['start_seconds']:.2f}", f"{train['batched_rows_per_second']:,.0f}"]
        cells += [f"{train['trained_rows_per_second']:,.0f}", f"{train['peak_mb']:,.0f}"]
        cells += [f"{predict[name]:,.0f}" if predict else "" for name in ("rows_per_second", "peak_mb")]
        rows.append(cells)
    return table(header, rows)


def training_rate(
    config: str, folder: Path, name: str, num_processes: int, num_threads: int, extra: list[str]
) -> float:
    """Training rows per second of a run under torchrun, without validation and test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += ["train.py", config, "--model_path", str(folder / name), "--cache_path", str(folder / "cache")]
    command += ["--num_threads", str(num_threads), "--val_path", "null", "--val_fraction", "0", "--test_path", "null"]
    # with one GPU only one of the processes could use it
    environment = os.environ if torch.cuda.device_count() > 1 else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *extra], check=True, stdout=sys.stderr, env=environment)
    return json.loads((folder / name / "train_results.json").read_text())["train_rows_per_second"]


def measure_processes(config: str, rounds: int, extra: list[str], json_path: Path | None) -> None:
    cores = len(os.sched_getaffinity(0))
    results: dict[str, list[float]] = {f"{count} x {cores // count}": [] for count in (1, 2)}
    with tempfile.TemporaryDirectory(prefix="mmbert-scaling-") as folder:
        for number in range(rounds):
            for count in (1, 2):
                rate = training_rate(config, Path(folder), f"run-{number}-{count}", count, cores // count, extra)
                results[f"{count} x {cores // count}"].append(rate)
                print(
                    f"round {number + 1}/{rounds}  {count} processes x {cores // count} threads: {rate:.2f} rows/s",
                    file=sys.stderr,
                    flush=True,
                )
    one, two = results.values()
    ratio = statistics.median(second / first for first, second in zip(one, two, strict=True))
    print(
        table(
            ["processes x threads", "training rows/s, median", "spread"],
            [
                [name, f"{statistics.median(rates):.2f}", f"{min(rates):.2f} - {max(rates):.2f}"]
                for name, rates in results.items()
            ],
        )
    )
    print(f"2 processes / 1 process: {ratio:.3f} (median of the rounds)")
    if json_path:
        json_path.write_text(
            json.dumps({"machine": {**machine(), "threads": cores}, "rows_per_second": results}, indent=1) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows", help="time and memory by the number of rows")
    rows.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    processes = commands.add_parser("processes", help="1 and 2 processes; other arguments go to train.py")
    processes.add_argument("config")
    processes.add_argument("--rounds", type=int, default=5)
    for each in (rows, processes):
        each.add_argument("--json", type=Path)
    stage = commands.add_parser("stage")
    stage.add_argument("name", choices=list(STAGES))
    stage.add_argument("folder", type=Path)
    stage.add_argument("num_rows", type=int)
    arguments, extra = parser.parse_known_args()
    if arguments.command == "stage":
        gc.freeze()  # as the command line does
        print(json.dumps(STAGES[arguments.name](arguments.folder, arguments.num_rows)))
    elif arguments.command == "rows":
        measure_rows(arguments.sizes, arguments.json)
    else:
        measure_processes(arguments.config, arguments.rounds, extra, arguments.json)


if __name__ == "__main__":
    main()
