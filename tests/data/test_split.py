"""The held-out pictures: about one in ten, equal pictures together, whatever a table's rows are numbered."""

import random
from pathlib import Path

import pytest

from data.stored import fill, picture
from davae.data.pictures import Refusal
from davae.data.sources import PictureSet, open_pictures
from davae.data.split import find_equal, heldout
from davae.data.stored import CellBytes


def contents(pictures: PictureSet) -> set[str]:
    return {pictures.fingerprint(index) for index in range(len(pictures))}


def halves(source: Path) -> tuple[PictureSet, PictureSet]:
    first, second = (open_pictures(source, size=32, split=split, captions=False) for split in ("train", "heldout"))
    return first, second


def test_equal_pictures_stay_together(tmp_path: Path) -> None:
    """Every picture three times, under names of which some are held out and some are not."""
    files = {f"{copy}/{index:03d}.png": picture(index) for copy in "abc" for index in range(20)}
    train, held_out = halves(fill(tmp_path, files))
    assert len(train) + len(held_out) == 60
    assert contents(train).isdisjoint(contents(held_out))
    assert held_out.keys == sorted(f"{copy}/{n:03d}" for copy in "abc" for n in range(20) if heldout(f"a/{n:03d}"))
    assert held_out.keys
    former = open_pictures(tmp_path, size=32, split="heldout", captions=False, keys_alone=True)
    assert former.keys == [key for key in sorted([*train.keys, *held_out.keys]) if heldout(key)] != held_out.keys


def test_a_table_that_is_written_anew_keeps_its_split(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets", reason="the extra datasets")
    from pyarrow import parquet

    rows = [{"image": {"bytes": picture(index), "path": None}} for index in range(40)]
    splits = []
    for name in ("once", "anew"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        splits.append([contents(half) for half in halves(tmp_path / f"{name}.parquet")])
        random.Random(0).shuffle(rows)
    assert splits[0] == splits[1]
    assert all(splits[0])


def test_equal_bytes_are_found_behind_equal_lengths_and_beginnings() -> None:
    long = bytes(1 << 16)
    data = {"a": b"x", "b": b"y", "c": b"x", "d": long, "e": long[:-1] + b"1", "f": long, "g": long[:-1]}
    cells = {key: CellBytes(key, lambda value=value: value) for key, value in data.items()}
    assert find_equal(cells) == [["a", "c"], ["d", "f"]]


def test_pictures_that_are_all_equal_are_split_by_their_keys(tmp_path: Path) -> None:
    train, held_out = halves(fill(tmp_path, {f"{index}.png": picture(0) for index in range(4)}))
    assert (len(train), len(held_out)) == (3, 1)
    assert not [each for each in (*train.refused, *held_out.refused) if isinstance(each, Refusal)]
