"""Stage 2's steps a second with cached latents and text embeddings, and with both encoded at every step; interleaved.

    OMP_NUM_THREADS=1 python benchmarks/caches.py

trains the shipped pair as recipes/small_pair/stage2.toml does, in turns of a few steps of either sort, and prints
seconds a step (median of the turns) and their ratio (median of the pairs, least and most). Building the cache, loading
and saving are not in it.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from davae.cost.timing import compute_paired_ratios, compute_spread
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

RECIPE = Path(__file__).parents[1] / "recipes" / "small_pair" / "stage2.toml"


def seconds_a_step(recipe: FinetuneRecipe, folder: Path) -> float:
    """Of all steps but the last, whose line in metrics.jsonl says what those before it took."""
    finetune(recipe, folder)
    return read_metrics(folder / "metrics.jsonl")[-1]["seconds"] / (recipe.steps - 1)


def main(
    turns: Annotated[int, typer.Option(help="Of each sort.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="In a turn.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Pictures in a step.")] = 32,
    limit: Annotated[int, typer.Option(help="Pictures in the set.")] = 128,
) -> None:
    """Print both times and their ratio."""
    found: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        changes = {"steps": steps, "batch_size": batch_size, "limit": limit, "cache": str(Path(name) / "cache")}
        for turn in range(turns):
            for online in found:
                recipe = load_recipe(FinetuneRecipe, RECIPE, {**changes, "online": online})
                found[online].append(seconds_a_step(recipe, Path(name) / f"{online}-{turn}"))
    for online, seconds in found.items():
        typer.echo(
            f"{'online' if online else 'cached'}: {compute_spread(seconds).median:.2f} s a step, batch {batch_size}"
        )
    ratio = compute_paired_ratios(found[True], found[False])
    typer.echo(f"cached {ratio.median:.2f}x as fast as online [{ratio.least:.2f}, {ratio.most:.2f}], {turns} pairs")


if __name__ == "__main__":
    typer.run(main)
