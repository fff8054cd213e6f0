"""Sets of avatars on disk."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from davae.data import avatars
from davae.data.avatar_captions import full_caption
from davae.data.avatar_shards import write_avatar_shards
from davae.data.sources import open_pictures
from davae.errors import SettingsError

pytest.importorskip("resvg", reason="drawing avatars needs davae[demo]")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_avatar_shards(tmp_path_factory.mktemp("work") / "shards", training=8, held_out=4, size=64)


@pytest.mark.parametrize(("split", "held_out", "count"), [("train", False, 8), ("heldout", True, 4)])
def test_the_shards_hold_out_what_no_training_sees(shards: Path, split: str, held_out: bool, count: int) -> None:
    pictures = open_pictures(shards, size=64, split=split)
    drawn = [avatars.draw_attributes(number) for number in islice(avatars.numbers(held_out=held_out), count)]
    assert len(pictures) == count
    for index, attributes in enumerate(drawn):
        image = np.asarray(avatars.draw_image(attributes, 64)).transpose(2, 0, 1)
        assert np.array_equal(pictures.image(index).numpy(), image)
        assert pictures.captions[index]
    if held_out:
        assert list(pictures.captions) == [full_caption(attributes) for attributes in drawn]


def test_a_set_that_was_cut_short_is_finished_with_the_same_bytes(shards: Path) -> None:
    files = {path: path.read_bytes() for path in shards.iterdir()}
    for path in files:
        if path.suffix == ".tar":
            path.unlink()
    write_avatar_shards(shards, training=8, held_out=4, size=64)
    assert {path: path.read_bytes() for path in shards.iterdir()} == files


def test_another_start_draws_other_people(shards: Path, tmp_path: Path) -> None:
    other = write_avatar_shards(tmp_path / "other", training=8, held_out=4, size=64, start=1000)
    keys = [set(open_pictures(folder, size=64).keys) for folder in (shards, other)]
    assert not keys[0] & keys[1]


def test_a_folder_with_something_else_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'size': 64.*not.*'size': 32"):
        write_avatar_shards(shards, training=8, held_out=4, size=32)
    (tmp_path / "mine").touch()
    with pytest.raises(SettingsError, match=r"is not empty and has no avatars.json"):
        write_avatar_shards(tmp_path, training=8, held_out=4, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
