"""README's figure: `python recipes/avatars/figure.py docs/upgrade.webp`.

The prompts are the full captions of the first four held-out avatars from number 3,000,000 on, no two of which share a
hair style, an expression or a skin. The rule was written before any picture of them was seen; the noise is of seed 0.
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from davae import assets
from davae.data import avatars
from davae.data.avatar_captions import full_caption
from davae.data.avatars import Attributes
from davae.demo.prompts import BASE, SAMPLING, UPGRADE, make_figure
from davae.evaluation.report import draw_grid
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import sample
from davae.run.storage import write_atomically

FIRST, PROMPTS = 3_000_000, 4
LARGEST = 100_000
"""Bytes of the figure."""


def choose_people() -> list[Attributes]:
    """Four held-out avatars, each of another hair style, expression and skin."""
    people: list[Attributes] = []
    for number in avatars.numbers(held_out=True, start=FIRST):
        new = avatars.draw_attributes(number)
        if all(new.hair != old.hair and new.expression != old.expression and new.skin != old.skin for old in people):
            people.append(new)
        if len(people) == PROMPTS:
            break
    return people


def write_small(image: Image.Image, path: Path) -> int:
    """The WebP of the highest quality that is small enough; its quality."""
    for quality in range(95, 0, -5):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= LARGEST:
            break
    write_atomically(path, buffer.getvalue())
    return quality


def main(
    out: Annotated[Path, typer.Argument(help="The WebP file.")],
    base: Annotated[Path | None, typer.Option(help="The base pipeline; by default the shipped one.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Its upgrade; by default the shipped one.")] = None,
) -> None:
    """Sample and draw."""
    prompts = [full_caption(each) for each in choose_people()]
    source = base or assets.base_pipeline()
    pipelines = {
        BASE: load_pipeline(source),
        UPGRADE: load_pipeline(source, adapter=adapter or assets.upgrade()),
    }

    images = {}
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        images[name] = list(sample(pipeline, prompts, seed=0, **SAMPLING))

    figure = make_figure(prompts, images)
    quality = write_small(draw_grid(figure), out)
    typer.echo(f"{out}: quality {quality}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
