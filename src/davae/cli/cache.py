"""Verbs on caches: what stage 2 encodes before it trains, made beforehand, checked, tidied up."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import DryRun, RankTimeout, RecipePath, RunFolder, Settings, by_first, quiet, say
from davae.errors import CheckpointError

app = typer.Typer(help="Caches of latents and text embeddings: build, verify, prune.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="What a recipe has as cache, or RUN/cache.")]


@app.command()
def build(
    recipe: RecipePath,
    out: RunFolder = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    rank_timeout: RankTimeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Encode what a run of the recipe would encode first; killed, it goes on where it was. Also as many processes."""
    quiet()
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
    """Read all caches below FOLDER, print what they hold, and fail with 4 if a file is not what was written."""
    from davae.data.cache import read_caches

    found = read_caches(folder)
    for cache in found:
        say(cache.to_text())
    if damaged := sum(len(cache.damaged) for cache in found):
        raise CheckpointError(
            f"{damaged} files are damaged: run again to make their entries anew, or davae cache prune"
        )


@app.command()
@by_first
def prune(
    folder: Folder,
    days: Annotated[float | None, typer.Option(min=0, help="Also caches not written to for so many days.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
) -> None:
    """Remove damaged files and what killed processes left; with --days also old caches."""
    from davae.data.cache import prune_caches

    freed = prune_caches(folder, days=days, dry_run=dry_run)
    say(f"{freed / 2**20:,.1f} MiB {'would be ' if dry_run else ''}freed")
