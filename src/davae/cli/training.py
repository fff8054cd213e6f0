"""Verbs that train: both stages, each from its recipe."""

from davae.cli.options import DryRun, RankTimeout, RecipePath, ReportTo, RunFolder, Settings, quiet, say, trackers_of


def train_autoencoder(
    recipe: RecipePath,
    out: RunFolder = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    report_to: ReportTo = [],  # noqa: B006 - as above
    rank_timeout: RankTimeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Stage 1: train the detail-aligned autoencoder, then calibrate its latent statistics."""
    quiet()
    from davae.cost.budget import plan_of
    from davae.run.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.stage_one import AutoencoderRecipe, train_autoencoder

    resolved = load_recipe(AutoencoderRecipe, recipe, parse_overrides(settings))
    if dry_run:
        return say(plan_of(resolved, recipe))
    folder = run_folder(AutoencoderRecipe, recipe, out)
    say(train_autoencoder(resolved, folder, report_to=trackers_of(report_to), rank_timeout=rank_timeout))


def finetune(
    recipe: RecipePath,
    out: RunFolder = None,
    settings: Settings = [],  # noqa: B006 - typer reads the default and never changes it
    report_to: ReportTo = [],  # noqa: B006 - as above
    rank_timeout: RankTimeout = 1800.0,
    dry_run: DryRun = False,
) -> None:
    """Stage 2: teach the upgraded transformer the detail latents (LoRA and ports, layers and ports, or all of it)."""
    quiet()
    from davae.cost.budget import plan_of
    from davae.run.recipe import load_recipe, parse_overrides, run_folder
    from davae.training.stage_two_recipe import FinetuneRecipe
    from davae.training.stage_two_run import finetune

    resolved = load_recipe(FinetuneRecipe, recipe, parse_overrides(settings))
    if dry_run:
        return say(plan_of(resolved, recipe))
    folder = run_folder(FinetuneRecipe, recipe, out)
    say(finetune(resolved, folder, report_to=trackers_of(report_to), rank_timeout=rank_timeout))
