"""Training rows per second of ours, a plain padded loop, HF Trainer and Lightning: same model, rows, batch, precision.

    python -m benchmarks.throughput examples/womens_reviews.yaml --json throughput.json --plot throughput.png

Needs the extra `bench`. A round is warm-up and some timed steps of every contender, in turn; the GPU is synchronised
only before the first and after the last timed step. rows/s are the real tokens per second divided by the data's mean
length, so that a round of longer rows is not slower. All get tokenised rows, the same threads, fused AdamW, a linear
schedule and the config's clipping.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from benchmarks.common import (
    Collator,
    Contender,
    PeerModel,
    Rows,
    Work,
    alternate,
    gemm_peak,
    opened,
    parser,
    report,
    wait,
)
from mmbert_core.config import Config
from mmbert_core.data.batches import epoch_order
from mmbert_core.data.prepare import Data
from mmbert_core.inference.precision import AUTOCAST_DTYPES, resolve_precision
from mmbert_core.runtime.ranks import DistContext
from mmbert_core.training import loop
from mmbert_core.training.run_folder import locked_folder
from mmbert_core.training.start import prepare_model, start_run

PEERS = ("plain", "trainer", "grouped", "lightning")
LR = 2e-5
STEPS = {"cpu": (1, 8), "cuda": (10, 50)}  # of warm-up, timed


class Clock:
    """The time from the end of the warm-up to the end of the last step."""

    def __init__(self, bench: "Bench") -> None:
        self.bench, self.done, self.ends = bench, 0, []

    def tick(self) -> None:
        """Called after each step, which a GPU may not have finished."""
        self.done += 1
        if self.done in (self.bench.warmup, self.bench.warmup + self.bench.steps):
            wait(self.bench.context.device)
            self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        [start, end] = self.ends
        return end - start


class Bench:
    """The rows of each round, and the figures from its times."""

    def __init__(self, config: Config, data: Data, context: DistContext, steps: int | None) -> None:
        self.config, self.data, self.context = config, data, context
        self.warmup, self.steps = STEPS[context.device.type]
        self.steps = steps or self.steps
        self.clip = config.gradient_clip_val
        self.precision = resolve_precision(config.precision, context.device)
        self.order = epoch_order(len(data.train), config.seed, 0)
        self.mean_length = data.train.lengths.mean()
        self.size = (self.warmup + self.steps) * config.batch_size  # rows of a round
        if self.size > len(data.train):
            raise SystemExit(
                f"throughput: expected at least {self.size} training rows for {self.warmup} + {self.steps} steps, "
                f"found {len(data.train)}"
            )

    def positions(self, number: int) -> np.ndarray:
        size = self.size
        return np.take(self.order, range(number * size, (number + 1) * size), mode="wrap")

    def rows(self, number: int) -> Rows:
        return Rows(self.data.train, self.positions(number))

    def figures(self, clock: Clock, lengths: list[np.ndarray], work: Work) -> dict[str, float]:
        """Rows/s for texts of the data's mean length: those of a round may be longer or shorter."""
        timed = np.concatenate(lengths[self.warmup : self.warmup + self.steps])
        assert clock.done == self.warmup + self.steps
        return {
            "rows/s": timed.sum() / clock.seconds / self.mean_length,
            "tokens/s": timed.sum() / clock.seconds,
            "useful GFLOP/s": work.training(timed) / clock.seconds / 1e9,
        }


# ---- contenders: each returns the function that runs a round ----


def ours(bench: Bench) -> Callable[[int], dict[str, float]]:
    """The loop's own step, logging included."""
    model = prepare_model(bench.config, bench.data)
    run = start_run(bench.config, bench.data, model, bench.context)
    work = Work.of(model.text_subnetwork)

    def round_(number: int) -> dict[str, float]:
        clock, order, lengths = Clock(bench), bench.positions(number), []
        for index in range(bench.warmup + bench.steps):
            run.state.rows_consumed = index * bench.config.batch_size
            step_rows = order[index * bench.config.batch_size :][: bench.config.batch_size]
            lengths.append(bench.data.train.lengths[step_rows])
            loop.log_step(run, loop.train_one_step(run, order))
            clock.tick()
        return bench.figures(clock, lengths, work)

    return round_


def plain(bench: Bench) -> Callable[[int], dict[str, float]]:
    """A hand-written loop: DataLoader, padding to the longest, AdamW."""
    device, model = bench.context.device, PeerModel(bench.config, bench.data).to(bench.context.device)
    scaler = torch.amp.GradScaler(device.type, enabled=bench.precision == "fp16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 10_000)

    def round_(number: int) -> dict[str, float]:
        collator, clock = Collator(bench.data.tokenizer), Clock(bench)
        for batch in DataLoader(
            bench.rows(number),
            bench.config.batch_size,
            shuffle=True,
            collate_fn=collator,
            pin_memory=device.type == "cuda",
        ):
            with torch.autocast(device.type, AUTOCAST_DTYPES[bench.precision], enabled=bench.precision != "fp32"):
                loss = model(**{name: value.to(device, non_blocking=True) for name, value in batch.items()})["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if bench.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), bench.clip)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            clock.tick()
        return bench.figures(clock, collator.lengths, Work.of(model.network.text_subnetwork))

    return round_


def trainer(bench: Bench, *, grouped: bool = False) -> Callable[[int], dict[str, float]]:
    """HF Trainer with dynamic padding; `grouped`: batches of similar lengths, whose rows are not a random sample."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = PeerModel(bench.config, bench.data)

    def round_(number: int) -> dict[str, float]:
        collator, clock = Collator(bench.data.tokenizer), Clock(bench)
        rows = Rows(bench.data.train, grouped_positions(bench, number)) if grouped else bench.rows(number)

        class Ticks(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=bench.config.batch_size,
                max_steps=bench.warmup + bench.steps,
                learning_rate=LR,
                max_grad_norm=bench.clip,
                bf16=bench.precision == "bf16",
                fp16=bench.precision == "fp16",
                use_cpu=bench.context.device.type == "cpu",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                label_names=["labels"],
                seed=number,
                train_sampling_strategy="sequential" if grouped else "random",
            )
            hf_trainer = Trainer(model, settings, train_dataset=rows, data_collator=collator, callbacks=[Ticks()])
            hf_trainer.train()
            hf_trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else the next round wraps it again
        return bench.figures(clock, collator.lengths, Work.of(model.network.text_subnetwork))

    return round_


def grouped_positions(bench: Bench, number: int) -> np.ndarray:
    """Rows of random batches of an epoch that Trainer groups by length.

    Trainer sorts up to 50 batches at a time, the longest first: a short round would have long batches alone.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    size, lengths = bench.config.batch_size, bench.data.train.lengths
    indices = np.array(
        get_length_grouped_indices(lengths.tolist(), size, generator=torch.Generator().manual_seed(number))
    )
    batches = indices[: len(indices) // size * size].reshape(-1, size)
    return batches[np.random.default_rng(number).permutation(len(batches))[: bench.warmup + bench.steps]].ravel()


def lightning(bench: Bench) -> Callable[[int], dict[str, float]]:
    """Lightning with dynamic padding, the module put in train mode (from_pretrained's eval mode would skip dropout)."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = PeerModel(bench.config, bench.data)

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=LR, fused=True)
            schedule = get_linear_schedule_with_warmup(optimizer, 0, 10_000)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Ticks(L.Callback):
        def on_train_start(self, _: Any, module: L.LightningModule) -> None:
            module.train()

        def on_train_batch_end(self, *_: Any) -> None:
            clock.tick()

    module, clock = Module(), Clock(bench)

    def round_(number: int) -> dict[str, float]:
        nonlocal clock
        collator, clock = Collator(bench.data.tokenizer), Clock(bench)
        on_gpu = bench.context.device.type == "cuda"
        loader = DataLoader(
            bench.rows(number), bench.config.batch_size, shuffle=True, collate_fn=collator, pin_memory=on_gpu
        )
        L.Trainer(
            max_steps=bench.warmup + bench.steps,
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            gradient_clip_val=bench.clip or None,
            precision={"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[bench.precision],
            logger=False,
            callbacks=[Ticks()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        ).fit(module, loader)
        return bench.figures(clock, collator.lengths, Work.of(module.model.network.text_subnetwork))

    return round_


MAKERS: dict[str, tuple[str, Callable[[Bench], Callable[[int], dict[str, float]]]]] = {
    "plain": ("plain padded loop", plain),
    "trainer": ("HF Trainer, dynamic padding", trainer),
    "grouped": ("HF Trainer, group by length", lambda bench: trainer(bench, grouped=True)),
    "lightning": ("Lightning, dynamic padding", lightning),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, help="timed steps of a round, after the warm-up (CPU 8, GPU 50)")
    options.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="compared programs (all)")
    arguments = options.parse_args()
    with opened(arguments) as (config, data, context), locked_folder(config):
        bench = Bench(config, data, context, arguments.steps)
        contenders = [
            Contender("mmbert_core", ours(bench), ours=True),
            *(Contender(MAKERS[name][0], MAKERS[name][1](bench)) for name in arguments.peers),
        ]
        dtype = AUTOCAST_DTYPES[bench.precision]
        peak = Contender("GEMM peak", lambda _: {"useful GFLOP/s": gemm_peak(context.device, dtype) / 1e9})
        alternate([*contenders, peak], arguments.rounds)
        share = sorted(
            one["useful GFLOP/s"] / two["useful GFLOP/s"] for one, two in zip(contenders[0].rounds, peak.rounds)
        )
        extra = {
            "gemm_peak_gflops": peak.median("useful GFLOP/s"),
            "useful_share_of_peak": share[len(share) // 2],
            "rows_a_step": config.batch_size,
            "steps_a_round": bench.steps,
            "mean_tokens": float(bench.mean_length),
            "precision": bench.precision,
        }
        report(contenders, figure="rows/s", unit="training rows per second", extra=extra, arguments=arguments)


if __name__ == "__main__":
    main()
