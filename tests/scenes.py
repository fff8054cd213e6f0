"""Small pictures with smooth parts and hard edges, and captions that tiny tokenizers can read: deterministic."""

from itertools import count, islice
from pathlib import Path

import numpy as np
from PIL import Image

from davae.data.split import heldout

COLOURS = ("red", "green", "blue", "grey")
SHAPES = ("ball", "box", "tree", "fish")


def scene(index: int, side: int = 64) -> np.ndarray:
    """A colour gradient with a blob and a box on it, uint8 [side, side, 3]."""
    random = np.random.default_rng(index)
    y, x = np.mgrid[0:side, 0:side] / side
    corners = random.uniform(0, 1, (2, 3))
    image = corners[0] * x[..., None] + corners[1] * (1 - y[..., None])
    centre, colour = random.uniform(0.2, 0.8, 2), random.uniform(-1, 1, 3)
    image += colour * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 0.02)[..., None]
    top, left = (random.uniform(0, 0.6, 2) * side).astype(int)
    image[top : top + side // 4, left : left + side // 3] = random.uniform(0, 1, 3)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def caption(index: int) -> str:
    return f"{COLOURS[index % 4]} {SHAPES[index // 4 % 4]}"


def keys(number: int, *, held: bool) -> list[str]:
    """The first names whose split is the one wanted."""
    return list(islice((name for name in (f"p{index:03d}" for index in count()) if heldout(name) == held), number))


def fill_with_scenes(folder: Path, *, train: int = 12, held: int = 4, side: int = 64, first: int = 0) -> Path:
    """So many pictures of each split, with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, key in enumerate(keys(train, held=False) + keys(held, held=True), first):
        Image.fromarray(scene(index, side)).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(caption(index) + "\n")
    return folder
