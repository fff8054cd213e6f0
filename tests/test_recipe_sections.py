"""One file for both stages."""

from pathlib import Path
from typing import ClassVar

import pytest

from davae.errors import SettingsError
from davae.run.recipe import Recipe, load_recipe, run_folder


class Weights(Recipe):
    l1: float = 1.0


class First(Recipe):
    section: ClassVar[str] = "autoencoder"
    base: str = ""
    autoencoder: str = ""
    size: int = 256
    steps: int = 1000
    loss: Weights = Weights()


class Second(Recipe):
    section: ClassVar[str] = "finetune"
    base: str = ""
    autoencoder: str = ""
    size: int = 256
    steps: int = 1000
    rank: int = 32


BOTH = """
base = "pair"
size = 64
[autoencoder]
steps = 3
[autoencoder.loss]
l1 = 2.0
[finetune]
autoencoder = "runs/a"
steps = 4
rank = 8
"""


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str) -> Path:
        path = tmp_path / "both.toml"
        path.write_text(text)
        return path

    return written


def test_each_stage_reads_its_section_and_what_is_shared(write) -> None:
    path = write(BOTH)
    assert load_recipe(First, path) == First(base="pair", size=64, steps=3, loss=Weights(l1=2.0))
    assert load_recipe(Second, path) == Second(base="pair", size=64, autoencoder="runs/a", steps=4, rank=8)


def test_overrides_name_the_recipes_own_keys(write) -> None:
    changed = load_recipe(First, write(BOTH), {"size": 32, "loss.l1": 0.5, "autoencoder": "runs/b"})
    assert changed == First(base="pair", size=32, steps=3, autoencoder="runs/b", loss=Weights(l1=0.5))


def test_a_plain_file_is_read_as_before(write) -> None:
    path = write('autoencoder = "runs/a"\nsteps = 3\n[loss]\nl1 = 0.1\n')
    assert load_recipe(First, path) == First(autoencoder="runs/a", steps=3, loss=Weights(l1=0.1))
    assert load_recipe(First, write("")) == First()


def test_a_section_by_itself_is_enough_for_its_stage(write) -> None:
    assert load_recipe(Second, write("[finetune]\nrank = 2\n")) == Second(rank=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[finetune]\nrank = 2\n", r"no section \[autoencoder\], only \[finetune\]"),
        ("[autoencoder]\n[finetun]\n", r"unknown section \[finetun\]: did you mean \[finetune\]\?"),
        ("[autoencoder]\n[loss]\nl1 = 1.0\n", r"unknown section \[loss\]: allowed are \[autoencoder\], \[finetune\]"),
        ("steps = 3\n[autoencoder]\n", r'"steps" stands above the sections, where only base, .* into \[autoencoder\]'),
        ("size = 3\n[autoencoder]\nsize = 3\n", r'"size" is given above the sections and in \[autoencoder\]'),
        ("[autoencoder]\nrank = 3\n", r'unknown key "rank"'),
        ("limit = 3\n[autoencoder]\n", r'unknown key "limit"'),
        ("[autoencoder]\nsteps = 'x'\n", "key \"steps\" = 'x': input should be a valid integer"),
    ],
)
def test_mistakes_in_sections_are_named(write, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_recipe(First, write(text))
    assert "both.toml" in str(caught.value)


def test_the_stages_of_one_file_have_folders_of_their_own(write) -> None:
    assert run_folder(First, write(BOTH)) == Path("runs/both/autoencoder")
    assert run_folder(Second, write(BOTH)) == Path("runs/both/finetune")
    assert run_folder(First, write("steps = 3\n")) == Path("runs/both")


def test_a_run_does_not_write_over_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("steps = 3\n")
    with pytest.raises(SettingsError, match="would write over"):
        run_folder(First, path, tmp_path)
    (tmp_path / "environment.json").touch()  # the folder of a run, which goes on
    assert run_folder(First, path, tmp_path) == tmp_path
