"""What is said about a picture: its caption, or its class."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from davae.data.pictures import PictureRefused
from davae.data.stored import Sample, Samples, StoredBytes
from davae.errors import DataError

MAX_TEXT_BYTES = 1 << 20

CAPTION_KEYS = ("caption", "text", "txt")
CLASS_KEYS = ("class", "label", "cls")


def read_caption(name: str, sample: Sample) -> str | None:
    """What is said about a picture, without white space around it; None if nothing is.

    The first that is there of its `.txt`, its `.caption`, its `.json` and its row in a table; of the latter two the
    first of `CAPTION_KEYS`.

    Raises:
        PictureRefused: a text is too long or not UTF-8, or the `.json` is no JSON.
    """
    metadata = _metadata(name, sample)
    for suffix in (".txt", ".caption"):
        if suffix in sample.texts:
            return _text(sample.texts[suffix]).strip() or None
    for table in (metadata, sample.row):
        for key in CAPTION_KEYS:
            if isinstance(given := table.get(key), str):
                return given.strip() or None
    return None


def read_class(name: str, sample: Sample) -> int | None:
    """The number in the `.cls`, or else the first of `CLASS_KEYS` in the `.json` or in the row; None if none is there.

    Raises:
        PictureRefused: what is there is no whole number from 0, or as `read_caption`.
    """
    if ".cls" in sample.texts:
        given: Any = _text(sample.texts[".cls"]).strip()
        number = int(given) if re.fullmatch("[0-9]{1,9}", given) else None
        place = sample.texts[".cls"].name
    else:
        beside = sample.texts[".json"].name if ".json" in sample.texts else ""
        tables = ((_metadata(name, sample), beside), (sample.row, "its row"))
        found = [
            (table[key], f'the "{key}" of {where}') for table, where in tables for key in CLASS_KEYS if key in table
        ]
        given, place = next(((value, place) for value, place in found if value is not None), (None, ""))
        if given is None:
            return None
        number = given if type(given) is int and 0 <= given < 10**9 else None  # a bool is an int, too
    if number is None:
        raise PictureRefused(name, f"{place} is {str(given)[:40]!r}; allowed is a whole number from 0", "text")
    return number


def folder_classes(samples: Samples) -> dict[str, int]:
    """Numbers, in sorted order, of the sub-folders of a source that hold pictures, at any depth."""
    names = {key.partition("/")[0] for key, sample in samples.items() if sample.pictures and "/" in key}
    return {name: number for number, name in enumerate(sorted(names))}


def number_classes(classes: Sequence[int | str], names: Mapping[str, int]) -> tuple[list[int], list[str]]:
    """Class numbers of pictures whose classes are all numbers, or all names; and the names in the order of numbers.

    Raises:
        DataError: some are numbers and some are names.
    """
    kinds = {type(given): given for given in classes}
    if len(kinds) > 1:
        raise DataError(
            f"some pictures give their class as a number, like {kinds[int]}, and some only by their sub-folder, like "
            f"{kinds[str]!r}: do one or the other for all of them"
        )
    return [names[given] if isinstance(given, str) else given for given in classes], list(names) if str in kinds else []


def _metadata(name: str, sample: Sample) -> dict[str, Any]:
    """The `.json`; empty if there is none, or one that holds no object."""
    stored = sample.texts.get(".json")
    if stored is None:
        return {}
    try:
        metadata = json.loads(_text(stored))
        json.dumps(metadata, ensure_ascii=False).encode()  # escapes can spell half characters, which are no text
    except (ValueError, RecursionError) as error:
        if isinstance(error, PictureRefused):
            raise
        raise PictureRefused(name, f"its {stored.name} is no JSON ({error}); mend it", "text") from error
    return metadata if isinstance(metadata, dict) else {}


def _text(stored: StoredBytes) -> str:
    if stored.length > MAX_TEXT_BYTES:
        reason = f"{stored.length} bytes of text, allowed are {MAX_TEXT_BYTES}; shorten it"
        raise PictureRefused(stored.name, reason, "text")
    try:
        return stored.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PictureRefused(stored.name, f"its text is not UTF-8 ({error}); save it as UTF-8", "text") from error
