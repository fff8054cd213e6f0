"""Classes of pictures: where their numbers come from, and what is refused."""

import pytest

from data.stored import digest, fill, picture, reasons, tar
from davae.data.sources import open_pictures
from davae.data.split import heldout
from davae.errors import DataError


def numbered(*numbers: str) -> dict[str, bytes]:
    files = {f"{index:03d}.png": picture(index) for index in range(len(numbers))}
    return files | {f"{index:03d}.cls": number.encode() for index, number in enumerate(numbers)}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_numbers_are_those_beside_the_pictures(tmp_path, kind):
    files = numbered("7", " 0\n", "12")
    files |= {"003.png": picture(3), "003.json": b'{"class": 5, "caption": "a cat"}'}
    files |= {"004.png": picture(4), "004.cls": b"1", "004.json": b'{"class": 9}'}  # the .cls goes first
    source = fill(tmp_path / "pictures", files) if kind == "folder" else tar(tmp_path / "a.tar", files)
    pictures = open_pictures(source, size=32, classes=True)
    assert pictures.keys == ["000", "001", "002", "003", "004"]
    assert pictures.classes == [7, 0, 12, 5, 1]
    assert pictures.captions == ["", "", "", "a cat", ""]
    assert pictures.class_names == []
    assert pictures.refused == []


def test_sub_folders_are_classes_in_sorted_order_whatever_the_split(tmp_path):
    names = ["cat", "ant", "dog"]
    keys = [f"{name}/{index}" for name in names for index in range(8)] + ["bat/deep/0"]
    files = {f"{key}.png": picture(index) for index, key in enumerate(keys)}
    fill(tmp_path, files | {"empty/readme.txt": b"no picture"})
    whole = open_pictures(tmp_path, size=32, classes=True)
    numbers = {"ant": 0, "bat": 1, "cat": 2, "dog": 3}
    assert whole.class_names == list(numbers)
    assert whole.classes == [numbers[key.partition("/")[0]] for key in whole.keys]
    for split in ("train", "heldout"):
        part = open_pictures(tmp_path, size=32, split=split, limit=3, classes=True)
        assert part.class_names == whole.class_names
        assert part.classes == [numbers[key.partition("/")[0]] for key in part.keys]
        assert all(heldout(key) == (split == "heldout") for key in part.keys)


def test_numbered_sub_folders_are_classes_in_the_order_of_their_numbers(tmp_path, caplog):
    names = [str(number) for number in range(12)]
    fill(tmp_path / "set", {f"{name}/0.png": picture(0) for name in names})
    pictures = open_pictures(tmp_path / "set", size=32, classes=True)
    assert pictures.class_names == names
    assert dict(zip(pictures.keys, pictures.classes, strict=True)) == {f"{name}/0": int(name) for name in names}
    assert caplog.messages == []

    # The order that a run recorded stays, as long as the folders are the same.
    recorded = sorted(names)
    assert open_pictures(tmp_path / "set", size=32, classes=True, class_names=recorded).class_names == recorded
    with pytest.raises(DataError, match="not those that were recorded: 11 came or went"):
        open_pictures(tmp_path / "set", size=32, classes=True, class_names=recorded[:3] + recorded[4:])

    # Numbers from 1 are said not to be those of the classes.
    fill(tmp_path / "from one", {f"{name}/0.png": picture(0) for name in ("1", "2", "10")})
    caplog.clear()
    assert open_pictures(tmp_path / "from one", size=32, classes=True).class_names == ["1", "2", "10"]
    assert "'1' is class 0" in caplog.text


def test_what_has_no_class_is_refused_with_a_reason(tmp_path):
    numbers = {"a": "3", "b": "-1", "c": "two", "d": "", "e": "\u0664", "f": "1.0"}
    files = {f"{key}.png": picture(0) for key in [*numbers, *"ghijk"]}
    files |= {f"{key}.cls": number.encode() for key, number in numbers.items()}
    files |= {"g.json": b'{"class": "3"}', "h.json": b'{"class": true}', "i.json": b'{"class": -2}', "j.txt": b"a cat"}
    pictures = open_pictures(fill(tmp_path, files), size=32, classes=True)
    assert (pictures.keys, pictures.classes) == (["a"], [3])
    refused = reasons(pictures)
    assert refused.keys() == {f"{key}.png" for key in "bcdefghijk"}
    assert all("whole number from 0" in refused[f"{key}.png"] for key in "bcdefghi")
    assert "b.cls is '-1'" in refused["b.png"]
    assert 'the "class" of g.json' in refused["g.png"]
    assert all("no class; put its number beside" in refused[f"{key}.png"] for key in "jk")


def test_folders_of_a_shard_are_no_classes(tmp_path):
    path = tar(tmp_path / "a.tar", {"cat/0.png": picture(0), "dog/1.png": picture(1), "dog/1.cls": b"4"})
    pictures = open_pictures(path, size=32, classes=True)
    assert (pictures.keys, pictures.classes) == (["dog/1"], [4])
    assert "no class" in reasons(pictures)["a.tar/cat/0.png"]


def test_numbers_and_sub_folders_do_not_mix(tmp_path):
    fill(tmp_path, {"cat/0.png": picture(0), "dog/1.png": picture(1), "dog/1.cls": b"4"})
    with pytest.raises(DataError, match="as a number, like 4, and some only by their sub-folder, like 'cat'"):
        open_pictures(tmp_path, size=32, classes=True)


def test_no_picture_with_a_class_is_an_error(tmp_path):
    fill(tmp_path, {"a.png": picture(0), "a.txt": b"a cat"})
    with pytest.raises(DataError, match=r"32 pixels with classes; 1 refused: a\.png: no class"):
        open_pictures(tmp_path, size=32, classes=True)


def test_classes_stay_with_their_pictures_when_damaged_ones_go(tmp_path):
    files = {f"{name}/{index}.png": picture(index) for name in ("ant", "bat", "cat") for index in range(2)}
    files["ant/1.png"] = files["ant/1.png"][:-40]
    sound = open_pictures(fill(tmp_path, files), size=32, classes=True).sound()
    assert sound.keys == ["ant/0", "bat/0", "bat/1", "cat/0", "cat/1"]
    assert sound.classes == [0, 1, 1, 2, 2]
    assert sound.class_names == ["ant", "bat", "cat"]


def test_the_digest_is_of_the_classes_too(tmp_path):
    digests = []
    for number in ("3", "4"):
        fill(tmp_path, numbered(number))
        digests.append(digest(open_pictures(tmp_path, size=32, classes=True)))
    assert digests[0] != digests[1]
    captioned = open_pictures(fill(tmp_path, {"000.txt": b"a cat"}), size=32)
    fill(tmp_path, {"000.cls": b"9"})
    assert digest(open_pictures(tmp_path, size=32)) == digest(captioned)
    assert captioned.classes == []
