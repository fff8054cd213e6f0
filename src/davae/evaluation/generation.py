"""Images out of a pipeline, and KID of many of them."""

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
from davae.backbones.backbone import Size
from davae.data.buckets import Bucket
from davae.data.listing import PictureSource
from davae.data.pictures import ORIGIN, digest_origin, place_png, read_png, to_bytes, to_floats, write_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation.report import ImageGrid, Report, Section, Table, write_page
from davae.method.metrics import EfficientNetLite0Features, kid
from davae.pipelines.autoencoders import digest_tensors
from davae.pipelines.sampling import sample
from davae.run.progress import track
from davae.run.ranks import Ranks
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator


def sample_many(
    pipeline: DiffusionPipeline, prompts: Sequence[str], folder: Path, *, label: str, batch_size: int = 16, **settings
) -> list[UInt8[Tensor, "3 height width"]]:
    """`sample` in batches, into PNG files in `folder`; a second call makes only what is missing.

    Each file records its weights, prompt, index and settings. A file of others keeps its place: then the image gets a
    name beside it (`place_png`). The ranks share the batches, and all return all images.
    """
    ranks = Ranks()
    pipeline.set_progress_bar_config(disable=True)
    digests = []
    for _, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            digests.append(digest_tensors(component.state_dict()))
    weights = digest_origin(*digests, dict(pipeline.scheduler.config))

    # Where each image goes, and what it is made from.
    paths, origins = [], []
    for index, prompt in enumerate(prompts):
        paths.append(folder / f"{index:05d}.png")
        origins.append(digest_origin(weights, settings, prompt, index))

    # Each rank makes every so many-th batch, if one of its images is missing.
    starts = range(0, len(prompts), batch_size)[ranks.rank :: ranks.count]
    for start in track(starts, label, unit="batches", visible=ranks.first):
        batch = range(start, min(start + batch_size, len(prompts)))
        if all(_is_made(paths[index], origins[index]) for index in batch):
            continue
        images = sample(pipeline, [prompts[index] for index in batch], first_index=start, **settings)
        for index, image in zip(batch, images, strict=True):
            write_png(paths[index], image, origin=origins[index])

    ranks.wait("generating")
    return [read_png(place_png(path, origin)) for path, origin in zip(paths, origins, strict=True)]


def repeat_captions(pictures: PictureSet, count: int) -> list[str]:
    """`count` captions to generate from: those of all images, again and again; each time the noise is another."""
    if not len(pictures):
        raise DataError("there are no captions to generate from: the set of images is empty")
    return [pictures.captions[index % len(pictures)] for index in range(count)]


def resize(image: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """A square image at another side with bicubic, antialiased where it gets smaller."""
    return to_bytes(F.interpolate(to_floats(image[None]), size=(side, side), mode="bicubic", antialias=True))[0]


def extract_features(images: Sequence[UInt8[Tensor, "3 h w"]], *, side: int) -> Float[Tensor, "n width"]:
    """EfficientNet-Lite0 features of images, enlarged with bicubic to `side` px where they are smaller."""
    extract = EfficientNetLite0Features()
    rows = []
    for start in range(0, len(images), 64):
        batch = to_floats(torch.stack(list(images[start : start + 64])))
        if batch.shape[-1] < side:
            batch = F.interpolate(batch, size=(side, side), mode="bicubic").clamp(-1, 1)
        rows.append(extract(batch))
    return torch.cat(rows)


def kid_with_error(generated: Tensor, real: Tensor, *, seed: int) -> tuple[float, float]:
    """KID of two sets of features, and its standard error from halves of the generated ones."""
    estimates = []
    for index in range(50):
        half = torch.randperm(len(generated), generator=generator(seed, "kid half", index))[: len(generated) // 2]
        estimates.append(kid(generated[half], real))

    # Halves drawn without replacement vary by about the standard error of the whole.
    return kid(generated, real), torch.tensor(estimates).std().item()


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
    """Generate an image for each prompt, as PNG files in `out`, and a page of them; the path of the page.

    The settings are those of `sample`.
    """
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed}
    width, height = backbone_of(pipeline.transformer).width_and_height(pipeline, size)
    images = sample_many(pipeline, prompts, out / "pictures", label="generating", **settings)

    grid = ImageGrid([f"{width}x{height} px"], list(prompts), [[image] for image in images])
    lead = f"{len(images)} images, {steps} steps, guidance {guidance_scale}, seed {seed}."
    report = Report("Generated images", lead, [Section("Images", "", grid)])
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
    """Generate `count` images from a set's captions and measure KID against its images; the path of a page in `out`.

    The settings are those of `sample`. Real images are cropped to the shape of the generated ones.

    Raises:
        SettingsError: `count` is below 4, `sample` refuses the pipeline, or `davae[eval]` is not installed.
        DataError: there are fewer than 2 real images.
    """
    if count < 4:
        raise SettingsError(f"count={count}: allowed is 4 or more, because the error of KID comes from halves")
    EfficientNetLite0Features()  # if it is not installed, say so before hours of sampling

    ranks = Ranks()
    width, height = backbone_of(pipeline.transformer).width_and_height(pipeline, size)
    shape = Bucket(height, width, width / height)
    real = open_pictures(pictures, size=min(width, height), buckets=[shape])
    real = real.sound(out / "refused.json" if ranks.first else None)
    if len(real) < 2:
        raise DataError(f"KID needs 2 real images at least, and {pictures} has 1; {real.refusals_summary()}")

    # Generate, and compare features.
    prompts = repeat_captions(real, count)
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": (width, height)}
    settings |= {"prompt_tokens": prompt_tokens, "seed": seed}
    generated = sample_many(pipeline, prompts, out / "pictures", label="generating", **settings)
    references = extract_features([real.image(index) for index in range(len(real))], side=width)
    value, error = kid_with_error(extract_features(generated, side=width), references, seed=seed)

    features = EfficientNetLite0Features.name
    result = {"kid": value, "kid_error": error, "features": features, "count": count, "real": len(real), **settings}
    result |= {"device": str(pipeline.device), "environment": environment()}
    ranks.on_first(lambda: write_json(out / "result.json", result))

    # The page shows the first images.
    table = Table(["", "KID x 1000"], [["generated images", f"{1000 * value:.2f} +- {1000 * error:.2f}"]])
    cells = [[image] for image in generated[:16]]
    grid = ImageGrid([f"{width}x{height} px"], prompts[:16], cells)
    lead = f"KID ({features}) of {count} images against {len(real)} real ones. {real.refusals_summary()}"
    report = Report("Generation", lead, [Section("Numbers", "", table), Section("Images", "", grid)])
    ranks.on_first(lambda: write_page(out / "index.html", report))
    return out / "index.html"


def _is_made(path: Path, origin: str) -> bool:
    """Whether the image of this path and origin is there, and whole."""
    path = place_png(path, origin)
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(ORIGIN) == origin
    except (OSError, SyntaxError):  # what Pillow raises for a damaged file: the image is made again
        return False
