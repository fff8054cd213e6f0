"""Avatars: attributes and image as pure functions of a number.

Every image is an Open Peeps portrait (Pablo Stanley, CC0 1.0), composed by DiceBear and rendered from vectors by resvg,
so that any size holds true detail. `avatar_captions` puts the attributes into words.

    attributes = draw_attributes(7)
    image = draw_image(attributes, 256)

One pair of (hair, expression) in ten is held out by `is_held_out`. No training may see such a pair.
"""

import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import count
from typing import Any

from PIL import Image

from davae.data.split import heldout
from davae.errors import SettingsError

EXTRA = "davae[demo]"

# The part of the style's 704 x 704 canvas that an image shows: left, top, side. The face takes half of it.
CROP = (80, 72, 592)

# Two colours that stand for others in DiceBear's output until they are replaced.
SHIRT_MARK, INK = "#00ff01", "#000000"


@dataclass(frozen=True)
class Hair:
    """A hair style or a head cover: the variant in the style, who has it, how a caption names it.

    A phrase with "{}" takes a colour.
    """

    variant: str
    person: str
    phrases: tuple[str, ...]
    colored: str = ""
    """What the colour of the phrases is: of "hair", of a "hat", or nothing for styles that are always black."""


HAIR = {
    style.variant: style
    for style in (
        Hair("afro", "both", ("afro", "black afro")),
        Hair("bangs", "woman", ("{} bob", "{} bob hair"), "hair"),
        Hair("bangs2", "woman", ("bangs", "black bangs")),
        Hair("bantuKnots", "both", ("knots", "black knots", "knotted hair")),
        Hair("buns", "woman", ("buns", "black buns")),
        Hair("cornrows", "woman", ("{} ponytail", "{} hair in a ponytail"), "hair"),
        Hair("cornrows2", "woman", ("braids", "black braids", "braided hair")),
        Hair("dreads1", "both", ("long dreadlocks", "long black dreadlocks")),
        Hair("dreads2", "both", ("short dreadlocks", "short black dreadlocks")),
        Hair("flatTop", "man", ("flat top", "black flat top")),
        Hair("flatTopLong", "man", ("high top", "black high top")),
        Hair("grayBun", "woman", ("{} bun", "{} hair in a bun"), "hair"),
        Hair("grayMedium", "woman", ("low {} bun", "{} hair in a low bun"), "hair"),
        Hair("grayShort", "man", ("short {} hair", "short {} crop"), "hair"),
        Hair("hatBeanie", "both", ("{} beanie",), "hat"),
        Hair("hatHip", "both", ("hat", "black hat")),
        Hair("hijab", "woman", ("hijab", "black hijab")),
        Hair("long", "woman", ("long hair", "long black hair")),
        Hair("longBangs", "woman", ("long wavy hair", "long black waves", "long waves")),
        Hair("longCurly", "woman", ("long curls", "long curly hair", "long black curls")),
        Hair("medium3", "woman", ("medium hair", "medium black hair")),
        Hair("mediumBangs2", "woman", ("{} curls", "curly {} hair"), "hair"),
        Hair("mediumBangs3", "woman", ("pigtails", "black pigtails", "hair in pigtails")),
        Hair("mediumStraight", "woman", ("straight hair", "straight black hair")),
        Hair("mohawk", "both", ("{} mohawk",), "hair"),
        Hair("mohawk2", "both", ("{} spikes", "spiky {} hair"), "hair"),
        Hair("noHair1", "man", ("bald head", "no hair")),
        Hair("pomp", "man", ("pompadour", "black pompadour")),
        Hair("shaved2", "man", ("undercut", "black undercut")),
        Hair("shaved3", "both", ("messy hair", "messy black hair")),
        Hair("short1", "man", ("buzz cut", "black buzz cut")),
        Hair("short4", "man", ("{} quiff",), "hair"),
        Hair("short5", "man", ("short black hair", "short black crop")),
        Hair("turban", "man", ("{} turban",), "hat"),
        Hair("twists", "man", ("twists", "black twists", "twisted hair")),
    )
}

# Variant in the style: the word in captions.
EXPRESSIONS = {
    "awe": "amazed",
    "calm": "happy",
    "cheeky": "cheeky",
    "concerned": "worried",
    "contempt": "smug",
    "driven": "determined",
    "explaining": "talking",
    "eyesClosed": "sleeping",
    "fear": "scared",
    "hectic": "stressed",
    "lovingGrin1": "loving",
    "rage": "furious",
    "serious": "serious",
    "smile": "smiling",
    "smileBig": "grinning",
    "smileLOL": "laughing",
    "smileTeethGap": "toothy",
    "solemn": "sad",
    "suspicious": "suspicious",
    "tired": "tired",
    "veryAngry": "angry",
}
ACCESSORIES = {
    "eyepatch": "eyepatch",
    "glasses": "thin glasses",
    "glasses4": "white glasses",
    "glasses5": "round glasses",
    "sunglasses": "sunglasses",
}
FACIAL_HAIR = {
    "full": "beard",
    "full3": "big beard",
    "goatee2": "goatee",
    "moustache1": "thin moustache",
    "moustache3": "big moustache",
    "moustache6": "moustache",
}

HAIR_COLORS = {
    "red": "#d2400f",
    "blonde": "#ecc765",
    "brown": "#8f5c3c",
    "gray": "#b9b5b3",
    "pink": "#f48bb0",
    "blue": "#5b8fe6",
}
SKIN_COLORS = {"pale": "#ffe1c6", "tan": "#edb98a", "bronze": "#d08b5b", "brown": "#ae673a", "dark": "#7d5140"}
SHIRT_COLORS = {
    "red": "#e25a55",
    "orange": "#f7a23b",
    "yellow": "#fbdf5a",
    "green": "#6cc97a",
    "blue": "#7b9cf0",
    "purple": "#a886e0",
    "pink": "#f59bcb",
    "white": "#ffffff",
}
BACKGROUND_COLORS = {
    "white": "#ffffff",
    "pink": "#fbd3de",
    "yellow": "#faf0b4",
    "green": "#cdeed4",
    "blue": "#cbe4f8",
    "purple": "#e2d7f9",
    "gray": "#d9d9d9",
}

COLORED_WEIGHT = 2
"""How much more often a hair style is drawn whose colour varies: hair colour is the rarest attribute otherwise."""

ACCESSORY_SHARE, FACIAL_HAIR_SHARE = 0.4, 0.45
"""Of all people, and of those who are not women."""


@dataclass(frozen=True)
class Attributes:
    """All that an image shows; keys of this module's tables, None where there is nothing."""

    hair: str
    expression: str
    accessory: str | None
    facial_hair: str | None
    hair_color: str | None
    hat_color: str | None
    skin: str
    shirt: str
    background: str


def draw_attributes(number: int) -> Attributes:
    """The attributes of image `number`, held out or not."""
    draw = random.Random(f"avatar {number}")

    styles = list(HAIR.values())
    weights = [COLORED_WEIGHT if style.colored else 1 for style in styles]
    hair = draw.choices(styles, weights)[0]
    expression = draw.choice(list(EXPRESSIONS))

    accessory = draw.choice(list(ACCESSORIES))
    facial_hair = draw.choice(list(FACIAL_HAIR))
    has_accessory = draw.random() < ACCESSORY_SHARE
    has_facial_hair = draw.random() < FACIAL_HAIR_SHARE and hair.person != "woman"

    hair_color = draw.choice(list(HAIR_COLORS))
    hat_color = draw.choice(list(SHIRT_COLORS))
    return Attributes(
        hair=hair.variant,
        expression=expression,
        accessory=accessory if has_accessory else None,
        facial_hair=facial_hair if has_facial_hair else None,
        hair_color=hair_color if hair.colored == "hair" else None,
        hat_color=hat_color if hair.colored == "hat" else None,
        skin=draw.choice(list(SKIN_COLORS)),
        shirt=draw.choice(list(SHIRT_COLORS)),
        background=draw.choice(list(BACKGROUND_COLORS)),
    )


def is_held_out(attributes: Attributes) -> bool:
    """Whether no training may see this pair of hair and expression: one pair in ten, by SHA-256."""
    pair = f"{attributes.hair}+{attributes.expression}"
    return int.from_bytes(hashlib.sha256(pair.encode()).digest(), "big") % 10 == 0


def numbers(*, held_out: bool, start: int = 0) -> Iterator[int]:
    """The numbers, from `start`, of all images that are held out, or of all others; there is no end."""
    return (number for number in count(start) if is_held_out(draw_attributes(number)) == held_out)


def image_key(number: int) -> str:
    """The key of image `number` in a set of images: davae's split by key holds out what `is_held_out` holds out.

    The suffix is the smallest number with which the two rules agree.
    """
    held_out = is_held_out(draw_attributes(number))
    return next(key for key in (f"{number:07d}-{suffix}" for suffix in count()) if heldout(key) == held_out)


def draw_image(attributes: Attributes, size: int) -> Image.Image:
    """The RGB image of these attributes, `size` pixels wide and high.

    Raises:
        SettingsError: the packages that draw are missing, or `size` is under 1.
    """
    if size < 1:
        raise SettingsError(f"size={size}: allowed are sizes from 1 pixel")
    resvg = _packages()["resvg"]
    tree = resvg.usvg.Tree.from_str(draw_svg(attributes, size), resvg.usvg.Options.default())
    png = resvg.render(tree, (1, 0, 0, 0, 1, 0))
    return Image.open(io.BytesIO(png)).convert("RGB")


def draw_svg(attributes: Attributes, size: int) -> str:
    """The vector drawing of these attributes; `size` is the side that it names.

    Raises:
        SettingsError: the packages that draw are missing.
    """
    options = {
        "seed": "davae",
        "headVariant": [attributes.hair],
        "expressionVariant": [attributes.expression],
        "accessoriesVariant": [attributes.accessory or "glasses"],
        "accessoriesProbability": 100 if attributes.accessory else 0,
        "facialHairVariant": [attributes.facial_hair or "full"],
        "facialHairProbability": 100 if attributes.facial_hair else 0,
        "maskProbability": 0,
        "skinColor": [SKIN_COLORS[attributes.skin]],
        "headContrastColor": [HAIR_COLORS[attributes.hair_color] if attributes.hair_color else INK],
        "clothingColor": [SHIRT_MARK],
        "backgroundColor": [BACKGROUND_COLORS[attributes.background]],
    }
    packages = _packages()
    svg = packages["avatar"](packages["style"], options).to_string()

    left, top, side = CROP
    canvas = 'viewBox="0 0 704 704"'
    assert canvas in svg, "the style's canvas has changed"
    svg = svg.replace(canvas, f'viewBox="{left} {top} {side} {side}" width="{size}" height="{size}"', 1)

    # DiceBear knows one colour for hat and shirt. The hat stands among the definitions, the shirt behind them.
    shirt = SHIRT_COLORS[attributes.shirt]
    hat = SHIRT_COLORS[attributes.hat_color] if attributes.hat_color else shirt
    definitions, body = svg.split("</defs>", 1)
    return definitions.replace(SHIRT_MARK, hat) + "</defs>" + body.replace(SHIRT_MARK, shirt)


@cache
def _packages() -> dict[str, Any]:
    """The packages that draw, and the style; they are an extra."""
    try:
        import resvg
        from dicebear import Avatar, Style

        definition = files("dicebear_styles").joinpath("open-peeps.json").read_text("utf-8")
    except ImportError as error:
        raise SettingsError(f"drawing avatars needs {error.name}: pip install '{EXTRA}'") from error
    return {"resvg": resvg, "avatar": Avatar, "style": Style(json.loads(definition))}
