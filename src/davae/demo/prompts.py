"""`davae try`: the shipped base enlarged beside its upgrade, for a person's own prompts, without training."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from davae import assets
from davae.data.avatar_captions import read_words
from davae.data.avatar_colors import find_missing_colors
from davae.data.pictures import digest_origin
from davae.errors import SettingsError
from davae.evaluation.generation import resize
from davae.evaluation.report import ImageGrid, Report, Section, write_figure, write_page
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import sample
from davae.run.progress import track
from davae.run.record import environment
from davae.run.storage import write_json

PROMPTS = (
    "a laughing woman with long curls and round glasses",
    "grumpy old man, big beard, blue turban",
    "a girl with pink curls and a green shirt",
    "portrait of an amazed man with a red mohawk, eyepatch, yellow background",
)
"""What `davae try` shows without prompts: written before any image of them was seen; the drawings have all of it."""

SAMPLING: dict[str, Any] = {"steps": 20, "guidance_scale": 2.5, "prompt_tokens": 20}
"""How the small pair's images are made, here and where they are measured."""

BASE, ENLARGED, UPGRADE = "base, 128 px", "base + bicubic", "upgrade"
SIZE, TOKENS = 256, 64
CROP = (90, 72, 128)
"""Left, top and side of the crop in pixels of 256: eyes, nose and mouth."""
CROP_SCALE = 2
"""How much a crop is enlarged, pixel by pixel."""


def try_prompts(
    prompts: Sequence[str], out: Path, *, seed: int = 0, base: Path | None = None, adapter: Path | None = None
) -> tuple[Path, Path]:
    """Sample each prompt with both pipelines from the same noise, and write a page, a figure and times into `out`.

    Args:
        prompts: `PROMPTS` if there are none.
        out: folder for the results.
        seed: of the noise.
        base: folder of the base pipeline; by default the shipped one.
        adapter: folder of its upgrade; by default the shipped one.

    Returns:
        The paths of the page and of the figure.

    Raises:
        SettingsError: a prompt has no word that the models know.
    """
    prompts = list(prompts) or list(PROMPTS)
    ignored = {prompt: list_ignored_words(prompt) for prompt in prompts}
    missing = {prompt: find_missing_colors(prompt) for prompt in prompts}
    notes = {}
    for prompt in prompts:
        unknown = [f"not known: {', '.join(ignored[prompt])}"] if ignored[prompt] else []
        notes[prompt] = [*unknown, *missing[prompt]]

    # Both pipelines, one after the other for each prompt, so that a busy moment hits both.
    pipelines = {
        BASE: load_pipeline(base or assets.base_pipeline()),
        UPGRADE: load_pipeline(base or assets.base_pipeline(), adapter=adapter or assets.upgrade()),
    }
    images: dict[str, list[Tensor]] = {BASE: [], UPGRADE: []}
    seconds: dict[str, list[float]] = {BASE: [], UPGRADE: []}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        sample(pipeline, [""], seed=seed, **{**SAMPLING, "steps": 1})
    for index, prompt in enumerate(track(prompts, "sampling", unit="prompts")):
        for name, pipeline in pipelines.items():
            began = time.perf_counter()
            images[name] += sample(pipeline, [prompt], seed=seed, first_index=index, **SAMPLING)
            seconds[name].append(time.perf_counter() - began)

    # What a person looks at, and the numbers. A figure of other prompts in the same folder stays.
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    grid, title = make_figure(prompts, images, notes), f"{SIZE} px from {TOKENS} tokens"
    origin = digest_origin(prompts, seed, SAMPLING, base, adapter)
    figure = write_figure(out / "figure.png", grid, title=title, origin=origin)
    lead = (
        f"The same prompts, noise and {TOKENS} tokens. An image takes {medians[BASE]:.2f} s at 128 px and "
        f"{medians[UPGRADE]:.2f} s at {SIZE} px: {SAMPLING['steps']} steps and decoding, medians on this machine. What "
        "a prompt leaves open may come out differently in the two."
    )
    facts: dict[str, Any] = {"prompts": prompts, "ignored_words": ignored, "missing_colors": missing}
    facts |= {"seconds_per_image": medians, "seed": seed, **SAMPLING}
    write_json(out / "result.json", {**facts, "environment": environment()})
    write_page(out / "index.html", Report(f"davae: {title}", lead, [Section("Images", "", grid)]))
    return out / "index.html", figure


def list_ignored_words(prompt: str) -> list[str]:
    """The words that the models do not know.

    Raises:
        SettingsError: they know none.
    """
    known, ignored = read_words(prompt)
    if not known:
        raise SettingsError(f"{prompt!r}: the small pair knows none of these words. Try {PROMPTS[0]!r}")
    return ignored


def make_figure(
    prompts: Sequence[str],
    images: dict[str, list[UInt8[Tensor, "3 _ _"]]],
    notes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> ImageGrid:
    """Base + bicubic and upgrade at their true size, and the same crop of both; beside a prompt, the notes on it."""
    rows, cells = [], []
    for index, prompt in enumerate(prompts):
        pair = [resize(images[BASE][index], SIZE), images[UPGRADE][index]]
        cells.append([*pair, *map(crop, pair)])
        rows.append(f"{prompt} ({'; '.join(notes[prompt])})" if notes.get(prompt) else prompt)
    columns = [ENLARGED, UPGRADE, f"{ENLARGED}, {CROP_SCALE} times", f"{UPGRADE}, {CROP_SCALE} times"]
    below = [f"128 px, enlarged; {TOKENS} tokens", f"{SIZE} px; {TOKENS} tokens", "pixel by pixel", "pixel by pixel"]
    return ImageGrid(columns, rows, cells, notes=below)


def crop(image: UInt8[Tensor, "3 _ _"]) -> UInt8[Tensor, "3 _ _"]:
    """The face, each pixel a square of `CROP_SCALE` pixels."""
    left, top, side = CROP
    face = image[:, top : top + side, left : left + side]
    return torch.kron(face, torch.ones(1, CROP_SCALE, CROP_SCALE, dtype=torch.uint8))
