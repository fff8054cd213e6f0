import itertools
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from davae.data import avatars
from davae.data.avatar_captions import (
    ABSENCE_SHARE,
    SYNONYMS,
    caption,
    full_caption,
    read_words,
    vocabulary,
)
from davae.data.avatar_colors import find_missing_colors
from davae.data.avatars import Attributes, draw_attributes, draw_image, image_key, is_held_out, numbers
from davae.data.split import heldout
from davae.errors import SettingsError

LONGEST_CAPTION = 16
"""In words that the models know."""

pytest.importorskip("resvg", reason="drawing avatars needs davae[demo]")


def pixels(attributes: Attributes, size: int = 48) -> np.ndarray:
    return np.asarray(draw_image(attributes, size)).astype(int)


def test_a_number_fixes_attributes_and_image() -> None:
    assert draw_attributes(7) == draw_attributes(7)
    assert draw_image(draw_attributes(7), 64).tobytes() == draw_image(draw_attributes(7), 64).tobytes()
    assert len({draw_attributes(number) for number in range(200)}) > 195


def test_attributes_stay_as_they_were() -> None:
    """A change here makes other images of the same numbers, and the shipped weights' training data cannot be had."""
    assert draw_attributes(0) == Attributes(
        "longBangs", "driven", None, None, None, None, skin="tan", shirt="white", background="white"
    )
    assert full_caption(draw_attributes(3)) == "scared, pink bob, bronze skin, white shirt, blue background"
    assert list(itertools.islice(numbers(held_out=True), 3)) == [1, 14, 15]


@pytest.mark.parametrize("size", [16, 128, 250])
def test_an_image_has_the_size_that_was_asked_for(size: int) -> None:
    image = draw_image(draw_attributes(5), size)
    assert image.size == (size, size)
    assert image.mode == "RGB"


def test_a_large_image_is_the_small_one_with_more_detail() -> None:
    attributes = draw_attributes(11)
    large = pixels(attributes, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(large - pixels(attributes, 64)).mean() < 2


@pytest.mark.parametrize("name", ["accessory", "facial_hair", "skin", "shirt", "background"])
def test_every_value_of_an_attribute_shows(name: str) -> None:
    tables = {
        "accessory": [None, *avatars.ACCESSORIES],
        "facial_hair": [None, *avatars.FACIAL_HAIR],
        "skin": avatars.SKIN_COLORS,
        "shirt": avatars.SHIRT_COLORS,
        "background": avatars.BACKGROUND_COLORS,
    }
    base = Attributes("short5", "smile", None, None, None, None, skin="tan", shirt="red", background="gray")
    images = [pixels(Attributes(**{**base.__dict__, name: value})) for value in tables[name]]
    for one, other in itertools.combinations(images, 2):
        assert np.abs(one - other).max() > 20


def test_a_hat_has_another_colour_than_the_shirt() -> None:
    base = {"expression": "smile", "accessory": None, "facial_hair": None, "hair_color": None, "skin": "tan"}
    red = Attributes("hatBeanie", hat_color="red", shirt="green", background="white", **base)
    blue = Attributes("hatBeanie", hat_color="blue", shirt="green", background="white", **base)
    changed = np.abs(pixels(red) - pixels(blue)).max(axis=2) > 20
    assert changed[:24].any()
    assert not changed[40:].any()


def test_the_variants_exist_in_the_style() -> None:
    style = avatars._packages()["style"]
    components = style.components()
    for name, table in {
        "head": avatars.HAIR,
        "expression": avatars.EXPRESSIONS,
        "accessories": avatars.ACCESSORIES,
        "facialHair": avatars.FACIAL_HAIR,
    }.items():
        assert set(table) <= set(components[name].variants()), name


def test_held_out_pairs_are_never_trained_on() -> None:
    trained = [draw_attributes(number) for number in itertools.islice(numbers(held_out=False), 3000)]
    held_out = [draw_attributes(number) for number in itertools.islice(numbers(held_out=True), 300)]
    pairs = {(one.hair, one.expression) for one in trained}
    assert not pairs & {(one.hair, one.expression) for one in held_out}

    # Each value of either attribute is trained on, so that only the combination is new.
    assert {hair for hair, _ in pairs} == set(avatars.HAIR)
    assert {expression for _, expression in pairs} == set(avatars.EXPRESSIONS)


def test_one_pair_in_ten_is_held_out() -> None:
    base = draw_attributes(0)
    pairs = list(itertools.product(avatars.HAIR, avatars.EXPRESSIONS))
    out = [is_held_out(Attributes(**{**base.__dict__, "hair": h, "expression": e})) for h, e in pairs]
    assert 0.07 < sum(out) / len(pairs) < 0.13


def test_the_split_by_key_is_the_split_by_pair() -> None:
    keys = [image_key(number) for number in range(300)]
    assert [heldout(key) for key in keys] == [is_held_out(draw_attributes(number)) for number in range(300)]
    assert keys == sorted(keys)


def test_the_distribution_is_that_of_the_tables() -> None:
    drawn = [draw_attributes(number) for number in range(4000)]
    hair = Counter(one.hair for one in drawn)
    plain = [hair[name] for name, style in avatars.HAIR.items() if not style.colored]
    colored = [hair[name] for name, style in avatars.HAIR.items() if style.colored]
    assert 1.6 < (sum(colored) / len(colored)) / (sum(plain) / len(plain)) < 2.4
    assert min(hair.values()) > 40
    assert min(Counter(one.expression for one in drawn).values()) > 120

    assert abs(sum(one.accessory is not None for one in drawn) / 4000 - avatars.ACCESSORY_SHARE) < 0.03
    assert not any(one.facial_hair for one in drawn if avatars.HAIR[one.hair].person == "woman")
    for one in drawn:
        assert (one.hair_color is not None) == (avatars.HAIR[one.hair].colored == "hair")
        assert (one.hat_color is not None) == (avatars.HAIR[one.hair].colored == "hat")


def test_captions_are_made_of_the_vocabulary() -> None:
    seen, longest = set(), 0
    for number in range(3000):
        known, ignored = read_words(caption(draw_attributes(number), random.Random(number)))
        assert known
        assert not ignored
        seen |= set(known)
        longest = max(longest, len(known))
    assert seen == set(vocabulary())
    assert longest <= LONGEST_CAPTION


def test_a_full_caption_names_all_attributes() -> None:
    """Two images that differ have full captions that differ."""
    captions: dict[str, Attributes] = {}
    for number in range(3000):
        attributes = draw_attributes(number)
        assert captions.setdefault(full_caption(attributes), attributes) == attributes


def test_captions_vary() -> None:
    attributes = draw_attributes(4)
    captions = {caption(attributes, random.Random(number)) for number in range(100)}
    assert len(captions) > 60
    assert len({len(read_words(words)[0]) for words in captions}) > 5
    assert caption(attributes, random.Random(5)) == caption(attributes, random.Random(5))


def test_captions_say_what_is_not_there_and_only_then() -> None:
    negative = 0
    for number in range(2000):
        attributes = draw_attributes(number)
        words = caption(attributes, random.Random(number))
        if "no glasses" in words:
            negative += 1
            assert attributes.accessory is None
        assert "no beard" not in words or attributes.facial_hair is None
    assert 0 < negative / 2000 < ABSENCE_SHARE


@pytest.mark.parametrize(
    ("prompt", "known", "ignored"),
    [
        ("a laughing woman with red curls", ["laughing", "woman", "red", "curls"], []),
        ("Laughing LADY, ginger-curls!", ["laughing", "woman", "red", "curls"], []),
        ("a redhead without spectacles", ["red", "hair", "no", "glasses"], []),
        ("a unicorn", [], ["unicorn"]),
        ("", [], []),
    ],
)
def test_words_of_a_prompt(prompt: str, known: list[str], ignored: list[str]) -> None:
    assert read_words(prompt) == (known, ignored)


def test_synonyms_stand_for_words_of_the_vocabulary() -> None:
    for word, replacement in SYNONYMS.items():
        assert word not in vocabulary()
        assert set(replacement.split()) <= set(vocabulary()), word


@pytest.mark.parametrize("phrase", ["a beard", "an eyepatch", "a buzz cut", "red curls", "bangs", "a big afro"])
def test_articles_stand_where_english_wants_them(phrase: str) -> None:
    from davae.data.avatar_captions import _with_article

    bare = phrase.removeprefix("an ").removeprefix("a ")
    assert _with_article(bare) == phrase


def test_size_must_be_positive() -> None:
    with pytest.raises(SettingsError, match="size=0"):
        draw_image(draw_attributes(0), 0)


@pytest.mark.parametrize("missing", ["resvg", "dicebear", "dicebear_styles"])
def test_without_the_extra_the_error_says_how_to_install_it(missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from davae.data.avatars import draw_attributes, draw_image
from davae.errors import SettingsError
try:
    draw_image(draw_attributes(0), 32)
except SettingsError as error:
    assert "davae[demo]" in str(error) and {missing!r} in str(error), error
else:
    raise AssertionError("drawn")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("a person with a red afro", ["red afro, only black"]),
        ("pink long hair, blue shirt", ["pink long hair, only black"]),
        ("a long, curly red hair", ["long curls red hair, only black"]),
        ("white beard and a green mohawk", ["white beard, only", "green mohawk, only blonde, blue, brown, gray"]),
        ("a black mohawk and a black beanie", ["black mohawk, only blonde", "black beanie, only blue, green"]),
        ("a boy with short red hair on a blue background", []),
        ("curly red hair, pale skin", []),
        ("orange turban, blue hair", []),
    ],
)
def test_colors_that_a_thing_never_has_are_named(prompt: str, things: list[str]) -> None:
    remarks = find_missing_colors(prompt)
    assert len(remarks) == len(things)
    for remark, thing in zip(remarks, things, strict=True):
        assert f"the drawings have no {thing}" in remark


def test_no_caption_has_a_color_that_its_things_never_have() -> None:
    for number in range(500):
        attributes = draw_attributes(number)
        for text in (full_caption(attributes), caption(attributes, random.Random(number))):
            assert find_missing_colors(text) == [], text
