"""At which scale pictures from prompts differ from real ones: KID of both reduced, and their energy by frequency.

    python recipes/small_pair/measure_scales.py OUT "RUN/base, 128 px" "RUN/shipped upgrade" ...

takes the folders of pictures that measure.py, measure_slim.py and measure_rivals.py leave in their runs, and
writes OUT/result.json (copied into experiments/results/kid_scales.json). KID is of the pictures as they are, and of
both sets reduced to 192 and 128 px, where structure finer than 1.3 and 2 px is gone. Energy is the mean power of the
luminance in a band of frequencies, as a share of the real pictures'.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from davae import assets, demo
from davae.data.pictures import read_png
from davae.data.sources import open_pictures
from davae.evaluation.generation import extract_features, kid_with_error, resize
from davae.run.record import environment
from davae.run.storage import write_json

SIDES = (demo.SIZE, 192, 128)
BANDS = {"1/16 to 1/8": (1 / 16, 1 / 8), "1/8 to 1/4": (1 / 8, 1 / 4), "1/4 to 1/2": (1 / 4, 1 / 2)}


def measure_energies(pictures: list[Tensor]) -> dict[str, float]:
    """Mean power of the luminance in each band, in cycles per pixel."""
    side = pictures[0].shape[-1]
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    window = torch.outer(torch.hann_window(side), torch.hann_window(side))
    power = torch.zeros_like(frequency)
    for picture in pictures:
        luminance = picture.float().mean(dim=0)
        power += torch.fft.rfft2((luminance - luminance.mean()) * window).abs().square() / len(pictures)
    return {
        name: power[(least <= frequency) & (frequency < most)].mean().item() for name, (least, most) in BANDS.items()
    }


def main(
    out: Path,
    folders: list[Path],
    count: Annotated[int, typer.Option(help="Pictures of each folder, and real ones.")] = 1000,
) -> None:
    """Measure, and write the numbers."""
    real_set = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    real = [real_set.image(index) for index in range(len(real_set))]
    sets = {}
    for folder in folders:
        images = [read_png(folder / f"{index:05d}.png") for index in range(count)]
        sets[folder.name] = [resize(image, demo.SIZE) for image in images]  # the base's are enlarged

    # Energy of each band of frequencies, over that of the real images.
    real_energies = measure_energies(real)
    results: dict[str, Any] = {}
    for name, images in sets.items():
        energies = measure_energies(images)
        results[name] = {"energy": {band: energies[band] / real_energies[band] for band in energies}, "kid": {}}

    # KID at each size, enlarged to the features' size.
    for side in SIDES:
        references = extract_features([resize(image, side) for image in real], side=demo.SIZE)
        for name, images in sets.items():
            features = extract_features([resize(image, side) for image in images], side=demo.SIZE)
            results[name]["kid"][str(side)] = kid_with_error(features, references, seed=0)
            typer.echo(f"{name}, {side} px: {results[name]['kid'][str(side)]}")
    write_json(out / "result.json", {"sets": results, "count": count, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
