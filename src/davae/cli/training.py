"""Verbs that train, each from its recipe; and the one that lists runs."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli import options
from davae.cli.options import choose_trackers, quiet_libraries, say


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
    say(train_autoencoder(resolved, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout))


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
    say(finetune(resolved, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout))


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
