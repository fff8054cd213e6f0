"""Stage 1 from the closed-form start and from the paper's random one, on equal budgets, several seeds.

    python recipes/small_pair/compare_starts.py runs/starts

writes RUN/result.json (copied into experiments/results/starts.json) and prints its table; the same command goes on
where it stopped. A start and a seed share pictures, crops and noise with the other start of that seed.
"""

import statistics
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import typer

from davae.record import environment, read_metrics
from davae.storage import write_json
from davae.training.autoencoder import AutoencoderRecipe, LossWeights, train_autoencoder

STARTS: tuple[Literal["closed form", "random"], ...] = ("closed form", "random")
BUDGETS = (100, 1200)


def recipe(start: Literal["closed form", "random"], steps: int, seed: int) -> AutoencoderRecipe:
    """Stage 1 of the shipped pair on smaller crops."""
    return AutoencoderRecipe(
        start=start,
        steps=steps,
        seed=seed,
        crop=64,
        batch_size=4,
        learning_rate=6e-4,
        ema_decay=0.99,
        evaluate_every=steps,
        loss=LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=0.02),
    )


def main(run: Path, seeds: Annotated[int, typer.Option(help="How many.")] = 3) -> None:
    """Train all of them, and write the numbers."""
    rows = []
    for steps, start in product(BUDGETS, STARTS):
        ends = []
        for seed in range(seeds):
            folder = run / f"{start.replace(' ', '-')}-{steps}-{seed}"
            train_autoencoder(recipe(start, steps, seed), folder)
            ends.append(read_metrics(folder / "metrics.jsonl"))
        for moment, at in (("before", 0), ("after", -1)):
            found = [[row for row in metrics if "heldout_psnr" in row][at] for metrics in ends]
            row = {"steps": steps, "start": start, "moment": moment}
            for name in ("psnr", "ssim", "lpips"):
                values = [entry[f"heldout_{name}"] for entry in found]
                row[name] = [statistics.mean(values), statistics.stdev(values) if seeds > 1 else 0.0]
            rows.append(row)
            typer.echo(
                f"{steps:5d} steps, {start:11s}, {moment:6s}: PSNR {row['psnr'][0]:.2f} +- {row['psnr'][1]:.2f} dB, "
                f"LPIPS {row['lpips'][0]:.4f} +- {row['lpips'][1]:.4f}"
            )
    write_json(run / "result.json", {"rows": rows, "seeds": seeds, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
