"""The usable pictures of a source, checked by their headers, each with its caption or its class."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from davae.data.buckets import Bucket, choose_bucket
from davae.data.loading import in_threads
from davae.data.pictures import PictureRefused, check_picture
from davae.data.stored import Refusal, Sample, StoredBytes
from davae.errors import DataError

MAX_FILE_BYTES = 512 << 20
MAX_TEXT_BYTES = 1 << 20

# Keys of a `.json` or of a table's row; the first that is there counts.
CAPTION_KEYS = ("caption", "text", "txt")
CLASS_KEYS = ("class", "label", "cls")


@dataclass(frozen=True)
class PictureEntry:
    """One usable picture of a source."""

    key: str
    picture: StoredBytes
    # May be empty where captions are not needed, or classes are.
    caption: str
    # Of the upright picture as it is stored, in pixels.
    width: int
    height: int
    bucket: Bucket
    # Class number, or name of the sub-folder until that has one; None in a set of captioned pictures.
    label: int | str | None = None


def make_entries(
    samples: Mapping[str, Sample], buckets: Sequence[Bucket], folders: Mapping[str, int] | None, needs_caption: bool
) -> tuple[list[PictureEntry], list[Refusal]]:
    """`make_entry` of each sample by its key, and the refusals; of pictures of one name the first is taken."""

    def make(key: str) -> PictureEntry | Refusal:
        try:
            return make_entry(key, samples[key], buckets, folders, needs_caption)
        except PictureRefused as error:
            return Refusal(error.name, error.reason, error.kind)

    # Headers are read by several threads; the order stays.
    entries, refused = [], []
    for sample, entry in zip(samples.values(), in_threads(make, list(samples)), strict=True):
        first, *others = sample.pictures
        for other in others:
            refused.append(Refusal(other.name, f"same name as {first.name}; rename one of them", "same name"))

        if isinstance(entry, Refusal):
            refused.append(entry)
        else:
            entries.append(entry)
    return entries, refused


def make_entry(
    key: str, sample: Sample, buckets: Sequence[Bucket], folders: Mapping[str, int] | None, needs_caption: bool
) -> PictureEntry:
    """A picture with its caption or, if `folders` is given, its class number or the name of its class's folder."""
    picture = sample.pictures[0]
    width, height = _size(picture)
    bucket = choose_bucket(width, height, buckets)
    if bucket is None:
        smallest = smallest_size(buckets)
        reason = f"{width}x{height} pixels: smaller than {smallest}, and nothing is scaled up; bring a larger one"
        raise PictureRefused(picture.name, reason, "too small")

    # A set has captions or classes; with classes a caption may be there or not.
    caption = read_caption(picture.name, sample)
    if folders is None:
        if caption is None and needs_caption:
            reason = 'no caption; put it beside the picture as .txt, or as "caption" in a .json or in metadata.jsonl'
            raise PictureRefused(picture.name, reason, "no caption")
        return PictureEntry(key, picture, caption or "", width, height, bucket)

    # A number beside the picture goes before its sub-folder.
    label: int | str | None = read_class(picture.name, sample)
    folder, slash, _ = key.partition("/")
    if label is None and slash and folder in folders:
        label = folder
    if label is None:
        reason = 'no class; put its number beside the picture as .cls, or as "class" in a .json, or sort a folder of '
        reason += "pictures into a sub-folder for each class"
        raise PictureRefused(picture.name, reason, "no class")
    return PictureEntry(key, picture, caption or "", width, height, bucket, label)


def smallest_size(buckets: Sequence[Bucket]) -> str:
    """The size of the smallest bucket, for messages."""
    bucket = min(buckets, key=lambda bucket: bucket.height * bucket.width)
    return f"{bucket.width} pixels" if bucket.width == bucket.height else f"{bucket.width}x{bucket.height} pixels"


# ------------------------------------------------------------------------------------------------ captions and classes


def read_caption(name: str, sample: Sample) -> str | None:
    """The caption of a picture without white space around it, or None.

    The first that is there of its `.txt`, its `.caption`, its `.json` and its row in a table.
    """
    # A .json that is broken is refused even if another text has the caption.
    metadata = _read_metadata(name, sample)
    for suffix in (".txt", ".caption"):
        if suffix in sample.texts:
            return _read_text(sample.texts[suffix]).strip() or None

    for table in (metadata, sample.row):
        for key in CAPTION_KEYS:
            if isinstance(caption := table.get(key), str):
                return caption.strip() or None
    return None


def read_class(name: str, sample: Sample) -> int | None:
    """The class number of a picture, from its `.cls`, its `.json` or its row in a table, or None."""
    number, place = _find_class(name, sample)
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < 10**9:  # a bool is an int, too
        raise PictureRefused(name, f"{place} is {str(number)[:40]!r}; allowed is a whole number from 0", "text")
    return number


def folder_classes(samples: Mapping[str, Sample]) -> dict[str, int]:
    """Numbers, in sorted order, of the sub-folders of a source that hold pictures, at any depth."""
    names = {key.partition("/")[0] for key, sample in samples.items() if sample.pictures and "/" in key}
    return {name: number for number, name in enumerate(sorted(names))}


def number_classes(entries: Sequence[PictureEntry], names: Mapping[str, int]) -> tuple[list[PictureEntry], list[str]]:
    """The entries with numbers in place of the names of sub-folders, and these names in the order of numbers."""
    kinds = {type(entry.label): entry.label for entry in entries}
    if len(kinds) > 1:
        raise DataError(
            f"some pictures give their class as a number, like {kinds[int]}, and some only by their sub-folder, like "
            f"{kinds[str]!r}: do one or the other for all of them"
        )
    if str not in kinds:
        return list(entries), []
    return [replace(entry, label=names[str(entry.label)]) for entry in entries], list(names)


def _size(picture: StoredBytes) -> tuple[int, int]:
    """Width and height of the upright picture."""
    if picture.length > MAX_FILE_BYTES:
        reason = f"{picture.length} bytes is more than the allowed {MAX_FILE_BYTES}; save it smaller"
        raise PictureRefused(picture.name, reason, "too large")
    try:
        with picture.open() as stream:
            return check_picture(stream, picture.name, min_side=1)
    except OSError as error:
        raise PictureRefused(picture.name, f"cannot be opened ({error.strerror}); mend its rights") from error


def _find_class(name: str, sample: Sample) -> tuple[Any, str]:
    """The class as it is written, and where; None if it is nowhere."""
    if ".cls" in sample.texts:
        text = _read_text(sample.texts[".cls"]).strip()
        return int(text) if re.fullmatch("[0-9]{1,9}", text) else text, sample.texts[".cls"].name

    beside = sample.texts[".json"].name if ".json" in sample.texts else ""
    for table, place in ((_read_metadata(name, sample), beside), (sample.row, "its row")):
        for key in CLASS_KEYS:
            if table.get(key) is not None:
                return table[key], f'the "{key}" of {place}'
    return None, ""


def _read_metadata(name: str, sample: Sample) -> dict[str, Any]:
    """The object in the `.json`; empty if there is none."""
    stored = sample.texts.get(".json")
    if stored is None:
        return {}
    try:
        metadata = json.loads(_read_text(stored))
        json.dumps(metadata, ensure_ascii=False).encode()  # escapes can spell half characters, which are no text
    except (ValueError, RecursionError) as error:
        if isinstance(error, PictureRefused):
            raise
        raise PictureRefused(name, f"its {stored.name} is no JSON ({error}); mend it", "text") from error
    return metadata if isinstance(metadata, dict) else {}


def _read_text(stored: StoredBytes) -> str:
    if stored.length > MAX_TEXT_BYTES:
        reason = f"{stored.length} bytes of text, allowed are {MAX_TEXT_BYTES}; shorten it"
        raise PictureRefused(stored.name, reason, "text")
    try:
        return stored.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PictureRefused(stored.name, f"its text is not UTF-8 ({error}); save it as UTF-8", "text") from error
