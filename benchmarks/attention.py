"""Forward and backward of attention on a CPU: the fused kernel against plain products, bfloat16, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

prints milliseconds (median of 20) and their ratio for the lengths of stage 2: 64 tokens of the picture and 24 of text,
and T5's default of 256.
"""

import statistics
import time

import torch
import torch.nn.functional as F
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel

from davae.training.devices import attention_on

BATCH, HEADS, WIDTH, REPEATS = 32, 4, 56, 20


def time_attention(tokens: int) -> dict[str, float]:
    """Median time of one forward and backward pass of each kind."""
    shape = (BATCH, HEADS, tokens, WIDTH)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, dtype=torch.bfloat16)

    # In turns, so that a busy moment hits both.
    times: dict[str, list[float]] = {"fused": [], "plain": []}
    for _ in range(REPEATS):
        for name, context in (
            ("fused", sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
            ("plain", attention_on(torch.device("cpu"))),
        ):
            began = time.perf_counter()
            with context:
                made = F.scaled_dot_product_attention(query, key, value)
                torch.autograd.grad(made, (query, key, value), upstream)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print a line for each length."""
    for length in (88, 332):
        times = time_attention(length)
        typer.echo(
            f"{length:4d} tokens: fused {times['fused']:.1f} ms, plain {times['plain']:.1f} ms, "
            f"{times['fused'] / times['plain']:.2f}x"
        )


if __name__ == "__main__":
    typer.run(main)
