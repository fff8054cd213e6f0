"""Pack drawn images with captions into WebDataset shards, which `davae train-autoencoder` and `davae finetune` read.

    python recipes/avatars/build_shards.py IMAGES SHARDS --count 8192

IMAGES is draw.py's folder. SHARDS gets the first COUNT images for training and the first HELD_OUT of the others. Their
keys make davae's split by key hold out what `avatars.is_held_out` holds out. An image takes about 5 kB, as lossless
WebP. Equal input gives equal shards, byte for byte.
"""

import io
import json
import random
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from drawn_images import DrawnImages, to_bytes
from PIL import Image
from torch import Tensor

from davae.data import avatars
from davae.data.avatar_captions import caption, full_caption
from davae.run.progress import track

IMAGES_PER_SHARD = 1024


def add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a regular file that says nothing of the machine or the day on which it was made."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def encoded(image: Tensor) -> bytes:
    """Lossless WebP of uint8 [3, H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write_shard(path: Path, numbers: Sequence[int], images: DrawnImages, first: int, *, full: bool) -> None:
    """Write the images of these numbers, the first of which is image `first` of the set."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for offset, number in enumerate(numbers):
            attributes, key = avatars.draw_attributes(number), avatars.image_key(number)
            words = full_caption(attributes) if full else caption(attributes, random.Random(f"shard {number}"))
            image = to_bytes(images.batch([first + offset]))[0]
            add_member(shard, f"{key}.webp", encoded(image))
            add_member(shard, f"{key}.json", json.dumps({"caption": words}).encode())


def main(
    images: Annotated[Path, typer.Argument(help="The folder that draw.py wrote.")],
    shards: Annotated[Path, typer.Argument(help="The folder to write.")],
    count: Annotated[int, typer.Option(help="Images for training.")] = 8192,
    held_out: Annotated[int, typer.Option(help="Images that no training sees; their captions are full.")] = 512,
) -> None:
    """Write both sets."""
    shards.mkdir(parents=True, exist_ok=True)
    for name, limit, out in (("training", count, False), ("held_out", held_out, True)):
        drawn = DrawnImages(images, held_out=out, limit=limit)
        numbers = list(islice(avatars.numbers(held_out=out), len(drawn)))
        for first in track(range(0, len(drawn), IMAGES_PER_SHARD), name, unit="shards"):
            path = shards / f"{name}-{first // IMAGES_PER_SHARD:05d}.tar"
            write_shard(path, numbers[first : first + IMAGES_PER_SHARD], drawn, first, full=out)


if __name__ == "__main__":
    typer.run(main)
