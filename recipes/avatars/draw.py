"""Draw the images that the pair's trainings read.

    python recipes/avatars/draw.py IMAGES --count 24576

writes IMAGES/training-00000.npy and so on, 1,024 images each as uint8 [N, 3, 256, 256], and IMAGES/held_out.npy with
512 images that no training sees. The files of one set hold the images of consecutive `avatars.numbers`. Files that are
there already are kept, so the same command goes on where it stopped. 1,024 images take 0.2 GB, and half a minute.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from davae.data import avatars
from davae.run.progress import track

IMAGES_PER_FILE = 1024


def draw_file(path: Path, numbers: Sequence[int], size: int) -> None:
    """Draw the images of these numbers into one file, which appears when it is complete."""
    images = np.empty((len(numbers), 3, size, size), dtype=np.uint8)
    for row, number in enumerate(track(numbers, path.name, unit="images")):
        image = avatars.draw_image(avatars.draw_attributes(number), size)
        images[row] = np.asarray(image).transpose(2, 0, 1)

    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, images)
    partial.rename(path)


def main(
    images: Annotated[Path, typer.Argument(help="The folder to write.")],
    count: Annotated[int, typer.Option(help="Images for training.")] = 24576,
    held_out: Annotated[int, typer.Option(help="Images that no training sees.")] = 512,
    size: Annotated[int, typer.Option(help="Side in pixels.")] = 256,
) -> None:
    """Draw both sets."""
    images.mkdir(parents=True, exist_ok=True)
    files = {images / "held_out.npy": list(itertools.islice(avatars.numbers(held_out=True), held_out))}

    training = list(itertools.islice(avatars.numbers(held_out=False), count))
    for index, start in enumerate(range(0, count, IMAGES_PER_FILE)):
        files[images / f"training-{index:05d}.npy"] = training[start : start + IMAGES_PER_FILE]

    for path, numbers in files.items():
        if not path.exists():
            draw_file(path, numbers, size)


if __name__ == "__main__":
    typer.run(main)
