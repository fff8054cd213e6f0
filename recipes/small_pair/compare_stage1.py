"""Stage 1 on equal budgets, several seeds: closed-form or random start, antialiased or plain bicubic base picture.

    python recipes/small_pair/compare_stage1.py runs/compare

writes RUN/result.json (copied into experiments/results/stage1_comparison.json) and prints it; the same command
resumes. Runs of one seed share images, crops and noise.
"""

import statistics
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from davae.run.record import environment, read_metrics
from davae.run.storage import write_json
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder

ARMS: dict[str, dict[str, Any]] = {
    "closed form": {},
    "random": {"start": "random"},
    "closed form, plain bicubic": {"base_downsample": "bicubic"},
}
BUDGETS = (100, 800)


def make_recipe(arm: dict[str, Any], steps: int, seed: int) -> AutoencoderRecipe:
    """Stage 1 of the shipped pair on smaller crops, without noise on the latents."""
    return AutoencoderRecipe(
        **arm,
        steps=steps,
        seed=seed,
        crop=64,
        batch_size=4,
        learning_rate=6e-4,
        ema_decay=0.99,
        calibration_pictures=64,
        evaluate_every=steps,
        loss=LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=0.02),
    )


def summarise(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and deviation over the seeds of every held-out number."""
    names = ("psnr", "ssim", "lpips")
    values = {name: [row[f"heldout_{name}"] for row in runs] for name in names}
    return {name: [statistics.mean(x), statistics.stdev(x) if len(x) > 1 else 0.0] for name, x in values.items()}


def main(run: Path, seeds: Annotated[int, typer.Option(help="How many.")] = 3) -> None:
    """Train all of them, and write the numbers."""
    rows = []
    for steps, (name, arm) in product(BUDGETS, ARMS.items()):
        runs = []
        for seed in range(seeds):
            folder = run / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"
            train_autoencoder(make_recipe(arm, steps, seed), folder)
            runs.append([row for row in read_metrics(folder / "metrics.jsonl") if "heldout_psnr" in row])

        for moment, at in (("before", 0), ("after", -1)):
            row = {"steps": steps, "arm": name, "moment": moment, **summarise([rows[at] for rows in runs])}
            rows.append(row)
            typer.echo(row)

    write_json(run / "result.json", {"rows": rows, "seeds": seeds, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
