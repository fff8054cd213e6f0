"""Masks that lie beside the pictures they belong to: no pictures to train on."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from davae.data.pictures import Refusal
from davae.data.stored import Samples

# "tabby_mask", "tabby-masklabel"; or "masks/tabby" for "images/tabby" or "tabby".
MASK_NAME = re.compile(r"(.+?)[ ._-]+(masks?|masklabel|seg|segmentation)", re.IGNORECASE)
MASK_FOLDERS = ("mask", "masks", "segmentation", "segmentations")
PICTURE_FOLDERS = ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos")


def set_masks_aside(samples: Samples) -> Iterator[Refusal]:
    """Take away the pictures that are masks of others by their names; one with a text of its own is a picture."""
    masks: dict[str, str] = {}
    for key, sample in samples.items():
        if sample.pictures and not sample.texts and not sample.row:
            for original in _name_originals(PurePosixPath(key)):
                if original in samples and samples[original].pictures:
                    masks[key] = original

    # Found first and taken then: a mask of a mask is one, too.
    for key, original in masks.items():
        name = samples[original].pictures[0].name if original not in masks else original
        for picture in samples[key].pictures:
            reason = f"a mask of {name}, by its name; if it is a picture, put a caption beside it or rename it"
            yield Refusal(picture.name, reason, "mask")
    for key in masks:
        del samples[key]


def _name_originals(key: PurePosixPath) -> Iterator[str]:
    """The keys that a picture of this key could be a mask of."""
    if match := MASK_NAME.fullmatch(key.name):
        yield key.with_name(match[1]).as_posix()
    for place, part in enumerate(key.parts[:-1]):
        if part.lower() in MASK_FOLDERS:
            before, behind = key.parts[:place], key.parts[place + 1 :]
            yield PurePosixPath(*before, *behind).as_posix()
            for folder in PICTURE_FOLDERS:
                yield PurePosixPath(*before, folder, *behind).as_posix()
