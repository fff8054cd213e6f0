"""The usable pictures of a source, checked by their headers, each with its caption or its class."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from davae.data.buckets import Bucket, choose_bucket
from davae.data.loading import in_threads
from davae.data.pictures import PictureRefused, Refusal, check_picture
from davae.data.stored import Sample, StoredBytes, explain_unreadable, parse_json, try_often
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
    # Class number; None in a set of captioned pictures.
    label: int | None = None
    # The sub-folder that the number stands for, or "" if the number is beside the picture.
    folder: str = ""


def make_entries(
    samples: Mapping[str, Sample], buckets: Sequence[Bucket], folders: Mapping[str, int] | None, needs_caption: bool
) -> tuple[list[PictureEntry], list[Refusal]]:
    """`make_entry` of each sample by its key, and the refusals; of pictures of one name the first is taken."""

    def make(key: str) -> PictureEntry | Refusal:
        try:
            return make_entry(key, samples[key], buckets, folders, needs_caption)
        except PictureRefused as error:
            return error.refusal

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
    """A picture with its caption or, if numbers of `folders` are given, its own class or that of its sub-folder."""
    picture = sample.pictures[0]
    width, height = _read_size(picture)
    bucket = choose_bucket(width, height, buckets)
    if bucket is None:
        smallest = smallest_size(buckets)
        reason = f"{width}x{height} pixels: smaller than {smallest}, and nothing is scaled up; bring a larger one"
        raise PictureRefused(picture.name, reason, "too small")

    # A set has captions or classes; with classes a caption may be there or not.
    caption = _read_caption(sample)
    if folders is None:
        if not caption and needs_caption:
            if other := _describe_other_captions(sample):
                raise PictureRefused(picture.name, other, "text")
            reason = 'no caption; put it beside the picture as .txt, or as "caption" in a .json or in metadata.jsonl'
            raise PictureRefused(picture.name, reason, "no caption")
        return PictureEntry(key, picture, caption, width, height, bucket)

    # A number beside the picture goes before its sub-folder.
    label, folder = _read_class(sample), ""
    if label is None and "/" in key:
        folder = key.partition("/")[0]
        label = folders.get(folder)
    if label is None:
        reason = 'no class; put its number beside the picture as .cls, or as "class" in a .json, or sort a folder of '
        reason += "pictures into a sub-folder for each class"
        raise PictureRefused(picture.name, reason, "no class")
    return PictureEntry(key, picture, caption, width, height, bucket, label, folder)


def name_classes(entries: Sequence[PictureEntry], folders: Mapping[str, int]) -> list[str]:
    """The names of the classes in the order of their numbers, if they are sub-folders; no names otherwise."""
    named = [entry.folder for entry in entries if entry.folder]
    numbered = [entry.label for entry in entries if not entry.folder]
    if named and numbered:
        raise DataError(
            f"some pictures give their class as a number, like {numbered[0]}, and some only by their sub-folder, like "
            f"{named[0]!r}: do one or the other for all of them"
        )
    return list(folders) if named else []


def smallest_size(buckets: Sequence[Bucket]) -> str:
    """The size of the smallest bucket, for messages."""
    bucket = min(buckets, key=lambda bucket: bucket.height * bucket.width)
    return f"{bucket.width} pixels" if bucket.width == bucket.height else f"{bucket.width}x{bucket.height} pixels"


def _read_size(picture: StoredBytes) -> tuple[int, int]:
    if picture.length > MAX_FILE_BYTES:
        reason = f"{picture.length} bytes is more than the allowed {MAX_FILE_BYTES}; save it smaller"
        raise PictureRefused(picture.name, reason, "too large")

    def check() -> tuple[int, int]:
        with picture.open() as stream:
            return check_picture(stream, picture.name, min_side=1)

    try:
        return try_often(check)
    except OSError as error:
        raise PictureRefused(picture.name, explain_unreadable(error)) from error


# ------------------------------------------------------------------------------------------------ captions and classes


def _read_caption(sample: Sample) -> str:
    """The caption without white space around it, or ""."""
    caption, _ = _find(sample, (".txt", ".caption"), CAPTION_KEYS, str)
    return (caption or "").strip()


def _describe_other_captions(sample: Sample) -> str:
    """Where something else than a text stands in place of a caption, and what, or ""."""
    value, place = _find(sample, (), CAPTION_KEYS, object)
    if value is None:
        return ""
    kind = f"a list of {len(value)}" if isinstance(value, list) else f"of type {type(value).__name__}"
    return f"{place} is {kind}; allowed is one text"


def _read_class(sample: Sample) -> int | None:
    """The class number, or None."""
    number, place = _find(sample, (".cls",), CLASS_KEYS, object)
    if ".cls" in sample.texts and re.fullmatch("[0-9]{1,9}", number):
        number = int(number)
    if number is not None and (type(number) is not int or not 0 <= number < 10**9):  # a bool is an int, too
        reason = f"{place} is {str(number)[:40]!r}; allowed is a whole number from 0"
        raise PictureRefused(sample.pictures[0].name, reason, "text")
    return number


def _find(sample: Sample, suffixes: Sequence[str], keys: Sequence[str], kind: type) -> tuple[Any, str]:
    """The first of these texts, or else of these values in the `.json` and then in the row; and where it stands."""
    # A .json that is broken is refused even if another text has the value.
    tables = [(sample.row, "its row")]
    if ".json" in sample.texts:
        tables.insert(0, (_read_metadata(sample), sample.texts[".json"].name))
    for suffix in suffixes:
        if suffix in sample.texts:
            return _read_text(sample.texts[suffix]).strip(), sample.texts[suffix].name

    for table, place in tables:
        for key in keys:
            value = table.get(key)
            if isinstance(value, str) and len(value) > MAX_TEXT_BYTES:
                reason = f'the "{key}" of {place} is longer than the allowed {MAX_TEXT_BYTES} letters; shorten it'
                raise PictureRefused(sample.pictures[0].name, reason, "text")
            if value is not None and isinstance(value, kind):
                return value, f'the "{key}" of {place}'
    return None, ""


def _read_metadata(sample: Sample) -> dict[str, Any]:
    """The object in the `.json`, or an empty one if something else is there."""
    text = _read_text(sample.texts[".json"])
    try:
        metadata = parse_json(text)
    except ValueError as error:
        reason = f"its {sample.texts['.json'].name} is no JSON ({error}); mend it"
        raise PictureRefused(sample.pictures[0].name, reason, "text") from error
    return metadata if isinstance(metadata, dict) else {}


def _read_text(stored: StoredBytes) -> str:
    if stored.length > MAX_TEXT_BYTES:
        reason = f"{stored.length} bytes of text, allowed are {MAX_TEXT_BYTES}; shorten it"
        raise PictureRefused(stored.name, reason, "text")
    try:
        return stored.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PictureRefused(stored.name, f"its text is not UTF-8 ({error}); save it as UTF-8", "text") from error
