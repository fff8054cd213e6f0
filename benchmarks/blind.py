"""A blind comparison for people: pairs of base + bicubic and upgrade in random order, and a judge that stands in.

    python benchmarks/blind.py runs/blind                    # 40 held-out prompts; about 2 minutes on two cores
    python benchmarks/blind.py runs/blind --votes LRRL...    # one letter for each pair, a dot where you cannot tell

The first command writes index.html, which tells left from right only, and answers.json, which nobody should read
before voting. It also asks a judge: the one of two images is better whose attributes are nearer to their exact
renderings at the upgrade's size, on average (`davae.evaluation.attributes.measure_margins`). The second counts votes.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from davae import assets
from davae.data import avatars
from davae.data.avatar_captions import full_caption
from davae.data.avatars import Attributes
from davae.demo.prompts import ENLARGED, SAMPLING, UPGRADE
from davae.errors import SettingsError
from davae.evaluation.attributes import measure_margins
from davae.evaluation.generation import resize, sample_many
from davae.evaluation.report import ImageGrid, Report, Section, write_page
from davae.pipelines.loading import load_pipeline
from davae.run.progress import track
from davae.run.record import environment
from davae.run.storage import read_json, write_json
from davae.seeds import generator

SIDES = ("L", "R")
FIRST = 4_000_000
"""Number of the avatar to begin with: far from those of the training."""
QUESTION = "Which of the two is the better drawing of what the line says?"


def choose_sides(count: int, seed: int) -> list[str]:
    """The side of the upgrade in each pair: fair coins that depend on the seed alone."""
    coins = torch.randint(2, (count,), generator=generator(seed, "blind sides"))
    return [SIDES[coin] for coin in coins.tolist()]


def judge(base: Tensor, upgraded: Tensor, attributes: Attributes) -> float:
    """The upgrade's mean margin over all attributes minus the base's."""
    margins = measure_margins({ENLARGED: base, UPGRADE: upgraded}, attributes, base.shape[-1])
    return statistics.mean(margins[UPGRADE].values()) - statistics.mean(margins[ENLARGED].values())


def write_comparison(
    base: Sequence[Tensor], upgraded: Sequence[Tensor], prompts: Sequence[str], sides: Sequence[str], out: Path
) -> Path:
    """The page with the pairs, which does not say which is which."""
    cells, rows = [], []
    for number, (pair, prompt, side) in enumerate(zip(zip(base, upgraded, strict=True), prompts, sides, strict=True)):
        cells.append(list(pair) if side == "R" else [pair[1], pair[0]])
        rows.append(f"{number + 1}. {prompt}")
    lead = (
        f"{QUESTION} Note L or R for each of the {len(rows)} pairs, a dot where you cannot tell, and count them with "
        "--votes."
    )
    grid = ImageGrid(["L", "R"], rows, cells)
    write_page(out / "index.html", Report("davae: a blind comparison", lead, [Section("Pairs", "", grid)]))
    return out / "index.html"


def count_votes(votes: str, sides: Sequence[str]) -> dict[str, int]:
    """How often a person chose the upgrade, the base, or neither."""
    votes = votes.upper()
    if len(votes) != len(sides) or set(votes) - {*SIDES, "."}:
        raise SettingsError(f"--votes {votes}: give {len(sides)} letters, each L, R or a dot")
    counts = {UPGRADE: 0, ENLARGED: 0, "cannot tell": 0}
    for vote, side in zip(votes, sides, strict=True):
        counts["cannot tell" if vote == "." else UPGRADE if vote == side else ENLARGED] += 1
    return counts


def main(
    run: Annotated[Path, typer.Argument(help="The folder for page, images and answers.")],
    votes: Annotated[str | None, typer.Option(help="A person's choices: L, R or a dot for each pair.")] = None,
    count: Annotated[int, typer.Option(help="Pairs.")] = 40,
    seed: Annotated[int, typer.Option(help="Of noise and sides.")] = 0,
    base: Annotated[Path | None, typer.Option(help="The base pipeline; by default the shipped one.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Its upgrade; by default the shipped one.")] = None,
) -> None:
    """Make the page and ask the judge, or count votes."""
    if votes is not None:
        return typer.echo(count_votes(votes, read_json(run / "answers.json")["upgrade is"]))

    # The images of both pipelines from the same noise.
    numbers = itertools.islice(avatars.numbers(held_out=True, start=FIRST), count)
    people = [avatars.draw_attributes(number) for number in numbers]
    prompts = [full_caption(each) for each in people]
    source = base or assets.base_pipeline()
    settings = {**SAMPLING, "seed": seed}
    small = sample_many(load_pipeline(source), prompts, run / "base", label="base", **settings)
    enlarged = [resize(image, 2 * image.shape[-1]) for image in small]
    pipeline = load_pipeline(source, adapter=adapter or assets.upgrade())
    upgraded = sample_many(pipeline, prompts, run / "upgrade", label="upgrade", **settings)

    # The page, and the answers apart from it.
    sides = choose_sides(count, seed)
    page = write_comparison(enlarged, upgraded, prompts, sides, run)
    leads = []
    for index in track(range(count), "judging", unit="pairs"):
        leads.append(judge(enlarged[index], upgraded[index], people[index]))
    preferred = sum(lead > 0 for lead in leads)
    facts = {"judge prefers the upgrade": preferred, "of": count, "its leads": leads, "seed": seed}
    write_json(run / "answers.json", {"upgrade is": sides, **facts, "environment": environment()})
    typer.echo(f"{page}\nthe judge prefers the upgrade in {preferred} of {count}")


if __name__ == "__main__":
    typer.run(main)
