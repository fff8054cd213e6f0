"""Pictures with captions, from a folder or from WebDataset shards, as square tensors of one size."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from davae.data.listing import PICTURE_SUFFIXES, Refusal, Samples, StoredBytes, list_folder, list_shard
from davae.data.pictures import MIN_SIDE, PictureRefused, check_picture, read_picture
from davae.errors import DataError, SettingsError
from davae.storage import write_json

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 512 << 20
MAX_TEXT_BYTES = 1 << 20
MEMORY_BYTES = 1 << 30
"""A set up to this size as uint8 is kept in memory once it is decoded; a larger one is decoded at every use."""


@dataclass(frozen=True)
class Entry:
    """One usable picture of a source."""

    key: str
    picture: StoredBytes
    caption: str


class PictureSet:
    """Captioned pictures in the order of their keys, decoded when they are first used; made by `open_pictures`.

    `keys` and `captions` run in step with the pictures; `refused` lists what the source holds and the set does not,
    with reasons.
    """

    def __init__(self, entries: Sequence[Entry], *, size: int, refused: Sequence[Refusal]) -> None:
        self._entries = list(entries)
        self.size = size
        self.refused = list(refused)
        self.keys = [entry.key for entry in entries]
        self.captions = [entry.caption for entry in entries]
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
        rest = PictureSet([self._entries[index] for index in usable], size=self.size, refused=refused)
        if len(self._memory):
            rest._memory.copy_(self._memory[usable])
            rest._decoded.update(range(len(rest)))
        return rest

    @cached_property
    def digest(self) -> str:
        """SHA-256, as hexadecimal, over the keys, the captions and the encoded bytes; reads every file once."""
        total = hashlib.sha256()
        for entry in self._entries:
            for part in (entry.key.encode(), entry.caption.encode(), entry.picture.read()):
                total.update(hashlib.sha256(part).digest())
        return total.hexdigest()

    def refusals_summary(self) -> str:
        """How many pictures were refused, and the reasons of the first ones, for people."""
        return summarise(self.refused)


def open_pictures(source: Path, *, size: int, split: str | None = None, limit: int | None = None) -> PictureSet:
    """List the pictures of `source` that can be used at `size`, by their headers; nothing is decoded yet.

    Args:
        source: a folder of pictures, each with its caption beside it (`cat.png` and `cat.txt`, or the "caption" of
            `cat.json`); or a WebDataset shard; or a folder of shards (`*.tar`, read in
            place; `*.tar.gz`, unpacked into memory).
        size: side of the square pictures, in pixels. Nothing is scaled up: smaller pictures are refused.
        split: "train" or "heldout", by the rule of `heldout`; None is both.
        limit: most pictures; so many are taken at equal distances in the list of keys, so that they are not all alike.

    Raises:
        SettingsError: an argument is outside its range.
        DataError: the source is missing, a shard is damaged or not to be trusted, or no picture is usable.
    """
    if size < MIN_SIDE:
        raise SettingsError(f"size={size}: allowed is a side from {MIN_SIDE} pixels")
    if split not in (None, "train", "heldout"):
        raise SettingsError(f'split={split!r}: allowed are "train", "heldout" and None for both')
    if limit is not None and limit < 1:
        raise SettingsError(f"limit={limit}: allowed is a number from 1, or None for all pictures")
    samples, refused = _list(Path(source))
    entries = []
    for key in sorted(key for key, sample in samples.items() if sample.pictures):
        if split is None or heldout(key) == (split == "heldout"):
            first, *others = samples[key].pictures
            refused += [Refusal(other.name, f"same name as {first.name}; rename one of them") for other in others]
            try:
                entries.append(_entry(key, first, samples[key].texts, size))
            except PictureRefused as error:
                refused.append(Refusal(error.name, error.reason))
    if not entries:
        rule = " (about one key in ten is held out, by a hash of its name: give more pictures)"
        what = f"no usable picture{'' if split is None else f' of the split {split!r}{rule}'} in {source}"
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        looked = f"looked for {suffixes} of at least {size} pixels with captions beside them"
        raise DataError(f"{what}; {looked}; {summarise(refused)}")
    if limit is not None and limit < len(entries):
        entries = [entries[index * len(entries) // limit] for index in range(limit)]
    return PictureSet(entries, size=size, refused=refused)


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


def _list(source: Path) -> tuple[Samples, list[Refusal]]:
    if source.is_dir():
        shards = sorted([*source.glob("*.tar"), *source.glob("*.tar.gz")])
        if not shards:
            return list_folder(source)
    elif source.is_file():
        shards = [source]
    else:
        raise DataError(f"{source} is no folder and no tar shard; give the path of one")
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


def _entry(key: str, picture: StoredBytes, texts: dict[str, StoredBytes], min_side: int) -> Entry:
    if picture.length > MAX_FILE_BYTES:
        reason = f"{picture.length} bytes is more than the allowed {MAX_FILE_BYTES}; save it smaller"
        raise PictureRefused(picture.name, reason)
    try:
        # a shard's member is read whole: Pillow needs a stream that begins with the picture
        with BytesIO(picture.read()) if picture.offset else picture.path.open("rb") as stream:
            check_picture(stream, picture.name, min_side=min_side)
    except OSError as error:
        raise PictureRefused(picture.name, f"cannot be opened ({error.strerror}); mend its rights") from error
    return Entry(key, picture, _caption(picture.name, texts))


def _caption(name: str, texts: dict[str, StoredBytes]) -> str:
    """The `.txt`, or else the "caption" of the `.json`."""
    caption = None
    if ".json" in texts:
        try:
            metadata = json.loads(_text(texts[".json"]))
            json.dumps(metadata, ensure_ascii=False).encode()  # escapes can spell half characters, which are no text
        except (ValueError, RecursionError) as error:
            raise PictureRefused(name, f"its {texts['.json'].name} is no JSON ({error}); mend it") from error
        if isinstance(metadata, dict):
            caption = metadata.get("caption")
    if ".txt" in texts:
        caption = _text(texts[".txt"])
    if not isinstance(caption, str) or not caption.strip():
        raise PictureRefused(name, 'no caption; put it beside the picture as .txt, or as "caption" in a .json')
    return caption.strip()


def _text(stored: StoredBytes) -> str:
    if stored.length > MAX_TEXT_BYTES:
        raise PictureRefused(stored.name, f"{stored.length} bytes of text, allowed are {MAX_TEXT_BYTES}; shorten it")
    try:
        return stored.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PictureRefused(stored.name, f"its text is not UTF-8 ({error}); save it as UTF-8") from error
