"""A set of avatars on disk: WebDataset shards with captions, which `open_pictures` reads.

Equal settings give equal shards, byte for byte. An image is a lossless WebP.
"""

import io
import json
import random
import tarfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from davae.data import avatars
from davae.data.avatar_captions import caption, full_caption
from davae.errors import SettingsError
from davae.run.progress import track
from davae.run.storage import read_json, write_atomically, write_json

IMAGES_PER_SHARD = 256


def write_avatar_shards(
    folder: Path, *, training: int = 8192, held_out: int = 512, size: int = 256, start: int = 0
) -> Path:
    """Draw images that trainings may see, and held-out ones. A call that was stopped resumes.

    The keys make davae's split hold out what `avatars.is_held_out` holds out. Captions of training images are as people
    write them, those of held-out ones are full, so that each fixes its image.

    Args:
        folder: the set's folder; created.
        training: how many images for training.
        held_out: how many whose pair of hair and expression no training sees.
        size: side in pixels.
        start: the number of an avatar to begin with, for a set with other people.

    Raises:
        SettingsError: the packages that draw are missing, or `folder` holds something else.
    """
    settings = {"avatars": "open-peeps", "training": training, "held_out": held_out, "size": size, "start": start}
    path = folder / "avatars.json"
    if path.is_file():
        if (written := read_json(path)) != settings:
            raise SettingsError(f"{folder} holds a set with {written}, not {settings}: give another folder")
    elif folder.is_dir() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is not empty and has no avatars.json: give another folder")
    write_json(path, settings)

    # One shard after the other; those that are there are whole.
    shards = []
    for name, count, out in (("training", training, False), ("held_out", held_out, True)):
        numbers = list(islice(avatars.numbers(held_out=out, start=start), count))
        for place, first in enumerate(range(0, count, IMAGES_PER_SHARD)):
            shards.append((folder / f"{name}-{place:05d}.tar", numbers[first : first + IMAGES_PER_SHARD], out))
    for shard, numbers, out in track(shards, "drawing avatars", unit="shards"):
        if not shard.is_file():
            write_atomically(shard, _draw_shard(numbers, size, full_captions=out))
    return folder


def _draw_shard(numbers: Sequence[int], size: int, *, full_captions: bool) -> bytes:
    """The bytes of a shard, which say nothing of the machine or the day."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as shard:
        for number in numbers:
            attributes, key = avatars.draw_attributes(number), avatars.image_key(number)
            words = full_caption(attributes) if full_captions else caption(attributes, random.Random(f"shard {number}"))
            image = io.BytesIO()
            avatars.draw_image(attributes, size).save(image, "WEBP", lossless=True)

            for suffix, content in (("webp", image.getvalue()), ("json", json.dumps({"caption": words}).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
