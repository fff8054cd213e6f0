"""A picture that fails in training after it was found sound: the next of its bucket takes its place, up to a limit."""

from pathlib import Path

import pytest
import torch

from data.stored import fill, picture
from davae.data import sources
from davae.data.buckets import bucket_table
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError
from davae.run import faults
from davae.run.ranks import Ranks
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import load_crops

WIDE, TALL = (96, 64), (64, 96)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six wide pictures and four tall ones, in turn as long as there are both."""
    sides = [WIDE, TALL] * 4 + [WIDE, WIDE]
    return fill(tmp_path / "set", {f"{index}.png": picture(index, *side) for index, side in enumerate(sides)})


@pytest.fixture
def reopen(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Opens the set while all of it is sound, decoded at every use."""
    monkeypatch.setattr(sources, "MEMORY_BYTES", 0)

    def reopen(max_unreadable: float = 0.3) -> PictureSet:
        buckets = bucket_table([64], ["3:2", "2:3"], multiple=16)
        return open_pictures(folder, size=64, captions=False, buckets=buckets).sound(max_unreadable=max_unreadable)

    return reopen


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def test_the_next_of_the_bucket_takes_the_place_on_every_rank(folder: Path, reopen, caplog) -> None:
    pictures, other = reopen(), reopen()
    wide, tall = sorted(pictures.members, key=len, reverse=True)
    assert (len(wide), len(tall)) == (6, 4)
    damage(folder / "2.png")
    (folder / "9.png").unlink()
    (folder / "7.png").write_bytes(picture(70, *TALL))  # sound, but not the picture that was listed

    # 2 gives way to 4; 9, the last of its bucket, to the first one; 7 to the first tall one.
    expected = pictures.batch([4, 0, 4, 0])
    assert torch.equal(pictures.batch_or_next([2, 0, 4, 9]), expected)
    assert torch.equal(pictures.batch_or_next([7, 5]), pictures.batch([1, 5]))
    assert pictures.stand_ins == {2: 4, 9: 0, 7: 1}
    for name in ("2.png: shorter than", "9.png", "7.png: other bytes"):
        assert caplog.text.count(name) == 1
    assert "number 3 of 10 so far" in caplog.text

    # Another rank has other pictures of the batch, and replaces them by the same.
    assert torch.equal(other.batch_or_next([9, 2]), expected[[3, 0]])
    assert torch.equal(pictures.batch_or_next([2, 9]), expected[[0, 3]])


def test_beyond_the_allowed_share_the_run_stops(folder: Path, reopen) -> None:
    pictures = reopen(max_unreadable=0.2)
    damage(folder / "0.png")
    damage(folder / "2.png")
    pictures.batch_or_next([0])
    assert len(pictures.stand_ins) == 2
    damage(folder / "4.png")
    pictures.batch_or_next([4])  # three are allowed in any set of six or more
    damage(folder / "6.png")
    with pytest.raises(
        DataError, match=r"4 of 10 pictures cannot be read any more, .*20.0% \(max_unreadable\).*6\.png"
    ):
        pictures.batch_or_next([6])


def test_a_bucket_without_a_picture_and_a_disk_that_fails_stop_the_run(folder: Path, reopen) -> None:
    pictures = reopen(max_unreadable=1.0)
    try:
        faults.arm("read:eio:*")
        with pytest.raises(DataError, match="look at its disk or mount"):
            pictures.batch_or_next([0])
    finally:
        faults.arm("")
    assert not pictures.stand_ins
    for name in "1357":
        damage(folder / f"{name}.png")
    with pytest.raises(DataError, match="no picture of 3's size can be read any more"):
        pictures.batch_or_next([3])


def test_stage_one_trains_on_the_picture_that_takes_the_place(folder: Path, reopen) -> None:
    recipe = AutoencoderRecipe(size=64, crop=32, batch_size=2, seed=3)
    pictures = reopen()
    names, crops = load_crops(recipe, pictures, Ranks(), 0)
    damage(folder / f"{names[0]}.png")
    again, others = load_crops(recipe, pictures, Ranks(), 0)
    assert again == names
    assert not torch.equal(others[0], crops[0])
    assert torch.equal(others[1], crops[1])
