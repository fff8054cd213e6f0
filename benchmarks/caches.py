"""Stage 2's steps a second with cached latents and text embeddings, and with both encoded at every step; interleaved.

    OMP_NUM_THREADS=1 python benchmarks/caches.py

trains the shipped pair as recipes/avatars/stage2.toml does, in turns of a few steps of either sort, and prints
seconds a step (median of the turns) and their ratio (median of the pairs, least and most). Drawing the images,
building the cache, loading and saving are not in it.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from davae.cost.timing import compute_paired_ratios, compute_spread
from davae.data.avatar_shards import write_avatar_shards
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

RECIPE = Path(__file__).parents[1] / "recipes/avatars/stage2.toml"


def measure_seconds(recipe: FinetuneRecipe, folder: Path) -> float:
    """Mean seconds of a step: the last line of metrics.jsonl has the time of all steps before it."""
    finetune(recipe, folder)
    return read_metrics(folder / "metrics.jsonl")[-1]["seconds"] / (recipe.steps - 1)


def main(
    turns: Annotated[int, typer.Option(help="Turns of each kind.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps in a turn.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Batch size.")] = 32,
    limit: Annotated[int, typer.Option(help="Images in the set.")] = 128,
) -> None:
    """Print both times and their ratio."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        images = write_avatar_shards(Path(name) / "images", training=limit, held_out=0)
        changes = {"steps": steps, "batch_size": batch_size, "pictures": str(images), "cache": f"{name}/cache"}
        for turn in range(turns):
            for online in seconds:
                recipe = load_recipe(FinetuneRecipe, RECIPE, {**changes, "online": online})
                seconds[online].append(measure_seconds(recipe, Path(name) / f"{online}-{turn}"))
    for online, values in seconds.items():
        typer.echo(
            f"{'online' if online else 'cached'}: {compute_spread(values).median:.2f} s a step, batch {batch_size}"
        )
    ratio = compute_paired_ratios(seconds[True], seconds[False])
    typer.echo(f"cached {ratio.median:.2f}x as fast as online [{ratio.least:.2f}, {ratio.most:.2f}], {turns} pairs")


if __name__ == "__main__":
    typer.run(main)
