"""Verbs on caches of stage 2's inputs: build, verify, prune."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli import options
from davae.cli.options import by_first, quiet_libraries, say
from davae.errors import CheckpointError

app = typer.Typer(help="Caches of latents and text embeddings: build, verify, prune.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The cache of a recipe, or RUN/cache.")]


@app.command()
def build(
    recipe: options.RecipePath,
    out: options.RunFolder = None,
    settings: options.Settings = [],
    rank_timeout: options.RankTimeout = 1800.0,
    dry_run: options.DryRun = False,
) -> None:
    """Encode what the recipe's run needs before it trains; resumes where it stopped, and several ranks share it."""
    quiet_libraries()
    from davae.run.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.stage_two_recipe import FinetuneRecipe
    from davae.training.stage_two_run import build_caches, find_cache_folder

    resolved = load_recipe(FinetuneRecipe, recipe, parse_overrides(settings))
    folder = run_folder(FinetuneRecipe, recipe, out)
    if dry_run:
        say(resolved.to_toml())
        return say(f"# caches go to {find_cache_folder(resolved, folder)}")
    say(build_caches(resolved, folder, rank_timeout=rank_timeout))


@app.command()
@by_first
def verify(folder: Folder) -> None:
    """Read all caches below FOLDER, print their contents, and exit with 4 if a file is damaged."""
    from davae.data.cache import read_caches

    # All caches are read and printed before the damage is an error.
    damaged = 0
    for cache in read_caches(folder):
        damaged += len(cache.damaged)
        say(cache.to_text())
    if damaged:
        raise CheckpointError(
            f"{damaged} files are damaged: run again to encode their entries again, or davae cache prune"
        )


@app.command()
@by_first
def prune(
    folder: Folder,
    days: Annotated[float | None, typer.Option(min=0, help="Also remove caches not written to for so long.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
) -> None:
    """Remove damaged files and the leftovers of killed processes; with --days also old caches."""
    from davae.data.cache import prune_caches

    freed = prune_caches(folder, days=days, dry_run=dry_run)
    verb = "would be freed" if dry_run else "freed"
    say(f"{freed / 2**20:,.1f} MiB {verb}")
