"""Which attributes an image shows, read off by the nearest of all renderings that differ in one attribute."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from davae.data import avatars
from davae.data.avatars import Attributes

SIDE = 128
"""Images are compared at this side, which the base has, too."""
VISIBLE_PIXELS, VISIBLE_STEP = 32, 16
"""Two values of an attribute are told apart where at least so many pixels differ by so much of 255 in a channel. Long
hair leaves a pixel or two of some shirts; the smallest other difference, between two moustaches, has 60."""


def alternatives(attributes: Attributes) -> dict[str, list[str | None]]:
    """By attribute, every value that it may have beside the others as they are, the right one first."""
    style = avatars.HAIR[attributes.hair]
    # A hair style is compared with those that have a colour of the same kind, so that only the style differs.
    styles = [name for name, other in avatars.HAIR.items() if other.colored == style.colored]
    values: dict[str, list[str | None]] = {
        "hair": [*styles],
        "expression": [*avatars.EXPRESSIONS],
        "accessory": [None, *avatars.ACCESSORIES],
        "facial_hair": [None, *avatars.FACIAL_HAIR],
        "skin": [*avatars.SKIN_COLORS],
        "shirt": [*avatars.SHIRT_COLORS],
        "background": [*avatars.BACKGROUND_COLORS],
    }
    if attributes.hair_color:
        values["hair_color"] = [*avatars.HAIR_COLORS]
    if attributes.hat_color:
        values["hat_color"] = [*avatars.SHIRT_COLORS]

    for name, listed in values.items():
        right = getattr(attributes, name)
        values[name] = [right, *(value for value in listed if value != right)]
    return values


def measure_margins(
    made: Mapping[str, Tensor], attributes: Attributes, side: int = SIDE
) -> dict[str, dict[str, float]]:
    """By set and attribute, how much nearer the right rendering is than the nearest other one, from -1 to 1.

    It is (other - right) / (other + right) of the mean squared distances: 1 for the right rendering itself, 0 half-way
    between the two, negative nearer to the other. An attribute none of whose other values would be seen is left out.

    Args:
        made: by set, an image [3, side, side] in [0, 255].
        attributes: what all of them should show.
        side: where images and renderings are compared.
    """
    margins: dict[str, dict[str, float]] = {name: {} for name in made}
    for attribute, values in alternatives(attributes).items():
        images = []
        for value in values:
            change: dict[str, Any] = {attribute: value}
            images.append(np.asarray(avatars.draw_image(replace(attributes, **change), side)))
        renderings = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()

        # Values that nobody could tell from the right one, such as a mouth behind a beard, are no mistakes.
        changed = ((renderings - renderings[0]).abs().amax(dim=1) >= VISIBLE_STEP).sum(dim=(1, 2))
        others = renderings[changed >= VISIBLE_PIXELS * (side / SIDE) ** 2]
        if not len(others):
            continue
        for name, image in made.items():
            other = (others - image.float()).square().mean(dim=(1, 2, 3)).min()
            right = (renderings[0] - image.float()).square().mean()
            margins[name][attribute] = float((other - right) / (other + right))
    return margins


def read_attributes(made: Mapping[str, Tensor], attributes: Attributes) -> dict[str, dict[str, bool]]:
    """By set and attribute, whether an image made for these attributes is nearest to the right rendering.

    An attribute none of whose other values would be seen is left out.

    Args:
        made: by set, an image [3, SIDE, SIDE] in [0, 255].
        attributes: what all of them should show.
    """
    margins = measure_margins(made, attributes)
    right: dict[str, dict[str, bool]] = {}
    for name, each in margins.items():
        right[name] = {key: margin > 0 for key, margin in each.items()}
    return right


def accuracy(answers: Sequence[Mapping[str, bool]]) -> dict[str, tuple[float, int]]:
    """By attribute, the share of right answers, and how many images have the attribute."""
    shares = {}
    for name in sorted({name for answer in answers for name in answer}):
        given = [answer[name] for answer in answers if name in answer]
        shares[name] = (sum(given) / len(given), len(given))
    return shares
