"""Pictures with captions or classes, from any source, as tensors of one size or of a few."""

import hashlib
import logging
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from davae.data.buckets import Bucket, fit
from davae.data.entries import PictureEntry, make_entries, name_classes, smallest_size
from davae.data.listing import Listing, PictureSource, list_source
from davae.data.loading import in_threads
from davae.data.order import ORDER, bucket_batch, permute
from davae.data.pictures import LEFT_OUT, MIN_PICTURE_SIDE, PictureRefused, Refusal, read_picture, to_floats
from davae.data.split import SPLIT, take_split
from davae.data.stored import PASSING, PICTURE_SUFFIXES
from davae.errors import DataError, SettingsError
from davae.run import faults
from davae.run.progress import track
from davae.run.storage import write_json

# Unreadable pictures that a small set may have, whatever its share of them.
SPARE_UNREADABLE = 3
logger = logging.getLogger(__name__)

# A set up to this size as uint8 is kept in memory once it is decoded; a larger one is decoded at every use.
MEMORY_BYTES = 1 << 30
DECODED_TOGETHER = 64
"""Pictures between two looks at the progress."""


class PictureSet:
    """Captioned pictures in the order of their keys, decoded when they are first used; made by `open_pictures`.

    `entries`, `keys`, `captions` and `classes` run in step with the pictures; `classes` is empty if the set was opened
    without. `class_names` are in the order of class numbers, if the classes are sub-folders. `buckets` are the sizes
    that the pictures have, and `members` the pictures of each. `refused` lists the source's other pictures.
    """

    def __init__(
        self, entries: Sequence[PictureEntry], *, size: int, refused: Sequence[Refusal], class_names: Sequence[str] = ()
    ) -> None:
        self.entries, self.size = list(entries), size
        self.refused, self.class_names = list(refused), list(class_names)
        # The versions of order and split (`davae.data.order`, `split`): a run keeps those that it began with.
        self.order, self.split = ORDER, SPLIT
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.classes: list[int] = []
        members: dict[Bucket, list[int]] = {}
        for index, entry in enumerate(entries):
            self.keys.append(entry.key)
            self.captions.append(entry.caption)
            if entry.label is not None:
                self.classes.append(entry.label)
            members.setdefault(entry.bucket, []).append(index)
        self.buckets = sorted(members)
        self.members = [members[bucket] for bucket in self.buckets]

        # Decoded pictures by key, if all of them are few enough.
        self._in_memory = sum(3 * entry.bucket.height * entry.bucket.width for entry in entries) <= MEMORY_BYTES
        self._memory: dict[str, Tensor] = {}
        # SHA-256 of the encoded bytes by key, of those that were read.
        self._contents: dict[str, bytes] = {}

        # Pictures that failed after they had been sound, and those that take their places (`batch_or_next`).
        self.stand_ins: dict[int, int] = {}
        self._max_unreadable = 1.0

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """One picture, centre-cropped to the shape of its bucket and scaled down by `fit`.

        A JPEG of at least four times the bucket's longer side is decoded at a smaller scale, never under twice it.
        Pixels that are damaged, which no header shows, raise a PictureRefused: `sound` finds such pictures at once.
        """
        key = self.keys[index]
        if key in self._memory:
            return self._memory[key].clone()

        faults.at("decode")
        picture = self.decode(index)
        if self._in_memory:
            self._memory[key] = picture.clone()
        return picture

    def decode(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """As `image`, but always from the encoded bytes."""
        stored, bucket = self.entries[index].picture, self.entries[index].bucket
        data = self._read(index)
        picture = read_picture(data, stored.name, min_side=1, enough=2 * max(bucket.height, bucket.width))
        height, width = picture.shape[1:]
        if height < bucket.height or width < bucket.width:
            # A PNG that lies on its side, and says so behind its pixels only.
            raise PictureRefused(stored.name, f"{width}x{height} pixels when upright; save it upright", "too small")
        return fit(picture, bucket)

    def batch(self, indices: Sequence[int]) -> Float[Tensor, "batch 3 height width"]:
        """Several pictures of one bucket, float32 in [-1, 1]; they are decoded in `WORKERS` threads."""
        if len({self.entries[index].bucket[:2] for index in indices}) > 1:
            raise SettingsError("a batch of several buckets: take the pictures of one, see PictureSet.members")
        return to_floats(torch.stack(self._images(indices)))

    def batch_or_next(self, indices: Sequence[int]) -> Float[Tensor, "batch 3 height width"]:
        """As `batch`; a picture that cannot be read any more is replaced by the next of its bucket that can.

        The rule depends on the pictures alone, so every rank and every start replaces alike. `stand_ins` has what was
        replaced by what, and each is logged. A DataError says that they are more than `sound` allowed to be unreadable.
        """
        decoded = all(self.keys[index] in self._memory for index in indices)
        return to_floats(torch.stack(in_threads(self._image_or_next, indices, alone=decoded)))

    def squares(self, indices: Sequence[int]) -> Float[Tensor, "batch 3 side side"]:
        """Several pictures of any buckets: central squares as large as the smallest side of all buckets allows."""
        side = min(min(bucket.height, bucket.width) for bucket in self.buckets)
        return to_floats(torch.stack([fit(image, Bucket(side, side)) for image in self._images(indices)]))

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterable[list[int]]:
        """These pictures' numbers, in their order, in batches of one bucket each."""
        for bucket in self.buckets:
            chosen = [index for index in indices if self.entries[index].bucket == bucket]
            for start in range(0, len(chosen), batch_size):
                yield chosen[start : start + batch_size]

    def step_indices(self, batch_size: int, *, seed: int, step: int) -> list[int]:
        """The pictures of one step of training, all of one bucket: see `davae.data.order.bucket_batch`."""
        counts = list(map(len, self.members))
        bucket, places = bucket_batch(counts, batch_size, seed=seed, step=step, version=self.order)
        return [self.members[bucket][place] for place in places]

    def draw(self, most: int, random: torch.Generator) -> list[int]:
        """At most so many different pictures of the whole set, in a random order."""
        return permute(range(min(most, len(self))), len(self), random, version=self.order)

    def fingerprint(self, index: int) -> str:
        """SHA-256, as hexadecimal, of all that decides what `image` gives: the encoded bytes, and how they are cut.

        The bytes of a picture that was decoded before, as `sound` does, are not read again.
        """
        entry = self.entries[index]
        if entry.key not in self._contents:
            self._read(index)
        size = f"{entry.bucket.width}x{entry.bucket.height} pixels"
        return hashlib.sha256(f"{self._contents[entry.key].hex()}, centre, {size}".encode()).hexdigest()

    def sound(self, report: Path | None = None, *, max_unreadable: float = 1.0) -> "PictureSet":
        """The pictures that decode, after decoding each once; the others are refused. Refusals are logged.

        The reasons of all refusals go to the JSON file `report`, by name. A DataError says that no picture is left, or
        that more than the share `max_unreadable` of them, rounded up to whole pictures, cannot be read: many damaged
        files mean a broken download. The kinds in `LEFT_OUT` do not count, since any collection has some. Progress is
        shown where a report is asked for.
        """
        usable: list[int] = []
        refused, self._max_unreadable = list(self.refused), max_unreadable
        starts = range(0, len(self), DECODED_TOGETHER)
        for start in track(starts, "reading pictures", unit="batches", visible=report is not None):
            indices = range(start, min(start + DECODED_TOGETHER, len(self)))
            for index, refusal in zip(indices, in_threads(self._try_to_decode, indices), strict=True):
                if refusal is None:
                    usable.append(index)
                else:
                    refused.append(refusal)

        # The report of this run, in place of an earlier one's.
        if report is not None and refused:
            write_json(report, {refusal.name: refusal.reason for refusal in refused})
        elif report is not None:
            report.unlink(missing_ok=True)

        if not usable:
            raise DataError(f"every picture is damaged; {_summarise(refused)}")
        where = f"; all are in {report}" if report and refused else ""
        unreadable = [refusal for refusal in refused if refusal.kind not in LEFT_OUT]
        total = len(usable) + len(unreadable)
        if are_too_many(len(unreadable), total, max_unreadable):
            raise DataError(
                f"{len(unreadable)} of {total} pictures cannot be read, more than the allowed {max_unreadable:.1%} "
                f"(max_unreadable): is the set complete? {_summarise(unreadable)}{where}"
            )
        if refused:
            logger.warning("%d pictures are used, %s%s", len(usable), _summarise(refused), where)
        if len(usable) == len(self):
            return self

        # The decoded pictures go along.
        entries = [self.entries[index] for index in usable]
        rest = PictureSet(entries, size=self.size, refused=refused, class_names=self.class_names)
        rest.order, rest.split, rest._max_unreadable = self.order, self.split, max_unreadable
        rest._memory, rest._contents = self._memory, self._contents
        return rest

    def refusals_summary(self) -> str:
        """How many pictures were refused, and the reasons of the first ones, for people."""
        return _summarise(self.refused)

    def _read(self, index: int) -> bytes:
        """The encoded bytes, or a PictureRefused if they are not those of the first time."""
        entry = self.entries[index]
        data = entry.picture.read()
        content = hashlib.sha256(data).digest()
        if self._contents.setdefault(entry.key, content) != content:
            reason = "other bytes than when it was first read; leave the files alone while in use"
            raise PictureRefused(entry.picture.name, reason)
        return data

    def _images(self, indices: Sequence[int]) -> list[Tensor]:
        decoded = all(self.keys[index] in self._memory for index in indices)
        return in_threads(self.image, indices, alone=decoded)

    def _image_or_next(self, index: int) -> Tensor:
        members = self.members[self.buckets.index(self.entries[index].bucket)]
        place = bisect_left(members, index)

        # Around the bucket, from the picture itself on.
        for step in range(len(members)):
            candidate = members[(place + step) % len(members)]
            if candidate in self.stand_ins:
                continue
            try:
                image = self.image(candidate)
            except PictureRefused as error:
                # A disk that fails loses all of its pictures, not this one.
                if isinstance(error.__cause__, OSError) and error.__cause__.errno in PASSING:
                    raise
                self._note_failure(candidate, error)
                continue

            if candidate != index:
                self.stand_ins[index] = candidate
            return image

        raise DataError(f"no picture of {self.keys[index]}'s size can be read any more; mend the set, and run again")

    def _note_failure(self, index: int, error: PictureRefused) -> None:
        """Count and name a picture that fails in training, or stop if there are too many."""
        self.stand_ins[index] = index
        count, total = len(self.stand_ins), len(self)
        logger.warning("%s; the next picture of its size takes its place, number %d of %d so far", error, count, total)
        if are_too_many(count, total, self._max_unreadable):
            raise DataError(
                f"{count} of {total} pictures cannot be read any more, more than the allowed "
                f"{self._max_unreadable:.1%} (max_unreadable); the last one: {error}. Mend the set, and run again"
            ) from error

    def _try_to_decode(self, index: int) -> Refusal | None:
        try:
            self.image(index)
        except PictureRefused as error:
            return error.refusal
        return None


def open_pictures(
    source: PictureSource,
    *,
    size: int,
    split: str | None = None,
    limit: int | None = None,
    captions: bool = True,
    classes: bool = False,
    buckets: Sequence[Bucket] = (),
    class_names: Sequence[str] = (),
    keys_alone: bool = False,
) -> PictureSet:
    """List the pictures of `source` that can be used at `size`, by their headers; nothing is decoded yet.

    Args:
        source: a folder of pictures with their captions beside them or in a table; WebDataset shards, here or at a URL;
            parquet files; `datasets:NAME`; or a dataset of Hugging Face `datasets`. See docs/data.md.
        size: side of the square pictures, in pixels. Nothing is scaled up: smaller pictures are refused.
        split: "train" or "heldout", by the rule of `choose_heldout`; None is both.
        limit: most pictures; they are taken at equal distances in the list of keys, so that they are not all alike.
        captions: each picture needs one; otherwise the caption of one without is "".
        classes: each picture needs a class instead of a caption: a whole number beside it or in its row, or, in a
            folder of pictures, its sub-folder. Sub-folders are numbered from 0 in the order that people count in ("2"
            before "10"), whatever the split.
        buckets: sizes to choose from (`bucket_table`), in place of the square of side `size`.
        class_names: all sub-folders in the order of their numbers, where a run has recorded another one.
        keys_alone: split by keys alone, as former versions did, for a run that they began.

    Raises:
        SettingsError: an argument is outside its range, or a package that the source needs is missing.
        DataError: the source is missing, damaged or not to be trusted, or no picture is usable; or classes are numbers
            and sub-folders at once.
    """
    _check_arguments(size, split, limit)

    listing = list_source(source)
    samples = take_split(listing.samples, split, numbered=listing.numbered, keys_alone=keys_alone)

    # Classes have numbers whatever the split; headers say which pictures are usable.
    buckets = tuple(buckets) or (Bucket(size, size),)
    folders = _number_folders(listing, class_names) if classes else None
    entries, unusable = make_entries(samples, buckets, folders, captions)
    refused = [*listing.refused, *unusable]
    if not entries:
        labels = " with classes" if classes else " with captions beside them" if captions else ""
        rule = "(about one picture in ten is held out, by a hash, and at least one of two: give more pictures)"
        raise DataError(
            f"no usable picture{'' if split is None else f' of the split {split!r} {rule}'} in {source}; looked for "
            f"{' '.join(sorted(PICTURE_SUFFIXES))} of at least {smallest_size(buckets)}{labels}; {_summarise(refused)}"
        )

    # The limit takes pictures from all over the list.
    names = name_classes(entries, folders) if folders is not None else []
    if limit is not None and limit < len(entries):
        entries = [entries[index * len(entries) // limit] for index in range(limit)]
    pictures = PictureSet(entries, size=size, refused=refused, class_names=names)
    pictures.split = 1 if keys_alone else SPLIT
    return pictures


def _check_arguments(size: int, split: str | None, limit: int | None) -> None:
    if size < MIN_PICTURE_SIDE:
        raise SettingsError(f"size={size}: allowed is a side from {MIN_PICTURE_SIDE} pixels")
    if split not in (None, "train", "heldout"):
        raise SettingsError(f'split={split!r}: allowed are "train", "heldout" and None for both')
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit}: allowed is a number from 1, or None for all pictures")


def are_too_many(unreadable: int, total: int, max_unreadable: float) -> bool:
    """Whether so many unreadable pictures are more than the allowed share, rounded up to whole pictures.

    A few are allowed whatever the share, unless it is 0 or they are over half of the set: small sets have broken files,
    too.
    """
    allowed = math.ceil(max_unreadable * total)
    if max_unreadable:
        allowed = max(allowed, min(SPARE_UNREADABLE, total // 2))
    return unreadable > allowed


def _number_folders(listing: Listing, recorded: Sequence[str]) -> dict[str, int]:
    """Numbers of the sub-folders that hold pictures at any depth, in a folder of pictures."""
    names: set[str] = set()
    for key, sample in listing.samples.items():
        if listing.folders and sample.pictures and "/" in key:
            names.add(key.partition("/")[0])
    if recorded and names != set(recorded):
        changed = ", ".join(sorted(names ^ set(recorded)))
        raise DataError(f"the class folders are not those that were recorded: {changed} came or went; bring them back")

    # Digits count as numbers: "2" comes before "10".
    ordered = list(recorded) or sorted(names, key=lambda name: (_count_digits(name), name))
    numbers = {name: number for number, name in enumerate(ordered)}
    moved = [name for name, number in numbers.items() if name.isdecimal() and int(name) != number]
    if moved and all(map(str.isdecimal, names)):
        message = "the class folders are numbers, but not those of their classes: %r is class %d"
        logger.warning(message, moved[0], numbers[moved[0]])
    return numbers


def _count_digits(name: str) -> list[str | int]:
    parts: list[str | int] = list(re.split("([0-9]+)", name))
    parts[1::2] = map(int, parts[1::2])
    return parts


def _summarise(refused: Sequence[Refusal]) -> str:
    """The number of refusals and the first five of them, in one line."""
    if not refused:
        return "0 refused"
    shown = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:5])
    return f"{len(refused)} refused: {shown}{'; ...' if len(refused) > 5 else ''}"
