"""KID of a pipeline's images, beside the numbers that say what it means: base + bicubic, and real images."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import UInt8
from torch import Tensor

from davae.backbones import backbone_of
from davae.data.buckets import Bucket
from davae.data.listing import PictureSource
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation.generation import (
    DEFAULTS,
    describe_settings,
    extract_features,
    kid_with_error,
    repeat_captions,
    resize,
    sample_many,
)
from davae.evaluation.report import ImageGrid, Report, Section, Table, write_page
from davae.method.metrics import EfficientNetLite0Features, kid
from davae.models.base_autoencoders import downsample_factor
from davae.run.ranks import Ranks
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator

Images = Sequence[UInt8[Tensor, "3 h w"]]
Numbers = Mapping[str, tuple[float, float]]

GENERATED, BASE = "generated images", "base + bicubic"
SOFT, REAL = "real images at half size + bicubic", "real images"
SHOWN = 16  # images on the page
SPLITS = 20  # of the real images, for their KID among themselves
CLEAR = 2.0  # standard errors by which a difference counts


def evaluate(
    pipeline: DiffusionPipeline,
    pictures: PictureSource,
    out: Path,
    *,
    count: int = 1000,
    batch_size: int = 16,
    load_base: Callable[[], DiffusionPipeline] | None = None,
    notes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Generate `count` images from a set's captions and measure KID against its images; the path of a page in `out`.

    The settings are those of `sample`. Real images are cropped to the shape of the generated ones. `load_base` loads
    the base pipeline, whose images of the same prompts and noise are enlarged with bicubic and measured, too; it is
    called when the pipeline's images are there. `notes` go into the images' metadata.

    Raises:
        SettingsError: `count` is below 4, `sample` refuses the pipeline, or `davae[eval]` is not installed.
        DataError: there are fewer than 2 real images.
    """
    if count < 4:
        raise SettingsError(f"count={count}: allowed is 4 or more, because the error of KID comes from halves")
    EfficientNetLite0Features()  # if it is not installed, say so before hours of sampling

    ranks, settings = Ranks(), {**DEFAULTS, **settings}
    width, height = backbone_of(pipeline.transformer).width_and_height(pipeline, settings["size"])
    settings["size"] = (width, height)
    pictured = open_pictures(pictures, size=min(width, height), buckets=[Bucket(height, width, width / height)])
    real = pictured.sound(out / "refused.json" if ranks.first else None)
    if len(real) < 2:
        raise DataError(f"KID needs 2 real images at least, and {pictures} has 1; {real.refusals_summary()}")

    # Generate with the pipeline, then with its base.
    prompts, device = repeat_captions(real, count), str(pipeline._execution_device)
    making: dict[str, Any] = {"batch_size": batch_size, "notes": notes}
    made = {GENERATED: sample_many(pipeline, prompts, out / "pictures", label="generating", **making, **settings)}
    if load_base is not None:
        factor = downsample_factor(pipeline.vae.config)
        small = _sample_base(load_base(), prompts, out / "base", factor, **making, **settings)
        made[BASE] = [resize(image, (height, width)) for image in small]

    # Measure, write, show.
    numbers = measure(made, real, width=width, seed=settings["seed"])
    meaning = interpret(numbers)
    result = _summarise(numbers, count=count, real=len(real)) | settings
    result |= {"verdict": meaning, "device": device, "environment": environment()}
    ranks.on_first(lambda: write_json(out / "result.json", result))
    report = _make_report(made, prompts, real, numbers, meaning, describe_settings(settings))
    ranks.on_first(lambda: write_page(out / "index.html", report))
    return out / "index.html"


def _sample_base(
    base: DiffusionPipeline,
    prompts: Sequence[str],
    folder: Path,
    factor: int,
    *,
    size: tuple[int, int],
    **settings: Any,
) -> Images:
    """The base's images at the size that has as many tokens, of the same noise."""
    own = downsample_factor(base.vae.config)
    width, height = (side * own // factor for side in size)
    return sample_many(base, prompts, folder, label="generating, base", size=(width, height), **settings)


def measure(made: Mapping[str, Images], real: PictureSet, *, width: int, seed: int) -> dict[str, tuple[float, float]]:
    """KID against the real images and its standard error, of each set of images and of two that bound it.

    The bounds: the real images at half their size, enlarged, which no base + bicubic can do better than; and one half
    of the real images against the other.
    """
    images = [real.image(index) for index in range(len(real))]
    references = extract_features(images, side=width)
    numbers = {}
    for name, batch in made.items():
        numbers[name] = kid_with_error(extract_features(batch, side=width), references, seed=seed)

    soft = []
    for image in images:
        height, width = image.shape[1:]
        soft.append(resize(resize(image, (height // 2, width // 2)), (height, width)))
    numbers[SOFT] = kid_with_error(extract_features(soft, side=width), references, seed=seed)

    # KID needs two images on each side.
    if len(images) >= 4:
        splits = []
        for index in range(SPLITS):
            order = torch.randperm(len(images), generator=generator(seed, "real half", index))
            middle = len(images) // 2
            splits.append(kid(references[order[:middle]], references[order[middle:]]))
        values = torch.tensor(splits)
        numbers[REAL] = (values.mean().item(), values.std().item())
    return numbers


def interpret(numbers: Numbers) -> str:
    """What the numbers say, in words."""
    value, error = numbers[GENERATED]
    text = f"KID x 1000 of the generated images is {1000 * value:.2f}; the lower, the more alike to the real images."
    if BASE not in numbers:
        return f"{text} Alone it says little: give the base pipeline, too, to compare with base + bicubic."

    other, other_error = numbers[BASE]
    distance = (other - value) / max(math.hypot(error, other_error), 1e-12)
    if abs(distance) < CLEAR:
        return (
            f"{text} Base + bicubic has {1000 * other:.2f}: the difference is within the error, so these images do not "
            "tell which is better. Generate more of them."
        )
    word, side = ("better", "closer to the real images") if distance > 0 else ("worse", "farther from the real images")
    return (
        f"{text} Base + bicubic has {1000 * other:.2f}: the generated images are {word}, {side} by "
        f"{abs(distance):.1f} standard errors."
    )


def _summarise(numbers: Numbers, *, count: int, real: int) -> dict[str, Any]:
    """The numbers as result.json has them."""
    value, error = numbers[GENERATED]
    result: dict[str, Any] = {"kid": value, "kid_error": error, "features": EfficientNetLite0Features.name}
    result |= {"count": count, "real": real}
    result["beside"] = {name: list(pair) for name, pair in numbers.items() if name != GENERATED}
    return result


def _make_report(
    made: Mapping[str, Images], prompts: Sequence[str], real: PictureSet, numbers: Numbers, meaning: str, settings: str
) -> Report:
    """The page: numbers, their meaning, and the first images beside real ones."""
    rows = []
    for name, (value, error) in numbers.items():
        rows.append([name, f"{1000 * value:.2f} +- {1000 * error:.2f}"])
    table = Table(
        ["", "KID x 1000"], rows, "Of each kind against the real images; of these, one half against the other."
    )

    # A row for each prompt: what was made, and the image that the caption is of.
    shown = list(prompts[:SHOWN])
    cells = []
    for index in range(len(shown)):
        cells.append([*(images[index] for images in made.values()), real.image(index % len(real))])
    grid = ImageGrid([*made, REAL], shown, cells)

    features, count = EfficientNetLite0Features.name, len(prompts)
    height, width = next(iter(made.values()))[0].shape[-2:]
    lead = (
        f"KID ({features}) of {count} images of {width}x{height} px against {len(real)} real ones. "
        f"{real.refusals_summary()}"
    )
    sections = [Section("Numbers", f"{meaning}\n\n{settings}.", table), Section("Images", "", grid)]
    return Report("Generation", lead, sections)
