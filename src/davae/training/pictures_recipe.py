"""What both stages say about their pictures, and the sets that follow from it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from davae import assets
from davae.data.buckets import Bucket, bucket_table
from davae.data.listing import PictureSource
from davae.data.sources import PictureSet, open_pictures
from davae.errors import CheckpointError
from davae.run.storage import read_json, write_json
from davae.training.recipes import OptimisationRecipe, Positive


class PicturesRecipe(OptimisationRecipe):
    """Where the pictures are, and the sizes that they are brought to."""

    pictures: str = ""
    """Whatever `davae.data.sources.open_pictures` opens: a folder, shards here or at a URL, parquet files,
    datasets:NAME; "" is the shipped set. Stage 2 needs captions or, for a class-conditional base, classes."""
    limit: Positive | None = None
    """At most so many of them, evenly spread."""
    size: Positive = 256
    """Side of the pictures in pixels: twice what the base was made for."""
    aspect_ratios: tuple[str, ...] = ()
    """Of the buckets, as width:height, such as "3:2": areas of about size^2. () is squares."""
    sizes: tuple[Positive, ...] = ()
    """Further sides, for more resolutions at once: a picture goes to the largest that it fills."""
    bucket_step: Positive = 32
    """The buckets' sides are multiples of this: downsample factor times patch side, or a multiple of it. Without
    `aspect_ratios` and `sizes` it is of no account."""
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The largest share of the pictures that may be damaged or otherwise unreadable, rounded up to whole pictures; with
    more the run stops before it begins. Those too small or without a caption or class are left out and do not count."""

    @property
    def source(self) -> PictureSource:
        """Of the pictures."""
        return self.pictures or assets.pictures()

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes of the training pictures.

        Raises:
            SettingsError: sides and ratios that do not fit each other.
        """
        several = self.aspect_ratios or self.sizes
        return bucket_table((self.size, *self.sizes), self.aspect_ratios, multiple=self.bucket_step if several else 1)

    @property
    def sides(self) -> list[int]:
        """All sides of the buckets in pixels, from the shortest to the longest."""
        return sorted({side for bucket in self.buckets for side in bucket[:2]})

    @property
    def heldout_size(self) -> int:
        """Side of the held-out squares: the shortest side of a bucket, so that whatever may train may be held out."""
        return self.sides[0]

    def training_pictures(self, folder: Path | None, *, captions: bool = True, classes: bool = False) -> PictureSet:
        """The training split, every picture decoded once; what is refused is in `folder`/refused.json, if there is one.

        Raises:
            SettingsError: sizes that do not fit each other.
            DataError: no picture is usable, or too many are unreadable.
        """
        pictures = open_pictures(
            self.source,
            size=self.size,
            split="train",
            limit=self.limit,
            captions=captions,
            classes=classes,
            buckets=self.buckets,
        )
        report = None if folder is None else folder / "refused.json"
        return pictures.sound(report, max_unreadable=self.max_unreadable)

    def check_set(self, folder: Path, keys: Sequence[str]) -> None:
        """Note in `folder`/pictures.json which pictures a run trains on, and refuse to go on with others.

        Raises:
            CheckpointError: the run in `folder` has trained on a set of other names than `keys`.
        """
        path = folder / "pictures.json"
        facts = {"count": len(keys), "sha256_of_names": hashlib.sha256("\n".join(keys).encode()).hexdigest()}
        if not (path.is_file() and any((folder / "checkpoints").glob("step-*"))):
            write_json(path, facts)
        elif (before := read_json(path)) != facts:
            raise CheckpointError(
                f"the run in {folder} has trained on {before['count']} pictures, and there are {facts['count']} now, "
                "of other names: their order would change midway. Bring the set back to what it was, or give a new "
                "folder"
            )
