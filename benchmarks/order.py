"""How long it takes to say which pictures a training step sees: the order of version 1 against version 2.

    OMP_NUM_THREADS=1 python benchmarks/order.py

prints, for sets of several sizes and a batch of 256, the milliseconds of a step of both versions, measured in turn,
least and median, and their ratio [tenths]; then those of version 2 alone, where version 1 would keep gigabytes, and of
seven buckets. On a busy machine believe the least.
"""

from functools import partial
from itertools import count

import torch
import typer

from davae.cost.timing import compute_paired_ratios, compute_spread, measure_interleaved
from davae.data.order import SHUFFLED, bucket_batch

BATCH_SIZE = 256
BOTH = (1000, SHUFFLED, 10**5, 10**6, 10**7)
SECOND_ALONE = (10**8, 10**9)


def measure(counts: list[int], *versions: int, repeats: int) -> None:
    """Print a line on sets of so many pictures in each bucket."""
    # Every call is another step, as in training.
    steps = count(1_000_000)
    runs = {
        str(version): lambda version=version: bucket_batch(
            counts, BATCH_SIZE, seed=0, step=next(steps), version=version
        )
        for version in versions
    }
    measured = measure_interleaved(runs, torch.device("cpu"), repeats=repeats, warm_up=2, shortest=0)

    line = f"{sum(counts):>13,} pictures in {len(counts)} buckets:"
    for version, times in measured.items():
        spread = compute_spread(times.seconds)
        line += f"  version {version} {1000 * spread.least:.3f}, {1000 * spread.median:.3f} ms"
    if len(versions) == 2:
        ratio = compute_paired_ratios(measured["1"].seconds, measured["2"].seconds)
        line += f"  {ratio.median:.1f}x [{ratio.p10:.1f}, {ratio.p90:.1f}]"
    typer.echo(line)


def main(repeats: int = 21) -> None:
    """Print the lines."""
    show = partial(measure, repeats=repeats)
    for pictures in BOTH:
        show([pictures], 1, 2)
    for pictures in SECOND_ALONE:
        show([pictures], 2)
    show([10**8 // 7 + 1000 * bucket for bucket in range(7)], 2)


if __name__ == "__main__":
    typer.run(main)
