"""Which pictures are held out from training: about one in ten, by a hash; pictures of equal bytes stay together."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TypeVar

from davae.data.loading import in_threads
from davae.data.pictures import PictureRefused
from davae.data.stored import HEADER_BYTES, Samples, StoredBytes, try_often

logger = logging.getLogger(__name__)

T = TypeVar("T")

SPLIT = 2
"""The version of the rule that new runs have. Version 1 goes by keys alone; both are kept."""


def heldout(name: str) -> bool:
    """Whether SHA-256 of the name, as a number, is divisible by ten."""
    return _hash(name) % 10 == 0


def take_split(samples: Samples, split: str | None, *, numbered: bool, keys_alone: bool) -> Samples:
    """The samples with pictures of one split, or of both, in the order of their keys; see `choose_heldout`."""
    chosen = choose_heldout(samples, numbered=numbered, keys_alone=keys_alone) if split else set()
    taken: Samples = {}
    for key, sample in sorted(samples.items()):
        if sample.pictures and (split is None or (key in chosen) == (split == "heldout")):
            taken[key] = sample
    return taken


def choose_heldout(samples: Samples, *, numbered: bool = False, keys_alone: bool = False) -> set[str]:
    """The keys of the held-out pictures, by `heldout` of a name; at least one if the pictures are several.

    A picture's name is its key, or the first key of those that have the same bytes. If keys are `numbered` rows, which
    change when a table is written anew, it is a digest of its bytes. `keys_alone` is the rule of former versions.
    """
    keys = [key for key, sample in samples.items() if sample.pictures]
    names = {key: key for key in keys}
    if numbered and not keys_alone:
        contents = in_threads(_digest_content, [samples[key].pictures[0] for key in keys])
        names = {key: content or key for key, content in zip(keys, contents, strict=True)}
    elif not keys_alone:
        for group in find_equal({key: samples[key].pictures[0] for key in keys}):
            names |= dict.fromkeys(group, group[0])
    if len(set(names.values())) == 1:
        names = {key: key for key in keys}

    chosen = set(filter(heldout, names.values()))
    if len(keys) > 1 and len(chosen) in (0, len(set(names.values()))):
        chosen = {min(names.values(), key=_hash)}
        shown = next(key for key in keys if names[key] in chosen)
        logger.warning("few pictures: of these %d only %s is held out, whose hash is the smallest", len(keys), shown)
    return {key for key in keys if names[key] in chosen}


def find_equal(pictures: Mapping[str, StoredBytes]) -> list[list[str]]:
    """The keys of pictures with equal bytes, in sorted order, a list for each such content.

    Only pictures of one length are read, and whole only those that begin alike.
    """
    groups = [sorted(pictures)]
    describers: tuple[Callable[[StoredBytes], object], ...] = (_length, _digest_head, _digest_content)
    for describe in describers:
        keys = list(chain.from_iterable(groups))
        facts = in_threads(describe, [pictures[key] for key in keys])
        groups = _divide(groups, dict(zip(keys, facts, strict=True)))
    return groups


def _divide(groups: Iterable[list[str]], facts: Mapping[str, object]) -> list[list[str]]:
    """The parts of each group whose facts are equal, if they are of several; None equals nothing."""
    parts: list[list[str]] = []
    for group in groups:
        by_fact: dict[object, list[str]] = {}
        for key in group:
            if facts[key] is not None:
                by_fact.setdefault(facts[key], []).append(key)
        parts += [part for part in by_fact.values() if len(part) > 1]
    return parts


def _length(picture: StoredBytes) -> int | None:
    return _readable(lambda: picture.length)


def _digest_head(picture: StoredBytes) -> str | None:
    def read() -> str:
        with picture.open() as stream:
            return hashlib.sha256(stream.read(HEADER_BYTES)).hexdigest()

    return _readable(lambda: try_often(read))


def _digest_content(picture: StoredBytes) -> str | None:
    return _readable(lambda: hashlib.sha256(picture.read()).hexdigest())


def _readable(read: Callable[[], T]) -> T | None:
    """What `read` gives, or None for a picture that cannot be read: it is refused later, with its reason."""
    try:
        return read()
    except (OSError, PictureRefused):
        return None


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)
