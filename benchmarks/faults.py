"""The cost of the sites of `davae.run.faults` without a fault, against the smallest step that davae trains.

    OMP_NUM_THREADS=1 python benchmarks/faults.py

prints nanoseconds of one visit (median of 20), milliseconds of a step of stage 2 on the shipped pair with one picture,
and the share of the visits in it.
"""

import statistics
import tempfile
import timeit
from pathlib import Path

import typer

from davae.run import faults
from davae.run.record import read_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

REPEATS, LOOPS, STEPS = 20, 100_000, 21
VISITS = 12
"""Of a step of stage 2 with one batch: latents, three conditions, prediction; loss to EMA; and some to spare."""


def main() -> None:
    """Measure and print."""
    seconds, bare = (
        statistics.median(timeit.repeat(call, repeat=REPEATS, number=LOOPS)) / LOOPS
        for call in (lambda: faults.at("loss"), lambda: None)
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = FinetuneRecipe(steps=STEPS, batch_size=1, limit=16, checkpoint_every=STEPS)
        finetune(recipe, Path(folder))
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    step = (lines[-1]["seconds"] - lines[0]["seconds"]) / (lines[-1]["step"] - lines[0]["step"])
    visit = seconds - bare
    share = VISITS * visit / step
    typer.echo(f"{1e9 * visit:.0f} ns a visit; {VISITS} visits in {1e3 * step:.1f} ms of a step: {share:.5%}")


if __name__ == "__main__":
    typer.run(main)
