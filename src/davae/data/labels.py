"""What is said about a picture: its caption, or its class."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from davae.data.listing import Samples, StoredBytes
from davae.data.pictures import PictureRefused
from davae.errors import DataError

MAX_TEXT_BYTES = 1 << 20

Texts = Mapping[str, StoredBytes]


def read_caption(name: str, texts: Texts) -> str | None:
    """The `.txt`, or else the "caption" of the `.json`, without white space around it; None if it is none.

    Raises:
        PictureRefused: a text is too long or not UTF-8, or the `.json` is no JSON.
    """
    caption = _metadata(name, texts).get("caption")
    if ".txt" in texts:
        caption = _text(texts[".txt"])
    return caption.strip() or None if isinstance(caption, str) else None


def read_class(name: str, texts: Texts) -> int | None:
    """The number in the `.cls`, or else the "class" of the `.json`; None if neither is there.

    Raises:
        PictureRefused: what is there is no whole number from 0, or as `read_caption`.
    """
    if ".cls" in texts:
        given: Any = _text(texts[".cls"]).strip()
        number = int(given) if re.fullmatch("[0-9]{1,9}", given) else None
        place = texts[".cls"].name
    else:
        given = _metadata(name, texts).get("class")
        if given is None:
            return None
        number = given if type(given) is int and 0 <= given < 10**9 else None  # a bool is an int, too
        place = f'the "class" of {texts[".json"].name}'
    if number is None:
        raise PictureRefused(name, f"{place} is {str(given)[:40]!r}; allowed is a whole number from 0")
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


def _metadata(name: str, texts: Texts) -> dict[str, Any]:
    """The `.json`; empty if there is none, or one that holds no object."""
    if ".json" not in texts:
        return {}
    try:
        metadata = json.loads(_text(texts[".json"]))
        json.dumps(metadata, ensure_ascii=False).encode()  # escapes can spell half characters, which are no text
    except (ValueError, RecursionError) as error:
        raise PictureRefused(name, f"its {texts['.json'].name} is no JSON ({error}); mend it") from error
    return metadata if isinstance(metadata, dict) else {}


def _text(stored: StoredBytes) -> str:
    if stored.length > MAX_TEXT_BYTES:
        raise PictureRefused(stored.name, f"{stored.length} bytes of text, allowed are {MAX_TEXT_BYTES}; shorten it")
    try:
        return stored.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PictureRefused(stored.name, f"its text is not UTF-8 ({error}); save it as UTF-8") from error
