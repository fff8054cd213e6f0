"""Verbs of the whole job: recipes to start from, a look at the machine, a recipe of one's own, and the run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli import options
from davae.cli.options import choose_trackers, give, say, say_next, show
from davae.errors import SettingsError


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe; without, list all.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same: this verb changes nothing.")] = False,
) -> None:
    """List the recipes that come with davae, or print one, to keep and change: `davae recipes NAME > mine.toml`."""
    from davae import assets
    from davae.run.markdown import markdown_table

    files = {path.stem: path for path in sorted(assets.recipes().glob("*.toml"))}
    if name is not None:
        if name.removesuffix(".toml") not in files:
            raise SettingsError(f"there is no recipe {name}: allowed are {', '.join(files)}")
        text = files[name.removesuffix(".toml")].read_text(encoding="utf-8").rstrip("\n")
        say(text)
        give({"name": name, "recipe": text})
        return say_next("the recipe is on stdout", "davae run mine.toml")

    # A recipe's first line says what it is for.
    purposes = {}
    for stem, path in files.items():
        purposes[stem] = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    say(markdown_table(["recipe", "for"], [list(row) for row in purposes.items()]))
    give(purposes)
    say_next(f"{len(files)} recipes", "davae recipes NAME > mine.toml, or davae init for a recipe of your own images")


def doctor(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same: this verb changes nothing.")] = False,
) -> None:
    """Look at this machine: devices, precision, extras, disk, Hub login, and which models fit."""
    from davae.job.doctor import examine, to_text

    facts = examine()
    say(to_text(facts))
    give(facts)
    say_next(facts["summary"], "davae init --base BASE --pictures FOLDER")


def init(
    pictures: Annotated[str, typer.Option(metavar="PICTURES", help="Your images: see the argument of other verbs.")],
    base: Annotated[str, typer.Option(help="Pipeline to upgrade, folder or Hub name; by default the shipped.")] = "",
    out: Annotated[Path | None, typer.Option(help="The recipe's file; by default NAME.toml, after the images.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="24GB", help="The GPU's memory; by default this one's.")] = None,
    hours: Annotated[float | None, typer.Option(min=0.01, help="At most so many hours of training.")] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Side of the upgraded images; by default chosen.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if the base cannot render the images.")] = False,
    dry_run: options.DryRun = False,
) -> None:
    """Look at your images, the base and this machine, time three steps, and write one recipe for the whole job."""
    from davae.data.survey import source_name

    file = out or Path(f"{source_name(pictures)}.toml")
    settings: dict[str, Any] = {"memory": memory, "hours": hours, "size": size, "force": force}
    if dry_run:
        return show({"base": base, "pictures": pictures, "out": file, **settings})
    from davae.job.start import start_job

    start = start_job(base, pictures, file, **settings)
    say(start.to_text())
    give({"recipe": file, "facts": start.lines, "warnings": start.warnings})
    say_next(f"{file} is written; look through it", f"davae run {file}")


def run(
    recipe: options.RecipePath,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE.")] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="[SECTION.]KEY=VALUE", help="Change a setting, as finetune.steps=10.")
    ] = [],
    report_to: options.ReportTo = [],
    rank_timeout: options.RankTimeout = 1800.0,
    dry_run: options.DryRun = False,
) -> None:
    """Do the whole job: both stages, images, numbers, a page. The same command goes on where it stopped."""
    from davae.job.recipe import load_job
    from davae.run.recipe import parse_overrides

    folder = out or Path("runs") / recipe.stem
    job = load_job(recipe, folder, parse_overrides(settings))
    if dry_run:
        from davae.cost.budget import make_plan

        plans = [make_plan(stage, recipe) for stage in (job.stage_one, job.stage_two)]
        say("\n".join(plan.to_text() for plan in plans))
        return give({"stages": [plan.to_dict() for plan in plans]})
    from davae.job.run import run_job

    page = run_job(job, folder, report_to=choose_trackers(report_to), rank_timeout=rank_timeout)
    say(page)
    give({"page": page, "pipeline": folder / "finetune" / "pipeline"})
    say_next(
        f"the upgraded pipeline is in {folder / 'finetune' / 'pipeline'}, and {page} shows it",
        f'davae generate {folder / "finetune" / "pipeline"} "a prompt"',
    )
