"""Which colours of a prompt the drawing style does not have: most hair styles and all beards are always black."""

from functools import cache

from davae.data.avatar_captions import read_words
from davae.data.avatars import BACKGROUND_COLORS, FACIAL_HAIR, HAIR, HAIR_COLORS, SHIRT_COLORS

COLORS = frozenset(["black", *HAIR_COLORS, *SHIRT_COLORS, *BACKGROUND_COLORS])
ANY = "{}"
"""Stands for a colour in a phrase."""
COLORS_OF = {"hair": tuple(HAIR_COLORS), "hat": tuple(SHIRT_COLORS), "": ("black",)}
"""The colours of a style, by `Hair.colored`."""

Phrase = tuple[str, ...]


@cache
def _phrases() -> dict[Phrase, frozenset[str]]:
    """Phrases in which a colour stands, as words with `ANY` for it, and the colours that they may have."""
    texts = [(phrase, style.colored) for style in HAIR.values() for phrase in style.phrases]
    texts += [(phrase, "") for phrase in FACIAL_HAIR.values()]

    phrases: dict[Phrase, frozenset[str]] = {}
    for text, colored in texts:
        words = [ANY if word == "black" else word for word in read_words(text.format("black"))[0]]
        colors = frozenset(COLORS_OF[colored])

        # A colour that is not named may stand before each word: "long red curls", "red long curls".
        places = [words] if ANY in words else [[*words[:at], ANY, *words[at:]] for at in range(len(words))]
        for place in map(tuple, places):
            phrases[place] = phrases.get(place, frozenset()) | colors
    return phrases


def find_missing_colors(prompt: str) -> list[str]:
    """Sentences about the colours of a prompt that its things cannot have; they come out in another colour.

    A colour belongs to the longest phrase around it that the captions know.
    """
    words, _ = read_words(prompt)
    longest = max(map(len, _phrases()))

    remarks = []
    for index, color in enumerate(words):
        if color not in COLORS:
            continue
        found: Phrase = ()
        for start in range(max(0, index - longest + 1), index + 1):
            for end in range(index + 1, min(len(words), start + longest) + 1):
                phrase = (*words[start:index], ANY, *words[index + 1 : end])
                if phrase in _phrases() and len(phrase) > len(found):
                    found = phrase
        if found and color not in _phrases()[found]:
            remarks.append(_describe(found, color))
    return remarks


def _describe(phrase: Phrase, color: str) -> str:
    thing = " ".join(phrase).replace(ANY, color)
    return f"the drawings have no {thing}, only {', '.join(sorted(_phrases()[phrase]))}"
