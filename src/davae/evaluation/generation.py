"""Images out of a pipeline, and KID of many of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from davae import __version__
from davae.backbones import backbone_of
from davae.data.pictures import ORIGIN, digest_origin, place_png, read_png, to_bytes, to_floats, write_png
from davae.data.sources import PictureSet
from davae.errors import DataError
from davae.evaluation.report import Gallery, GalleryItem, Report, Section, write_page
from davae.method.metrics import EfficientNetLite0Features, kid
from davae.pipelines.autoencoders import digest_tensors
from davae.pipelines.placement import read_weights
from davae.pipelines.sampling import sample
from davae.run.progress import track
from davae.run.ranks import Ranks
from davae.seeds import generator

# Settings of `sample` that a result and a page name, whether they are given or not.
DEFAULTS = {"steps": 28, "guidance_scale": 4.0, "size": None, "prompt_tokens": 256, "seed": 0}


def sample_many(
    pipeline: DiffusionPipeline, prompts: Sequence[str], folder: Path, **settings: Any
) -> list[UInt8[Tensor, "3 height width"]]:
    """The images of `sample_files`, with its settings."""
    return [read_png(path) for path in sample_files(pipeline, prompts, folder, **settings)]


def sample_files(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    folder: Path,
    *,
    label: str,
    batch_size: int = 16,
    first_index: int = 0,
    notes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Path]:
    """`sample` in batches, into PNG files in `folder`; a second call makes only what is missing.

    Each file records its weights, prompt, index and settings, and beside them the `notes`, such as the pipeline's name.
    A file of others keeps its place: then the image gets a name beside it (`place_png`). The ranks share the batches,
    and all return the files of all.
    """
    ranks = Ranks()
    pipeline.set_progress_bar_config(disable=True)
    weights = _digest_pipeline(pipeline)

    # Where each image goes, and what it is made from.
    facts = dict(settings)
    if "image" in settings:
        facts["image"] = digest_tensors({"image": settings["image"]})
    paths, origins = [], []
    for index, prompt in enumerate(prompts, first_index):
        paths.append(folder / f"{index:05d}.png")
        origins.append(digest_origin(weights, facts, prompt, index))

    # Each rank makes every so many-th batch, if one of its images is missing.
    starts = range(0, len(prompts), batch_size)[ranks.rank :: ranks.count]
    for start in track(starts, label, unit="batches", visible=ranks.first):
        batch = range(start, min(start + batch_size, len(prompts)))
        if all(_is_made(paths[place], origins[place]) for place in batch):
            continue
        images = sample(pipeline, [prompts[place] for place in batch], first_index=first_index + start, **settings)
        for place, image in zip(batch, images, strict=True):
            texts = describe_image(image, prompts[place], first_index + place, facts, notes or {})
            write_png(paths[place], image, origin=origins[place], texts=texts)

    ranks.wait("generating")
    return [place_png(path, origin) for path, origin in zip(paths, origins, strict=True)]


def describe_image(
    image: UInt8[Tensor, "3 h w"], prompt: str, index: int, settings: Mapping[str, Any], notes: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a generated image: "davae" has all facts as JSON, "parameters" the text that viewers show."""
    height, width = image.shape[1:]
    facts = {"prompt": prompt, "index": index, **settings, "width": width, "height": height, **notes}
    facts["davae"] = __version__

    lines = [prompt]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    values = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed", "Denoising strength": "strength"}
    items = [f"{name}: {settings[key]}" for name, key in values.items() if key in settings]
    items += [f"Size: {width}x{height}", f"Image number: {index}", f"Version: davae {__version__}"]
    lines.append(", ".join(items))

    return {"parameters": "\n".join(lines), "davae": json.dumps(facts, default=str)}


def _digest_pipeline(pipeline: DiffusionPipeline) -> str:
    """SHA-256 (hex) of a pipeline's weights, precision, strengths of LoRAs and scheduler: its images depend on them."""
    digests: list[Any] = []
    strengths: set[tuple[str, str, float]] = set()
    for part, component in sorted(pipeline.components.items()):
        if not isinstance(component, nn.Module):
            continue
        digests.append(digest_tensors(dict(read_weights(component))))
        for layer in component.modules():
            if isinstance(layer, BaseTunerLayer):
                strengths.update((part, name, layer.scaling[name]) for name in layer.active_adapters)

    # What most pipelines do not have is only told where it is there, so that earlier images keep their digests.
    more: list[Any] = []
    if pipeline.transformer.dtype != torch.float32:
        more.append(str(pipeline.transformer.dtype))
    if strengths:
        more.append(sorted(strengths))
    return digest_origin(*digests, dict(pipeline.scheduler.config), *more)


def repeat_captions(pictures: PictureSet, count: int) -> list[str]:
    """`count` captions to generate from: those of all images, again and again; each time the noise is another."""
    if not len(pictures):
        raise DataError("there are no captions to generate from: the set of images is empty")
    return [pictures.captions[index % len(pictures)] for index in range(count)]


def resize(image: UInt8[Tensor, "3 _ _"], size: int | tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """An image at another side, or height and width, with bicubic, antialiased where it gets smaller."""
    sides = (size, size) if isinstance(size, int) else size
    return to_bytes(F.interpolate(to_floats(image[None]), size=sides, mode="bicubic", antialias=True))[0]


def extract_features(images: Sequence[UInt8[Tensor, "3 h w"]], *, side: int) -> Float[Tensor, "n width"]:
    """EfficientNet-Lite0 features of images, enlarged with bicubic to `side` px where they are smaller."""
    extract = EfficientNetLite0Features()
    count = max(1, min(64, 64 * 256**2 // side**2))  # a batch takes about 1 GiB, whatever the side
    rows = []
    for start in range(0, len(images), count):
        batch = to_floats(torch.stack(list(images[start : start + count])))
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
    count: int = 1,
    batch_size: int = 16,
    first_index: int = 0,
    notes: Mapping[str, Any] | None = None,
    command: Callable[[str, int], str] | None = None,
    **settings: Any,
) -> Path:
    """Generate `count` images for each prompt, as PNG files in `out`, and a page of them; the path of the page.

    The other settings are those of `sample`, and `notes` go into the images' metadata. `command` says what makes an
    image again, by its prompt and its number.
    """
    settings = {**DEFAULTS, **settings}
    width, height = backbone_of(pipeline.transformer).width_and_height(pipeline, settings["size"])
    repeated = [prompt for prompt in prompts for _ in range(count)]
    making: dict[str, Any] = {"label": "generating", "batch_size": batch_size, "first_index": first_index}
    paths = sample_files(pipeline, repeated, out / "pictures", notes=notes, **making, **settings)

    items = []
    for index, (prompt, path) in enumerate(zip(repeated, paths, strict=True), first_index):
        again = "" if command is None else command(prompt, index)
        note = f"seed {settings['seed']}, number {index}"
        items.append(GalleryItem(read_png(path), prompt, note, again, path.relative_to(out)))
    lead = f"{len(items)} images of {width}x{height} px, {describe_settings(settings)}."
    report = Report("Generated images", lead, [Section("Images", "", Gallery(items))])
    Ranks().on_first(lambda: write_page(out / "index.html", report))
    return out / "index.html"


def describe_settings(settings: Mapping[str, Any]) -> str:
    """The settings of a page's images in a line."""
    parts = [f"{settings['steps']} steps", f"guidance {settings['guidance_scale']}", f"seed {settings['seed']}"]
    if settings.get("negative"):
        parts.append(f"negative prompt {settings['negative']!r}")
    if "image" in settings:
        parts.append(f"from an image with strength {settings['strength']:g}")
    return ", ".join(parts)


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
