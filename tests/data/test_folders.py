"""Everything in a folder is used or refused by name: links, archives, hidden files, what file servers keep."""

import os
from pathlib import Path

import pytest

from data.stored import captioned, check_reasons, fill, picture, reasons, tar
from davae.data.sources import open_pictures
from davae.errors import DataError
from trials import Trials


def open_all(folder, **settings):
    return open_pictures(folder, size=32, captions=False, **settings)


def test_linked_class_folders_are_classes(tmp_path):
    fill(tmp_path / "elsewhere", {"birds/0.png": picture(0), "birds/deep/1.png": picture(1)})
    folder = fill(tmp_path / "set", {"ants/0.png": picture(2), "cats/0.png": picture(3)})
    (folder / "birds").symlink_to(tmp_path / "elsewhere/birds")
    pictures = open_all(folder, classes=True)
    assert pictures.keys == ["ants/0", "birds/0", "birds/deep/1", "cats/0"]
    assert (pictures.class_names, pictures.classes) == (["ants", "birds", "cats"], [0, 1, 1, 2])
    assert pictures.refused == []


def test_each_folder_is_listed_once_whatever_links_lead_to_it(tmp_path):
    folder = fill(tmp_path / "set", {"cats/0.png": picture(0), ".hidden/1.png": picture(1)})
    fill(tmp_path / "other", {"2.png": picture(2)})
    links = {"again": "cats", "loop": ".", "up": "..", "cats/down": "../cats", "new": "../other", "twice": "../other"}
    for name, target in {**links, "gone": "nowhere", ".hidden/link": "../cats"}.items():
        (folder / name).symlink_to(target)

    pictures = open_all(folder)
    assert pictures.keys == ["cats/0", "new/2"]
    expected = {
        "again": "already, as cats",
        "loop": "already, as .",
        "up": "above the set",
        "cats/down": "already, as cats",
        "twice": "already, as new",
        "gone": "No such file",
        ".hidden/link": "begins with a dot",
        ".hidden/1.png": "begins with a dot",
    }
    check_reasons(pictures, expected)


@pytest.mark.parametrize("archive", ["old_backup.tar", "images.tar.gz"])
def test_a_left_over_archive_does_not_become_the_set(tmp_path, archive):
    tar(tmp_path / archive, captioned(1))
    fill(tmp_path, {"cats/0.png": picture(0), "dogs/1.png": picture(1), "metadata.jsonl": b""})
    with pytest.raises(DataError, match=rf"both shards and pictures, such as {archive} and cats/0\.png"):
        open_all(tmp_path)


def test_archives_that_are_no_source_are_refused_by_name(tmp_path):
    archives = ["a.zip", "a.tgz", "x/b.tar", "x/c.tar.gz", "x/d.parquet", "e.tar.zst"]
    files = dict.fromkeys(archives, b"")
    pictures = open_all(fill(tmp_path / "pictures", files | {"0.png": picture(0)}))
    assert (pictures.keys, sorted(reasons(pictures))) == (["0"], sorted(archives))
    assert {refusal.kind for refusal in pictures.refused} == {"archive"}

    folder = fill(tmp_path / "shards", files | {"metadata.jsonl": b"{}"})
    tar(folder / "0.tar", {**captioned(1), "x/inner.zip": b"", ".y/2.png": b"", "@eaDir/3.png": b""})
    pictures = open_all(folder)
    members = ["0.tar/.y/2.png", "0.tar/@eaDir/3.png", "0.tar/x/inner.zip"]
    assert (pictures.keys, sorted(reasons(pictures))) == (["000"], sorted([*archives, *members, "metadata.jsonl"]))


def test_the_layout_of_img2dataset_is_read(tmp_path):
    tar(tmp_path / "00000.tar", captioned(2))
    fill(tmp_path, {"00000.parquet": b"PAR1", "00000_stats.json": b"{}"})
    pictures = open_pictures(tmp_path, size=32)
    assert (pictures.keys, pictures.refused) == (["000", "001"], [])
    fill(tmp_path, {"other.parquet": b"PAR1"})
    with pytest.raises(DataError, match="both shards and parquet files"):
        open_pictures(tmp_path, size=32)


def test_thumbnails_of_file_servers_are_no_pictures(tmp_path):
    thumbnails = ["@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "cats/@eaDir/1.png", "__MACOSX/0.png", "cats/._1.png"]
    files = dict.fromkeys(thumbnails, picture(9)) | {"@eaDir/notes.txt": b"", "0.png": picture(0)}
    pictures = open_all(fill(tmp_path, files | {"cats/1.png": picture(1)}), limit=9)
    assert (pictures.keys, sorted(reasons(pictures))) == (["0", "cats/1"], sorted(thumbnails))
    assert {refusal.kind for refusal in pictures.refused} == {"hidden"}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_masks_beside_their_pictures_are_no_pictures(tmp_path, kind):
    pictures = ["a", "b-2", "images/c", "d", "cats/e", "face", "face_mask", "lone_mask", "damask", "masks/lone"]
    masks = ["a_mask", "b-2-masklabel", "masks/c", "masks/d", "cats/e_Mask", "a_mask_mask"]
    files = {f"{key}.png": picture(place) for place, key in enumerate(pictures + masks)}
    files["face_mask.txt"] = b"a mask for the face"
    source = fill(tmp_path / "set", files) if kind == "folder" else tar(tmp_path / "0.tar", files)
    found = open_all(source)
    assert found.keys == sorted(pictures)
    assert sorted(name.removeprefix("0.tar/") for name in reasons(found)) == sorted(f"{key}.png" for key in masks)
    assert {refusal.kind for refusal in found.refused} == {"mask"}


NAMES = [
    "a.png",
    "b.JPG",
    "a.jpg",
    "a.txt",
    "c v1.5 07.webp",
    "a_mask.png",
    "._b.png",
    ".png",
    "d.heic",
    "e.tif",
    "n.md",
]
FOLDERS = ["", "cats/", "10/", ".hidden/", "@eaDir/", "masks/", "cats/deep er/"]


def walk(folder: Path) -> list[str]:
    """Every picture below a folder, by its path, and every link to a folder; links to folders are not entered."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in (*folders, *names) if Path(parent, name).is_symlink()]
        pictures = [
            name
            for name in set(names) - set(links)
            if name.lower().endswith((".png", ".jpg", ".webp", ".heic", ".tif"))
        ]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in links + pictures]
    return sorted(found)


def account(source: Path) -> list[str]:
    """What was used and what was refused."""
    pictures = open_all(source)
    return sorted([entry.picture.name for entry in pictures.entries] + [refusal.name for refusal in pictures.refused])


@pytest.mark.soak("R23", ci=25, full=2000)
def test_pictures_used_and_refused_are_those_that_a_walk_finds(tmp_path, trials: Trials):
    """Random trees with links, and the same files in tars that are joined."""
    for number, draw in enumerate(trials):
        files = {"zebra.png": picture(99)}
        for place in range(draw.randrange(25)):
            name = draw.choice(FOLDERS) + draw.choice(NAMES)
            files[name] = draw.choice([picture(place), picture(place, 8, 8), b"", b"<html>"])
        shards = []
        for part in range(3):
            members = {name: files[name] for place, name in enumerate(files) if place % 3 == part}
            shards.append(tar(tmp_path / "part.tar", members).read_bytes())
        shard = tmp_path / f"{number}.tar"
        shard.write_bytes(b"".join(shards))

        folder = fill(tmp_path / str(number), files)
        assert account(shard) == [f"{number}.tar/{name}" for name in walk(folder)], trials.replay
        links = dict.fromkeys(draw.sample(["link", "cats2", "z"], 2), draw.choice([".", "..", "cats"]))
        links |= dict.fromkeys(draw.sample(["l.png", "m.png"], 2), draw.choice(["zebra.png", "nowhere", "m.png"]))
        for name, target in links.items():
            (folder / name).symlink_to(target)
        assert account(folder) == walk(folder), trials.replay
