"""Verbs that train, each from its recipe; the one that lists runs; and those on caches of stage 2's inputs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli import options
from davae.cli.checks import check_pictures, check_settings
from davae.cli.options import by_first, choose_trackers, give, read_result, say, say_next, with_json
from davae.errors import CheckpointError, SettingsError


def train_autoencoder(
    recipe: options.RecipePath,
    out: options.RunFolder = None,
    settings: options.Settings = [],
    report_to: options.ReportTo = [],
    rank_timeout: options.RankTimeout = 1800.0,
    dry_run: options.DryRun = False,
) -> None:
    """Stage 1: train the detail-aligned autoencoder, then calibrate its latent statistics."""
    from davae.run.recipe import run_folder
    from davae.training.stage_one_recipe import AutoencoderRecipe

    resolved = _read_recipe(1, recipe, settings)
    if dry_run:
        return _show_plan(resolved, recipe)
    folder = run_folder(AutoencoderRecipe, recipe, out)
    _check_inputs(resolved, folder)
    from davae.training.stage_one_run import train_autoencoder

    trained = train_autoencoder(resolved, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout)
    say(trained)
    give({"autoencoder": trained, "pictures": folder / "pictures", **read_result(folder)})
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
    from davae.run.recipe import run_folder
    from davae.training.stage_two_recipe import FinetuneRecipe

    resolved = _read_recipe(2, recipe, settings)
    if dry_run:
        return _show_plan(resolved, recipe)
    folder = run_folder(FinetuneRecipe, recipe, out)
    _check_inputs(resolved, folder)
    from davae.training.stage_two_run import finetune

    pipeline = finetune(resolved, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout)
    say(pipeline)
    give({"pipeline": pipeline, **read_result(folder)})
    say_next(f"stage 2 is done: the upgraded pipeline is in {pipeline}", f'davae generate {pipeline} "a prompt"')


def _read_recipe(stage: int, path: Path, settings: Sequence[str]) -> Any:
    """The recipe of a stage; one of the other stage is told in a line."""
    from davae.run.recipe import has_sections, load_recipe, parse_overrides, read_toml
    from davae.training.stage_one_recipe import AutoencoderRecipe
    from davae.training.stage_two_recipe import FinetuneRecipe

    kinds: dict[int, Any] = {1: AutoencoderRecipe, 2: FinetuneRecipe}
    verbs = {1: "train-autoencoder", 2: "finetune"}
    kind, other = kinds[stage], kinds[3 - stage]

    # Keys that only the other stage has, and none of its own.
    values = read_toml(path)
    keys, own, others = set(values), set(kind.model_fields), set(other.model_fields)
    foreign = sorted(keys & others - own)
    if foreign and not keys & own - others and not has_sections(kind, values):
        raise SettingsError(
            f"recipe {path} is of stage {3 - stage}, by its {', '.join(foreign[:3])}: davae {verbs[3 - stage]} {path} "
            f"runs it; davae {verbs[stage]} needs one of stage {stage}"
        )
    return load_recipe(kind, path, parse_overrides(settings))


def _check_inputs(recipe: Any, folder: Path) -> None:
    """Check where a recipe's run reads and writes, before anything is loaded."""
    from davae.run.storage import check_writable

    check_writable(folder)
    if (folder / "environment.json").is_file():
        return  # it goes on, from what it has
    if recipe.pictures:
        check_pictures(recipe.pictures)
    autoencoder = getattr(recipe, "autoencoder", "")
    check_settings({"base": recipe.base or None, "autoencoder": Path(autoencoder) if autoencoder else None})


def _show_plan(recipe: Any, path: Path) -> None:
    from davae.cost.budget import make_plan

    plan = make_plan(recipe, path)
    say(plan.to_text())
    give(plan.to_dict())


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Runs, or folders of runs; by default runs/.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same: this verb changes nothing.")] = False,
) -> None:
    """List runs: their progress, their results, and the settings in which they differ."""
    from davae.run.comparison import find_runs, to_text

    # A folder that nothing has run in yet is no mistake.
    if not folders and not any(Path("runs").rglob("recipe.toml")):
        give({"runs": []})
        return say_next("there are no runs yet: they will be in runs/", "davae demo")
    summaries = find_runs(folders or [Path("runs")])
    say(to_text(summaries))
    give({"runs": list(map(asdict, summaries))})
    finished = sum(summary.state == "finished" for summary in summaries)
    say_next(
        f"{len(summaries)} runs, {finished} of them finished", "the command of a stopped run again, to go on with it"
    )


# ----------------------------------------------------------------------------------------------------------- caches


caches = typer.Typer(help="Caches of latents and text embeddings: build, verify, prune.", no_args_is_help=True)
CacheFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The cache of a recipe, or RUN/cache.")]


@caches.command()
@with_json
def build(
    recipe: options.RecipePath,
    out: options.RunFolder = None,
    settings: options.Settings = [],
    rank_timeout: options.RankTimeout = 1800.0,
    dry_run: options.DryRun = False,
) -> None:
    """Encode what the recipe's run needs before it trains; resumes where it stopped, and several ranks share it."""
    from davae.run.recipe import run_folder
    from davae.training.stage_two_recipe import FinetuneRecipe

    resolved = _read_recipe(2, recipe, settings)
    folder = run_folder(FinetuneRecipe, recipe, out)
    if not dry_run:
        _check_inputs(resolved, folder)
    from davae.training.stage_two_run import build_caches, find_cache_folder

    if dry_run:
        place = find_cache_folder(resolved, folder)
        say(resolved.to_toml())
        give({"recipe": resolved.model_dump(mode="json"), "caches": place})
        return say(f"# caches go to {place}")
    caches_folder = build_caches(resolved, folder, rank_timeout=rank_timeout)
    say(caches_folder)
    give({"caches": caches_folder})
    say_next(f"the caches in {caches_folder} are complete", f"davae finetune {recipe}")


@caches.command()
@with_json
@by_first
def verify(folder: CacheFolder) -> None:
    """Read all caches below FOLDER, print their contents, and exit with 4 if a file is damaged."""
    from davae.data.cache import read_caches

    # All caches are read and printed before the damage is an error.
    damaged, contents = 0, read_caches(folder)
    for cache in contents:
        damaged += len(cache.damaged)
        say(cache.to_text())
    give({"caches": list(map(asdict, contents)), "damaged": damaged})
    if damaged:
        raise CheckpointError(
            f"{damaged} files are damaged: run again to encode their entries again, or davae cache prune"
        )
    say_next("all files are sound", "davae finetune RECIPE")


@caches.command()
@with_json
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
    give({"freed_bytes": freed, "dry_run": dry_run})
    say_next("nothing was removed" if dry_run else "what is left is sound", f"davae cache verify {folder}")
