"""Avatars from words: attributes, caption and image as pure functions of a number.

Every image is an Open Peeps portrait (Pablo Stanley, CC0 1.0), composed by DiceBear and rendered from vectors by resvg,
so that any size holds true detail. The caption names the attributes, so a full caption fixes the image.

    attributes = draw_attributes(7)
    image = draw_image(attributes, 256)
    words = caption(attributes, random.Random("7"))

"woman" and "man" have a meaning here: a hair style belongs to one of them or to both, and only men have facial hair.
A person whose style belongs to both and who has no facial hair is called either, or "person".

One pair of (hair, expression) in ten is held out by `is_held_out`. No training may see such a pair.
"""

import hashlib
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from PIL import Image

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

ABSENCE_SHARE = 0.1
"""Of the captions that could say "no glasses" or "no beard", those that do."""


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
    number = start
    while True:
        if is_held_out(draw_attributes(number)) == held_out:
            yield number
        number += 1


# --- captions


def full_caption(attributes: Attributes) -> str:
    """All attributes in one fixed order, as a list: the caption that fixes the image."""
    return ", ".join([EXPRESSIONS[attributes.expression], *_phrases(attributes).values()])


def caption(attributes: Attributes, draw: random.Random, *, completeness: float | None = None) -> str:
    """A caption as a person may write it: a list or a sentence, in any order, with all or only some of the attributes.

    Args:
        attributes: of the image.
        draw: the random numbers that choose the words.
        completeness: the probability of each part to be named; by default all are in seven captions of ten.
    """
    if completeness is None:
        completeness = 1.0 if draw.random() < 0.7 else draw.uniform(0.2, 0.9)
    named = _phrases(attributes, draw)
    if not attributes.accessory and draw.random() < ABSENCE_SHARE:
        named["accessory"] = "no glasses"
    if not attributes.facial_hair and HAIR[attributes.hair].person != "woman" and draw.random() < ABSENCE_SHARE:
        named["facial hair"] = "no beard"
    phrases = {name: words for name, words in named.items() if draw.random() < completeness}
    expression = EXPRESSIONS[attributes.expression] if draw.random() < completeness else ""

    if draw.random() < 0.4:
        return _as_list(attributes, expression, phrases, draw)
    return _as_sentence(attributes, expression, phrases, draw)


def _phrases(attributes: Attributes, draw: random.Random | None = None) -> dict[str, str]:
    """The parts of a caption behind the expression, in the fixed order; without `draw`, the hair's first phrase."""
    style = HAIR[attributes.hair]
    color = attributes.hair_color or attributes.hat_color or ""
    phrase = style.phrases[0]
    if draw is not None and draw.random() < 0.5:
        phrase = draw.choice(style.phrases)

    phrases = {"hair": phrase.format(color)}
    if attributes.accessory:
        phrases["accessory"] = ACCESSORIES[attributes.accessory]
    if attributes.facial_hair:
        phrases["facial hair"] = FACIAL_HAIR[attributes.facial_hair]
    phrases["skin"] = f"{attributes.skin} skin"
    phrases["shirt"] = f"{attributes.shirt} shirt"
    phrases["background"] = f"{attributes.background} background"
    return phrases


def _person(attributes: Attributes, draw: random.Random) -> str:
    """Who it is; "person" is always right."""
    who = HAIR[attributes.hair].person
    if who == "both":
        who = "man" if attributes.facial_hair else draw.choice(("woman", "man"))
    return draw.choice((who, who, "person"))


def _as_list(attributes: Attributes, expression: str, phrases: dict[str, str], draw: random.Random) -> str:
    parts = [expression] if expression else []
    if draw.random() < 0.5:
        parts = [" ".join([*parts, _person(attributes, draw)])]
    parts += phrases.values()
    if draw.random() < 0.4:
        draw.shuffle(parts)
    return ", ".join(parts)


def _as_sentence(attributes: Attributes, expression: str, phrases: dict[str, str], draw: random.Random) -> str:
    """For example "portrait of a laughing woman with red curls and round glasses, pale skin, in a blue shirt"."""
    opening = draw.choice(("", "", "portrait of ", "drawing of ", "avatar of "))
    person = _person(attributes, draw)
    has = [_with_article(phrases[name]) for name in ("hair", "accessory", "facial hair") if name in phrases]
    if "skin" in phrases:
        has.append(phrases["skin"])
    if draw.random() < 0.4:
        draw.shuffle(has)

    sentence = opening + _with_article(f"{expression} {person}".strip())
    if has:
        *first, last = has
        sentence += " with " + (", ".join(first) + " and " + last if first else last)

    clothes = draw.choice(("in a", "wearing a")) + f" {phrases['shirt']}" if "shirt" in phrases else ""
    ground = draw.choice(("on a", "in front of a")) + f" {phrases['background']}" if "background" in phrases else ""
    ends = [part for part in (clothes, ground) if part]
    if draw.random() < 0.3:
        ends.reverse()
    return ", ".join([sentence, *ends]) if draw.random() < 0.5 else " ".join([sentence, *ends])


def _with_article(phrase: str) -> str:
    """The phrase behind "a" or "an", unless its last word is a plural, "hair" or "skin"."""
    last = phrase.split()[-1]
    if last in ("hair", "skin") or (last.endswith("s") and last != "bangs") or phrase.startswith("no "):
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# --- words

PEOPLE = ("woman", "man", "person")

SYNONYMS = {
    "lady": "woman",
    "girl": "woman",
    "female": "woman",
    "women": "woman",
    "guy": "man",
    "boy": "man",
    "male": "man",
    "men": "man",
    "gentleman": "man",
    "without": "no",
    "someone": "person",
    "human": "person",
    "blond": "blonde",
    "golden": "blonde",
    "ginger": "red",
    "redhead": "red hair",
    "grey": "gray",
    "silver": "gray",
    "brunette": "brown hair",
    "violet": "purple",
    "lilac": "purple",
    "lavender": "purple",
    "rose": "pink",
    "magenta": "pink",
    "teal": "blue",
    "sky": "blue",
    "navy": "blue",
    "crimson": "red",
    "fair": "pale",
    "light": "pale",
    "tanned": "tan",
    "olive": "bronze",
    "spectacles": "glasses",
    "eyeglasses": "glasses",
    "shades": "sunglasses",
    "patch": "eyepatch",
    "mustache": "moustache",
    "bearded": "beard",
    "stubble": "beard",
    "bushy": "big",
    "full": "big",
    "large": "big",
    "huge": "big",
    "cap": "beanie",
    "ponytails": "pigtails",
    "plaits": "braids",
    "braid": "braids",
    "braided": "braids",
    "curl": "curls",
    "curly": "curls",
    "waves": "wavy",
    "dreads": "dreadlocks",
    "locs": "dreadlocks",
    "knot": "knots",
    "knotted": "knots",
    "twisted": "twists",
    "spiky": "spikes",
    "spiked": "spikes",
    "fringe": "bangs",
    "shaved": "buzz",
    "hairless": "bald",
    "hairy": "hair",
    "headscarf": "hijab",
    "fedora": "hat",
    "tshirt": "shirt",
    "sweater": "shirt",
    "pullover": "shirt",
    "backdrop": "background",
    "happily": "happy",
    "content": "happy",
    "calm": "happy",
    "joyful": "laughing",
    "laughs": "laughing",
    "laugh": "laughing",
    "crying": "sad",
    "smile": "smiling",
    "smiles": "smiling",
    "grin": "grinning",
    "grins": "grinning",
    "mad": "angry",
    "annoyed": "angry",
    "enraged": "furious",
    "raging": "furious",
    "shouting": "furious",
    "screaming": "furious",
    "sleepy": "sleeping",
    "asleep": "sleeping",
    "exhausted": "tired",
    "unhappy": "sad",
    "sorrowful": "sad",
    "afraid": "scared",
    "frightened": "scared",
    "fearful": "scared",
    "anxious": "worried",
    "concerned": "worried",
    "nervous": "stressed",
    "surprised": "amazed",
    "astonished": "amazed",
    "love": "loving",
    "enamoured": "loving",
    "speaking": "talking",
    "winking": "cheeky",
    "skeptical": "suspicious",
    "sceptical": "suspicious",
    "proud": "smug",
    "arrogant": "smug",
    "stern": "serious",
    "resolute": "determined",
}
"""Words that stand for words of the vocabulary; the tokenizers replace them, so that no training is needed."""


@cache
def vocabulary() -> tuple[str, ...]:
    """The words that the models know, sorted: every word that names an attribute, a person, or "no"."""
    texts = [*PEOPLE, "no", "black", "skin", "shirt", "background"]
    texts += [phrase.replace("{}", "") for style in HAIR.values() for phrase in style.phrases]
    texts += [*EXPRESSIONS.values(), *ACCESSORIES.values(), *FACIAL_HAIR.values()]
    texts += [*HAIR_COLORS, *SKIN_COLORS, *SHIRT_COLORS, *BACKGROUND_COLORS]
    words = {word for text in texts for word in text.split()} - {"a", "in"} - set(SYNONYMS)
    return tuple(sorted(words))


def read_words(prompt: str) -> tuple[list[str], list[str]]:
    """The words of a prompt that the models know, with synonyms replaced, and those that they ignore."""
    known, ignored = [], []
    for word in re.findall(r"[a-z]+", prompt.lower()):
        replaced = SYNONYMS.get(word, word).split()
        (known.extend(replaced) if set(replaced) <= set(vocabulary()) else ignored.append(word))
    return known, ignored


# --- images


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


def image_pixels(attributes: Sequence[Attributes], size: int) -> list[bytes]:
    """RGB bytes of several images, rows from the top."""
    return [draw_image(each, size).tobytes() for each in attributes]
