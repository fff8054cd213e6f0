"""Captions of avatars, as a person may write them, and the words that the small pair knows.

A caption is a list or a sentence, in any order, with all or only some of the attributes; `full_caption` names all of
them, so that it fixes the image. "woman" and "man" have a meaning: a hair style belongs to one of them or to both, and
only men have facial hair. Who has a style of both and no facial hair is called either. "person" is always right.

The vocabulary is fixed. `read_words` says which words of a prompt the models know and which they ignore.
"""

import random
import re
from functools import cache

from davae.data.avatars import (
    ACCESSORIES,
    BACKGROUND_COLORS,
    EXPRESSIONS,
    FACIAL_HAIR,
    HAIR,
    HAIR_COLORS,
    SHIRT_COLORS,
    SKIN_COLORS,
    Attributes,
)

ABSENCE_SHARE = 0.1
"""Of the captions that could say "no glasses" or "no beard", those that do."""

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
    "grumpy": "angry",
    "cross": "angry",
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


FILLERS = frozenset(
    "a an the with and of in on at to is are has have who wearing wears his her their front portrait drawing avatar "
    "picture image photo".split()
)
"""Words without a meaning of their own here: the models do not see them, and nobody misses them."""


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
    return ", ".join(parts) or _person(attributes, draw)


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
    """The phrase behind "a" or "an", unless its last word is a plural, "hair" or "skin", or it begins with "no"."""
    last = phrase.split()[-1]
    if last in ("hair", "skin") or last.endswith("s") or phrase.startswith("no "):
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


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
    """The words of a prompt that the models know, with synonyms replaced, and those of a meaning that they ignore."""
    known: list[str] = []
    ignored = []
    for word in re.findall(r"[a-z]+", prompt.lower()):
        replaced = SYNONYMS.get(word, word).split()
        if set(replaced) <= set(vocabulary()):
            known += replaced
        elif word not in FILLERS:
            ignored.append(word)
    return known, ignored
