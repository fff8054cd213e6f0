import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from davae.errors import SettingsError
from davae.run.recipe import Recipe, load_recipe


class Optimiser(Recipe):
    """A table of the recipe below."""

    learning_rate: float = pydantic.Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two."""
    fused: bool = True
    """Whether one kernel does it all."""


class Sample(Recipe):
    """A recipe with every kind of value."""

    steps: int = pydantic.Field(ge=1, le=1000)
    """Optimiser steps."""
    title: str = "none"
    """What it is called."""
    pictures: Path | None = None
    """Where the pictures are."""
    crops: list[int] = pydantic.Field(default_factory=list)
    """Crop sizes in pixels."""
    optimiser: Optimiser = Optimiser()
    """The optimiser."""


def load(tmp_path: Path, text: str, overrides: dict[str, Any] | None = None) -> Sample:
    path = tmp_path / "sample.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(Sample, path, overrides or {})


def test_values_defaults_and_overrides(tmp_path):
    recipe = load(tmp_path, 'steps = 3\npictures = "a/b"\n[optimiser]\nlearning_rate = 1e-3\nbetas = [0.5, 0.9]\n')
    assert recipe.steps == 3
    assert recipe.pictures == Path("a/b")
    assert recipe.optimiser == Optimiser(learning_rate=1e-3, betas=(0.5, 0.9))
    changed = load(tmp_path, "steps = 3\n", {"steps": 4, "optimiser.fused": False})
    assert (changed.steps, changed.optimiser.fused, changed.title) == (4, False, "none")


def test_a_recipe_is_frozen_and_documented(tmp_path):
    recipe = load(tmp_path, "steps = 3\n")
    with pytest.raises(pydantic.ValidationError):
        recipe.steps = 4
    assert Sample.model_fields["crops"].description == "Crop sizes in pixels."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3\ntitel = 'x'", r'unknown key "titel": did you mean "title"\?$'),
        ("steps = 3\n[optimiser]\nlerning_rate = 1.0", r'"optimiser.lerning_rate": did you mean "learning_rate"'),
        ("steps = 3\nqqqqqqqq = 1", r'unknown key "qqqqqqqq": known keys here: steps'),
        ("title = 'x'", 'missing key "steps": it has no default'),
        ("steps = 0", 'key "steps" = 0: input should be greater than or equal to 1'),
        ("steps = 1001", 'key "steps" = 1001: input should be less than or equal to 1000'),
        ("steps = 3.0", 'key "steps" = 3.0: input should be a valid integer'),
        ("steps = '3'", "key \"steps\" = '3': input should be a valid integer"),
        ("steps = true", 'key "steps" = True: input should be a valid integer'),
        ("steps = 3\ncrops = [64, 'x']", "key \"crops.1\" = 'x': input should be a valid integer"),
        ("steps = 3\noptimiser = 5", 'key "optimiser" = 5: '),
        ("steps = 3\n[optimiser]\nlearning_rate = nan", 'key "optimiser.learning_rate" = nan: input should be'),
        (
            "steps = 3\n[optimiser]\nlearning_rate = inf",
            'key "optimiser.learning_rate" = inf: input should be a finite',
        ),
        ("steps = 3\n[optimiser]\nbetas = [0.5]", r'key "optimiser.betas" = \[0.5\]: too few values'),
        ("steps = 2026-11-24", 'key "steps" = '),
        ("steps = ", "no valid TOML: Invalid value"),
        ("steps = 3\nsteps = 4\ntitle = 0\n", "no valid TOML.*line 2"),
    ],
)
def test_mistakes_are_named_with_key_value_and_way_out(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load(tmp_path, text)
    assert "sample.toml" in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, "steps = 0\ntitel = 'x'\n[optimiser]\nfused = 1")
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stepps": 4}, 'unknown key "stepps": did you mean "steps"'),
        ({"optimiser.betta": 4}, 'unknown key "optimiser.betta": did you mean "betas"'),
        ({"steps.x": 4}, "steps in recipe .* is a value, not a table"),
        ({"steps": "many"}, "key \"steps\" = 'many'"),
    ],
)
def test_mistakes_in_overrides_are_named_too(tmp_path, overrides, message):
    with pytest.raises(SettingsError, match=message):
        load(tmp_path, "steps = 3\n", overrides)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.toml cannot be read: No such file"):
        load_recipe(Sample, tmp_path / "nowhere.toml")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load_recipe(Sample, tmp_path)
    (tmp_path / "picture.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="no valid TOML"):
        load_recipe(Sample, tmp_path / "picture.toml")


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
recipes = st.builds(
    Sample,
    steps=st.integers(1, 1000),
    title=words,
    pictures=st.none() | words.map(lambda word: Path("pictures") / re.sub(r"[\0/]", "", word)),
    crops=st.lists(st.integers(-(2**60), 2**60), max_size=4),
    optimiser=st.builds(
        Optimiser,
        learning_rate=finite.filter(lambda x: x > 0),
        betas=st.tuples(finite, finite),
        fused=st.booleans(),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes)
def test_every_recipe_survives_its_toml(tmp_path, recipe):
    path = tmp_path / "recipe.toml"
    path.write_bytes(recipe.to_toml().encode())
    again = load_recipe(Sample, path)
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_digests_tell_recipes_apart_and_nothing_else():
    plain = Sample(steps=3)
    assert plain.digest() == Sample(steps=3, title="none", optimiser=Optimiser(learning_rate=1e-4)).digest()
    others = [Sample(steps=4), Sample(steps=3, title=""), Sample(steps=3, optimiser=Optimiser(betas=(0.9, 0.99)))]
    assert len({plain.digest(), *(recipe.digest() for recipe in others)}) == 4


def test_a_setting_that_is_added_with_its_default_changes_no_digest():
    class Later(Sample):
        added: int = 3
        """New in a later version."""

    assert Later(steps=3).digest() == Sample(steps=3).digest() != Later(steps=3, added=4).digest()
