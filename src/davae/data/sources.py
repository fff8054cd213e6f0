"""Pictures with captions or classes, from a folder or from WebDataset shards, as square tensors of one size."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from davae.data.labels import folder_classes, number_classes, read_caption, read_class
from davae.data.listing import PICTURE_SUFFIXES, Refusal, Samples, StoredBytes, list_folder, list_shard
from davae.data.pictures import MIN_SIDE, PictureRefused, check_picture, read_picture
from davae.errors import DataError, SettingsError
from davae.storage import write_json

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 512 << 20
MEMORY_BYTES = 1 << 30
"""A set up to this size as uint8 is kept in memory once it is decoded; a larger one is decoded at every use."""


@dataclass(frozen=True)
class Entry:
    """One usable picture of a source."""

    key: str
    picture: StoredBytes
    caption: str
    """Empty only where there is a class."""
    label: int | str | None = None
    """Class number, or name of the sub-folder until that has one; None in a set of captioned pictures."""


class PictureSet:
    """Captioned pictures in the order of their keys, decoded when they are first used; made by `open_pictures`.

    `keys` and `captions` run in step with the pictures, and so do `classes`, if the set was opened with classes;
    `class_names` are in the order of class numbers, if these are numbered sub-folders. `refused` lists what the source
    holds and the set does not, with reasons.
    """

    def __init__(
        self, entries: Sequence[Entry], *, size: int, refused: Sequence[Refusal], class_names: Sequence[str] = ()
    ) -> None:
        self._entries = list(entries)
        self.size = size
        self.refused = list(refused)
        self.keys = [entry.key for entry in entries]
        self.captions = [entry.caption for entry in entries]
        self.classes = [entry.label for entry in entries if isinstance(entry.label, int)]
        self.class_names = list(class_names)
        kept = len(entries) * 3 * size * size <= MEMORY_BYTES
        self._memory = torch.empty(len(entries) if kept else 0, 3, size, size, dtype=torch.uint8)
        self._decoded: set[int] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def image(self, index: int) -> UInt8[Tensor, "3 size size"]:
        """One picture, centre-cropped to a square and scaled down as `fit` does.

        Raises:
            PictureRefused: its pixels are damaged, which its header did not show; `sound` finds such pictures at once.
        """
        if index in self._decoded:
            return self._memory[index].clone()
        stored = self._entries[index].picture
        picture = fit(read_picture(stored.read(), stored.name, min_side=1), self.size)
        if len(self._memory):
            self._memory[index] = picture
            self._decoded.add(index)
        return picture

    def batch(self, indices: Sequence[int]) -> Float[Tensor, "batch 3 size size"]:
        """Several pictures, float32 in [-1, 1]."""
        return torch.stack([self.image(index) for index in indices]).float() / 127.5 - 1

    def fingerprint(self, index: int) -> str:
        """SHA-256, as hexadecimal, of all that decides what `image` gives: the encoded bytes, and how they are cut."""
        content = hashlib.sha256(self._entries[index].picture.read()).hexdigest()
        return hashlib.sha256(f"{content}, central square, {self.size} pixels".encode()).hexdigest()

    def sound(self, report: Path | None = None) -> "PictureSet":
        """The pictures that decode, after decoding each once; the others are refused. Refusals are logged.

        Args:
            report: a JSON file for the reasons of all refusals, by name; without any there is none.

        Raises:
            DataError: none is left.
            StorageError: `report` cannot be written.
        """
        usable = []
        damaged = []
        for index in range(len(self)):
            try:
                self.image(index)
            except PictureRefused as error:
                damaged.append(Refusal(error.name, error.reason))
            else:
                usable.append(index)
        refused = self.refused + damaged
        if refused and report is not None:
            write_json(report, {refusal.name: refusal.reason for refusal in refused})
        elif report is not None:
            report.unlink(missing_ok=True)  # of an earlier run
        if not usable:
            raise DataError(f"every picture is damaged; {summarise(refused)}")
        if refused:
            where = f"; all are in {report}" if report else ""
            logger.warning("%d pictures are used, %s%s", len(usable), summarise(refused), where)
        if not damaged:
            return self
        entries = [self._entries[index] for index in usable]
        rest = PictureSet(entries, size=self.size, refused=refused, class_names=self.class_names)
        if len(self._memory):
            rest._memory.copy_(self._memory[usable])
            rest._decoded.update(range(len(rest)))
        return rest

    @cached_property
    def digest(self) -> str:
        """SHA-256, as hexadecimal, over keys, captions, classes and the encoded bytes; reads every file once."""
        total = hashlib.sha256()
        for entry in self._entries:
            label = [] if entry.label is None else [str(entry.label).encode()]
            for part in (entry.key.encode(), entry.caption.encode(), *label, entry.picture.read()):
                total.update(hashlib.sha256(part).digest())
        return total.hexdigest()

    def refusals_summary(self) -> str:
        """How many pictures were refused, and the reasons of the first ones, for people."""
        return summarise(self.refused)


def open_pictures(
    source: Path,
    *,
    size: int,
    split: str | None = None,
    limit: int | None = None,
    captions: bool = True,
    classes: bool = False,
) -> PictureSet:
    """List the pictures of `source` that can be used at `size`, by their headers; nothing is decoded yet.

    Args:
        source: a folder of pictures, each with its caption beside it (`cat.png` and `cat.txt`, or the "caption" of
            `cat.json`); or a WebDataset shard; or a folder of shards (`*.tar`, read in place; `*.tar.gz`, unpacked into
            memory).
        size: side of the square pictures, in pixels. Nothing is scaled up: smaller pictures are refused.
        split: "train" or "heldout", by the rule of `heldout`; None is both.
        limit: most pictures; so many are taken at equal distances in the list of keys, so that they are not all alike.
        captions: each picture needs one; otherwise the caption of one without is "".
        classes: each picture needs a class instead of a caption: a whole number in its `.cls` or the "class" of its
            `.json`; in a folder of pictures, if none has those, the sub-folder at the top that it lies in. Sub-folders
            that hold pictures are numbered from 0 in sorted order, whatever the split.

    Raises:
        SettingsError: an argument is outside its range.
        DataError: the source is missing, a shard is damaged or not to be trusted, or no picture is usable; or some
            have a class number, and some only a sub-folder.
    """
    if size < MIN_SIDE:
        raise SettingsError(f"size={size}: allowed is a side from {MIN_SIDE} pixels")
    if split not in (None, "train", "heldout"):
        raise SettingsError(f'split={split!r}: allowed are "train", "heldout" and None for both')
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit}: allowed is a number from 1, or None for all pictures")
    samples, refused = _list(Path(source))
    folders = folder_classes(samples) if classes and not _shards(Path(source)) else {}
    entries = []
    for key in sorted(key for key, sample in samples.items() if sample.pictures):
        if split is None or heldout(key) == (split == "heldout"):
            first, *others = samples[key].pictures
            refused += [Refusal(other.name, f"same name as {first.name}; rename one of them") for other in others]
            try:
                entries.append(_entry(key, first, samples[key].texts, size, folders if classes else None, captions))
            except PictureRefused as error:
                refused.append(Refusal(error.name, error.reason))
    if not entries:
        rule = " (about one key in ten is held out, by a hash of its name: give more pictures)"
        what = f"no usable picture{'' if split is None else f' of the split {split!r}{rule}'} in {source}"
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        labels = " with classes" if classes else " with captions beside them" if captions else ""
        raise DataError(f"{what}; looked for {suffixes} of at least {size} pixels{labels}; {summarise(refused)}")
    names: list[str] = []
    if classes:
        numbers, names = number_classes([entry.label for entry in entries if entry.label is not None], folders)
        entries = [replace(entry, label=number) for entry, number in zip(entries, numbers, strict=True)]
    if limit is not None and limit < len(entries):
        entries = [entries[index * len(entries) // limit] for index in range(limit)]
    return PictureSet(entries, size=size, refused=refused, class_names=names)


def heldout(key: str) -> bool:
    """Whether a picture is kept from training, by its key alone: SHA-256 of the key, as a number, divisible by ten."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 == 0


def fit(picture: UInt8[Tensor, "3 height width"], size: int) -> UInt8[Tensor, "3 size size"]:
    """The central square, scaled down to `size` by Pillow's antialiased bicubic filter on 8 bits, the same everywhere.

    Raises:
        SettingsError: the picture is smaller than `size`.
    """
    height, width = picture.shape[1:]
    side = min(height, width)
    if side < size:
        raise SettingsError(f"size={size}: a picture of {width}x{height} pixels is not scaled up; take a smaller size")
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[:, top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    image = Image.fromarray(square.permute(1, 2, 0).contiguous().numpy()).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def summarise(refused: Sequence[Refusal]) -> str:
    """The number of refusals and the first five of them, in one line."""
    if not refused:
        return "0 refused"
    shown = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:5])
    return f"{len(refused)} refused: {shown}{'; ...' if len(refused) > 5 else ''}"


def _shards(source: Path) -> list[Path]:
    """The shards that a source is made of; none if it is a folder of pictures."""
    return sorted([*source.glob("*.tar"), *source.glob("*.tar.gz")]) if source.is_dir() else [source]


def _list(source: Path) -> tuple[Samples, list[Refusal]]:
    if not source.is_dir() and not source.is_file():
        raise DataError(f"{source} is no folder and no tar shard; give the path of one")
    shards = _shards(source)
    if not shards:
        return list_folder(source)
    loose = Counter(path.suffix.lower() for path in source.iterdir()) if source.is_dir() else Counter()
    if loose.keys() & PICTURE_SUFFIXES:
        raise DataError(f"{source} holds both shards and pictures; move either to a folder of its own")
    samples: Samples = {}
    for shard in shards:
        listed = list_shard(shard)
        for key in listed.keys() & samples.keys():
            raise DataError(f"{shard}: its key {key!r} is in an earlier shard too; every key must be there once")
        samples |= listed
    return samples, []


def _entry(
    key: str,
    picture: StoredBytes,
    texts: dict[str, StoredBytes],
    min_side: int,
    folders: Mapping[str, int] | None,
    needs_caption: bool,
) -> Entry:
    """A picture with its caption; or, if `folders` is given, with its class number or the sub-folder out of these.

    Without `needs_caption` the caption of one that has none is "".
    """
    if picture.length > MAX_FILE_BYTES:
        reason = f"{picture.length} bytes is more than the allowed {MAX_FILE_BYTES}; save it smaller"
        raise PictureRefused(picture.name, reason)
    try:
        # a shard's member is read whole: Pillow needs a stream that begins with the picture
        with BytesIO(picture.read()) if picture.offset else picture.path.open("rb") as stream:
            check_picture(stream, picture.name, min_side=min_side)
    except OSError as error:
        raise PictureRefused(picture.name, f"cannot be opened ({error.strerror}); mend its rights") from error
    caption = read_caption(picture.name, texts)
    if folders is None:
        if caption is None and needs_caption:
            refusal = 'no caption; put it beside the picture as .txt, or as "caption" in a .json'
            raise PictureRefused(picture.name, refusal)
        return Entry(key, picture, caption or "")
    label: int | str | None = read_class(picture.name, texts)
    if label is None and (top := key.partition("/")[0]) in folders and "/" in key:
        label = top
    if label is None:
        refusal = 'no class; put its number beside the picture as .cls, or as "class" in a .json'
        raise PictureRefused(picture.name, f"{refusal}, or sort a folder of pictures into a sub-folder for each class")
    return Entry(key, picture, caption or "", label)
