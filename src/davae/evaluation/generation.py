"""Images out of a pipeline, with noise that base and upgraded pipelines share; and KID of many of them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from davae.backbones import backbone_of
from davae.backbones.sizes import Size
from davae.data.buckets import Bucket
from davae.data.listing import PictureSource
from davae.data.pictures import ORIGIN, read_png, to_bytes, write_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation.report import ImageGrid, Report, Section, Table, write_page
from davae.method.metrics import EfficientNetLite0Features, kid
from davae.pipelines.adapter import digest_tensors
from davae.pipelines.sampling import sample
from davae.run.progress import track
from davae.run.ranks import Ranks
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator


def sample_many(
    pipeline: DiffusionPipeline, prompts: Sequence[str], folder: Path, *, label: str, batch_size: int = 16, **settings
) -> list[UInt8[Tensor, "3 height width"]]:
    """`sample` in batches, kept as PNG files in `folder`: run again, it makes only what is missing.

    Each file says what it was made from: weights, prompt, index and settings. One that differs is made anew.
    Of several ranks each makes every so many-th batch; all return all pictures.
    """
    ranks = Ranks()
    pipeline.set_progress_bar_config(disable=True)
    origin = [_weights_digest(pipeline), settings]
    starts = range(0, len(prompts), batch_size)[ranks.rank :: ranks.count]
    for start in track(starts, label, unit="batches", visible=ranks.first):
        batch = prompts[start : start + batch_size]
        paths = [folder / f"{index:05d}.png" for index in range(start, start + len(batch))]
        origins = [_origin([*origin, prompt, index]) for index, prompt in enumerate(batch, start)]
        if all(_is_from(path, here) for path, here in zip(paths, origins, strict=True)):
            continue
        made = sample(pipeline, batch, first_index=start, **settings)
        for path, picture, here in zip(paths, made, origins, strict=True):
            write_png(path, picture, origin=here)
    ranks.wait("generating")
    return [read_png(folder / f"{index:05d}.png") for index in range(len(prompts))]


def evaluation_prompts(pictures: PictureSet, count: int) -> list[str]:
    """`count` captions: every picture's, again and again; with other noise each time."""
    if not len(pictures):
        raise DataError("there are no captions to generate from: the set of pictures is empty")
    return [pictures.captions[index % len(pictures)] for index in range(count)]


def scaled(picture: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """A square picture at another side with bicubic, antialiased where it gets smaller."""
    image = picture[None].float() / 127.5 - 1
    return to_bytes(F.interpolate(image, size=(side, side), mode="bicubic", antialias=True))[0]


def features_of(pictures: Sequence[UInt8[Tensor, "3 h w"]], *, side: int) -> Float[Tensor, "n width"]:
    """EfficientNet-Lite0 features of pictures, enlarged with bicubic to `side` px where they are smaller."""
    extract = EfficientNetLite0Features()
    rows = []
    for start in range(0, len(pictures), 64):
        batch = torch.stack(list(pictures[start : start + 64])).float() / 127.5 - 1
        if batch.shape[-1] < side:
            batch = F.interpolate(batch, size=(side, side), mode="bicubic").clamp(-1, 1)
        rows.append(extract(batch))
    return torch.cat(rows)


def kid_with_error(made: Tensor, real: Tensor, *, seed: int) -> tuple[float, float]:
    """KID of two sets of features, over all of both, and its standard error out of halves of the made ones."""
    value = kid(made, real)
    estimates = []
    for index in range(50):
        rows = torch.randperm(len(made), generator=generator(seed, "kid half", index))[: len(made) // 2]
        estimates.append(kid(made[rows], real))
    # Halves drawn without replacement vary by about the standard error of the whole.
    return value, torch.tensor(estimates).std().item()


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    out: Path,
    *,
    steps: int = 28,
    guidance_scale: float = 4.0,
    size: Size | None = None,
    prompt_tokens: int = 256,
    seed: int = 0,
) -> Path:
    """Images for prompts: PNG files in `out`, and a page of them.

    Returns:
        The path of the page.
    """
    width, height = backbone_of(pipeline.transformer).width_and_height(pipeline, size)
    pictures = sample_many(
        pipeline, prompts, out / "pictures", label="generating",
        steps=steps, guidance_scale=guidance_scale, size=size, prompt_tokens=prompt_tokens, seed=seed,
    )  # fmt: skip
    grid = ImageGrid([f"{width}x{height} px"], list(prompts), [[picture] for picture in pictures])
    lead = f"{len(pictures)} pictures, {steps} steps, guidance {guidance_scale}, seed {seed}."
    report = Report("Generated pictures", lead, [Section("Images", "", grid)])
    Ranks().on_first(lambda: write_page(out / "index.html", report))
    return out / "index.html"


def evaluate(
    pipeline: DiffusionPipeline,
    pictures: PictureSource,
    out: Path,
    *,
    count: int = 1000,
    steps: int = 28,
    guidance_scale: float = 4.0,
    size: Size | None = None,
    prompt_tokens: int = 256,
    seed: int = 0,
) -> Path:
    """KID of `count` pictures made from a set's captions against the set; `out`/result.json and a page.

    With a `size`, both are of that size, the real ones cropped to its shape; otherwise of the pipeline's own square.

    Returns:
        The path of the page.

    Raises:
        SettingsError: fewer than 4 pictures, a pipeline that `sample` refuses, or no extra `davae[eval]`.
        DataError: fewer than 2 real pictures.
    """
    if count < 4:
        raise SettingsError(f"count={count}: allowed is 4 or more, for the error of KID is taken over halves")
    EfficientNetLite0Features()  # if it is not installed, say so before hours of sampling
    width, height = backbone_of(pipeline.transformer).width_and_height(pipeline, size)
    ranks = Ranks()
    shape = Bucket(height, width, width / height)
    real = open_pictures(pictures, size=min(width, height), buckets=[shape]).sound(
        out / "refused.json" if ranks.first else None
    )
    if len(real) < 2:
        raise DataError(f"KID needs 2 real pictures at least, and {pictures} has 1; {real.refusals_summary()}")
    prompts = evaluation_prompts(real, count)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "size": (width, height),
        "prompt_tokens": prompt_tokens,
        "seed": seed,
    }
    made = sample_many(pipeline, prompts, out / "pictures", label="generating", **settings)
    references = features_of([real.image(index) for index in range(len(real))], side=width)
    value, error = kid_with_error(features_of(made, side=width), references, seed=seed)
    result = {"kid": value, "kid_error": error, "features": EfficientNetLite0Features.name, "count": count}
    where = {"device": str(pipeline.device), "environment": environment()}
    ranks.on_first(lambda: write_json(out / "result.json", {**result, "real": len(real), **settings, **where}))
    table = Table(["", "KID x 1000"], [["pictures made", f"{1000 * value:.2f} +- {1000 * error:.2f}"]])
    shown = min(16, count)
    grid = ImageGrid([f"{width}x{height} px"], prompts[:shown], [[picture] for picture in made[:shown]])
    lead = f"KID ({EfficientNetLite0Features.name}) of {count} pictures against {len(real)} real ones. "
    lead += real.refusals_summary()
    report = Report("Generation", lead, [Section("Numbers", "", table), Section("Images", "", grid)])
    ranks.on_first(lambda: write_page(out / "index.html", report))
    return out / "index.html"


def _weights_digest(pipeline: DiffusionPipeline) -> str:
    models = [component for _, component in sorted(pipeline.components.items()) if isinstance(component, nn.Module)]
    return _origin([*(digest_tensors(model.state_dict()) for model in models), dict(pipeline.scheduler.config)])


def _origin(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _is_from(path: Path, origin: str) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(ORIGIN) == origin
    except (OSError, SyntaxError):  # what Pillow raises for a damaged file: the picture is made anew
        return False
