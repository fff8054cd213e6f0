"""Measure a base pipeline, and its upgrade, on prompts that no training saw.

    python recipes/avatars/measure.py PIPELINE RUN --count 1000
    python recipes/avatars/measure.py PIPELINE RUN --count 1000 --upgrade runs/stage2/adapter --other NAME=FOLDER

A prompt is the full caption of a held-out image, so that it fixes the image. RUN/result.json compares the base enlarged
with bicubic and the upgrade, made from the same noise: KID against the images of the prompts; PSNR, SSIM and LPIPS to
the image of each prompt; and the share of each attribute that is right, read off by the nearest rendering. Real images
give the bounds: made as small as the base's and enlarged with bicubic, and other held-out images. All are compared at
the upgrade's side, or at twice the base's without one. `--other` adds images of the same prompts that another script
has made, as numbered PNG files. Images that lie in RUN are not made again.

The set is an easy one: one style, aligned, and one image for a full caption.
"""

import itertools
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from word_tokenizers import PROMPT_TOKENS

from davae.data import avatars
from davae.data.avatar_captions import full_caption
from davae.data.avatars import Attributes
from davae.data.pictures import read_png, to_bytes, to_floats
from davae.evaluation.attributes import SIDE, accuracy, read_attributes
from davae.evaluation.generation import extract_features, kid_with_error, resize, sample_many
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer
from davae.method.metrics import psnr, ssim
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.run.progress import track
from davae.run.record import environment
from davae.run.storage import write_json

SAMPLING: dict[str, Any] = {"seed": 0, "steps": 20, "guidance_scale": 2.5, "prompt_tokens": PROMPT_TOKENS}
BASE, ENLARGED, UPGRADE = "base", "base enlarged", "upgrade"
SHRUNK = {2: "real images, halved and enlarged", 4: "real images, quartered and enlarged"}
OTHER = "other real images"


def held_out_attributes(start: int, count: int) -> list[Attributes]:
    """The attributes of so many held-out images, from the `start`-th on; their full captions are the prompts."""
    numbers = itertools.islice(avatars.numbers(held_out=True), start, start + count)
    return [avatars.draw_attributes(number) for number in numbers]


def real_images(attributes: list[Attributes], size: int) -> list[Tensor]:
    """The exact images, uint8 [3, size, size]."""
    images = [avatars.draw_image(each, size) for each in track(attributes, "drawing", unit="images")]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


@torch.no_grad()
def distances(made: list[Tensor], real: list[Tensor], lpips: LPIPS) -> dict[str, list[float]]:
    """Mean and standard error of PSNR (dB), SSIM and LPIPS between images and the exact ones."""
    values = []
    for start in range(0, len(made), 16):
        pair = [to_floats(torch.stack(images[start : start + 16])) for images in (made, real)]
        values.append(torch.stack([metric(*pair).flatten() for metric in (psnr, ssim, lpips)]))

    table = torch.cat(values, dim=1).double()
    errors = table.std(dim=1) / len(made) ** 0.5
    numbers = torch.stack([table.mean(dim=1), errors], dim=1).tolist()
    return dict(zip(("psnr", "ssim", "lpips"), numbers, strict=True))


@torch.no_grad()
def measure_reconstruction(base: Path, adapter: Path, real: list[Tensor], lpips: LPIPS) -> dict[str, dict[str, Any]]:
    """By way, distances between images and what is left of them after the latents."""
    vae = load_base_vae(str(base))
    autoencoder = load_autoencoder(adapter, base=vae)
    ways = {
        "base + bicubic": enlarge_base(vae, autoencoder),
        "upgrade": make_tokenizer(autoencoder),
        "base at full size": make_tokenizer(vae),
    }
    rows = {}
    for name, way in track(list(ways.items()), "reconstructing", unit="ways"):
        made = [to_bytes(way(to_floats(image[None])).clamp(-1, 1))[0] for image in real]
        rows[name] = distances(made, real, lpips)
    return rows


def attribute_accuracy(sets: dict[str, list[Tensor]], attributes: list[Attributes]) -> dict[str, dict[str, list]]:
    """By set and attribute, the share that is right and of how many."""
    answers: dict[str, list[dict[str, bool]]] = {name: [] for name in sets}
    for index, each in enumerate(track(attributes, "reading attributes", unit="images")):
        images = {name: resize(made[index], SIDE) for name, made in sets.items()}
        for name, right in read_attributes(images, each).items():
            answers[name].append(right)
    return {name: {key: list(pair) for key, pair in accuracy(given).items()} for name, given in answers.items()}


def main(
    pipeline: Annotated[Path, typer.Argument(help="The base pipeline's folder.")],
    run: Annotated[Path, typer.Argument(help="The folder for images and numbers.")],
    upgrade: Annotated[Path | None, typer.Option(help="An adapter folder of the base.")] = None,
    other: Annotated[list[str], typer.Option(metavar="NAME=FOLDER", help="More images. Repeatable.")] = [],  # noqa: B006
    count: Annotated[int, typer.Option(help="Prompts.")] = 1000,
    start: Annotated[int, typer.Option(help="The first held-out image to take its caption from.")] = 512,
    reconstructed: Annotated[int, typer.Option(help="Images to encode and decode.")] = 200,
) -> None:
    """Measure, and write the numbers."""
    attributes, others = held_out_attributes(start, count), held_out_attributes(start + count, count)
    prompts = [full_caption(each) for each in attributes]

    # The images of the pipelines. The base's are compared at the upgrade's side.
    base = sample_many(load_pipeline(pipeline), prompts, run / BASE, label=BASE, **SAMPLING)
    made = {}
    if upgrade is not None:
        upgraded = load_pipeline(pipeline, adapter=upgrade)
        made[UPGRADE] = sample_many(upgraded, prompts, run / UPGRADE, label=UPGRADE, **SAMPLING)
    base_side = base[0].shape[-1]
    side = made[UPGRADE][0].shape[-1] if made else 2 * base_side
    sets = {ENLARGED: [resize(image, side) for image in base], **made}

    for name, _, folder in (text.partition("=") for text in other):
        sets[name] = [resize(read_png(Path(folder) / f"{index:05d}.png"), side) for index in range(count)]

    # Real images, exact and otherwise.
    real = real_images(attributes, side)
    sets[SHRUNK[side // base_side]] = [resize(resize(image, base_side), side) for image in real]

    lpips = LPIPS.alex()
    references = extract_features(real, side=side)
    result: dict[str, Any] = {
        "kid": {
            name: list(kid_with_error(extract_features(images, side=side), references, seed=0))
            for name, images in {**sets, OTHER: real_images(others, side)}.items()
        },
        "to_exact": {name: distances(images, real, lpips) for name, images in sets.items()},
        "attributes": attribute_accuracy({**sets, "real images": real}, attributes),
        "counts": {"prompts": count, "first held-out image": start},
        "sampling": SAMPLING,
    }
    if upgrade is not None:
        result["reconstruction"] = measure_reconstruction(pipeline, upgrade, real[:reconstructed], lpips)
        result["counts"]["reconstructed"] = len(real[:reconstructed])
    write_json(run / "result.json", {**result, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
