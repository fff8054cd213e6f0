"""Verbs that train, each from its recipe; the one that lists runs; and those on caches of stage 2's inputs."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli import options
from davae.cli.options import by_first, choose_trackers, quiet_libraries, say, say_next
from davae.errors import CheckpointError


def train_autoencoder(
    recipe: options.RecipePath,
    out: options.RunFolder = None,
    settings: options.Settings = [],
    report_to: options.ReportTo = [],
    rank_timeout: options.RankTimeout = 1800.0,
    dry_run: options.DryRun = False,
) -> None:
    """Stage 1: train the detail-aligned autoencoder, then calibrate its latent statistics."""
    quiet_libraries()
    from davae.cost.budget import describe_plan
    from davae.run.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.stage_one_recipe import AutoencoderRecipe
    from davae.training.stage_one_run import train_autoencoder

    resolved = load_recipe(AutoencoderRecipe, recipe, parse_overrides(settings))
    if dry_run:
        return say(describe_plan(resolved, recipe))
    folder = run_folder(AutoencoderRecipe, recipe, out)
    trained = train_autoencoder(resolved, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout)
    say(trained)
    say_next(
        f"stage 1 is done: the autoencoder is in {trained}, its pictures are in {folder / 'pictures'}",
        f"davae finetune RECIPE --set autoencoder={trained}",
    )


def finetune(
    recipe: options.RecipePath,
    out: options.RunFolder = None,
    settings: options.Settings = [],
    report_to: options.ReportTo = [],
    rank_timeout: options.RankTimeout = 1800.0,
    dry_run: options.DryRun = False,
) -> None:
    """Stage 2: fine-tune the upgraded transformer for the detail latents: LoRA and ports, layers and ports, or all."""
    quiet_libraries()
    from davae.cost.budget import describe_plan
    from davae.run.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.stage_two_recipe import FinetuneRecipe
    from davae.training.stage_two_run import finetune

    resolved = load_recipe(FinetuneRecipe, recipe, parse_overrides(settings))
    if dry_run:
        return say(describe_plan(resolved, recipe))
    folder = run_folder(FinetuneRecipe, recipe, out)
    pipeline = finetune(resolved, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout)
    say(pipeline)
    say_next(f"stage 2 is done: the upgraded pipeline is in {pipeline}", f'davae generate {pipeline} "a prompt"')


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Runs, or folders of runs; by default runs/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all settings as JSON, for programs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same: this verb changes nothing.")] = False,
) -> None:
    """List runs: their progress, their results, and the settings in which they differ."""
    from davae.run.comparison import find_runs, to_json, to_text

    summaries = find_runs(folders or [Path("runs")])
    say(to_json(summaries) if as_json else to_text(summaries))
    finished = sum(summary.state == "finished" for summary in summaries)
    say_next(
        f"{len(summaries)} runs, {finished} of them finished", "the command of a stopped run again, to go on with it"
    )


# ----------------------------------------------------------------------------------------------------------- caches


caches = typer.Typer(help="Caches of latents and text embeddings: build, verify, prune.", no_args_is_help=True)
CacheFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The cache of a recipe, or RUN/cache.")]


@caches.command()
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
    caches_folder = build_caches(resolved, folder, rank_timeout=rank_timeout)
    say(caches_folder)
    say_next(f"the caches in {caches_folder} are complete", f"davae finetune {recipe}")


@caches.command()
@by_first
def verify(folder: CacheFolder) -> None:
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
    say_next("all files are sound", "davae finetune RECIPE")


@caches.command()
@by_first
def prune(
    folder: CacheFolder,
    days: Annotated[float | None, typer.Option(min=0, help="Also remove caches not written to for so long.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,
) -> None:
    """Remove damaged files and the leftovers of killed processes; with --days also old caches."""
    from davae.data.cache import prune_caches

    freed = prune_caches(folder, days=days, dry_run=dry_run)
    verb = "would be freed" if dry_run else "freed"
    say(f"{freed / 2**20:,.1f} MiB {verb}")
    say_next("nothing was removed" if dry_run else "what is left is sound", f"davae cache verify {folder}")
