"""What this machine can do at most: matrix products, memory bandwidth, random numbers, and the bare fast tokenizer.

python -m benchmarks.limits examples/womens_reviews.yaml
"""

import time
from collections.abc import Callable

import torch

from benchmarks.common import gemm_peak, machine, opened, parser, table, wait
from mmbert_core.model.dropout import draw_keep_mask

MEGABYTES = 256
TEXTS = 20_000


def per_second(action: Callable[[], object], amount: float, device: torch.device, seconds: float = 2.0) -> float:
    """Units per second, the best within some seconds; a call does `amount` units."""
    action()
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        action()
        wait(device)
        best = max(best, amount / (time.perf_counter() - started))
    return best


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    with opened(arguments) as (config, data, context):
        device = context.device
        rows = [
            [f"matrix products {dtype}", f"{gemm_peak(device, dtype) / 1e9:,.0f} GFLOP/s"]
            for dtype in (torch.float32, torch.bfloat16)
        ]
        source = torch.ones(MEGABYTES * 2**18, device=device)
        target = torch.empty_like(source)
        bandwidth = per_second(lambda: target.copy_(source), 2 * source.nbytes, device)
        rows.append(["memory, read and written", f"{bandwidth / 1e9:,.1f} GB/s"])
        draws = 2**22
        floats, cpu = torch.empty(draws), torch.device("cpu")
        plain = per_second(lambda: floats.bernoulli_(0.9), draws, cpu)
        rows.append(["dropout draws on the CPU, bernoulli_", f"{plain / 1e6:,.0f} million/s"])
        ours = per_second(lambda: draw_keep_mask((draws,), 0.1), draws, cpu)
        rows.append(["dropout draws on the CPU, 16 bits each", f"{ours / 1e6:,.0f} million/s"])
        texts = data.tokenizer.batch_decode(
            [data.train.batch([row]).input_ids[0] for row in range(min(TEXTS, len(data.train)))],
            skip_special_tokens=True,
        )
        backend = data.tokenizer.backend_tokenizer
        rate = per_second(lambda: backend.encode_batch_fast(texts), len(texts), cpu)
        rows.append(["bare fast tokenizer, texts of the data's tokens", f"{rate:,.0f} texts/s"])
    print(table(["", "at most"], rows))
    print(machine())


if __name__ == "__main__":
    main()
