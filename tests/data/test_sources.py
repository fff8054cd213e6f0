"""Folders and shards: what is taken, what is refused and said; the split."""

import hashlib
import json
import os
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.stored import captioned, check_reasons, digest, fill, picture, reasons
from davae.data.buckets import Bucket, fit
from davae.data.sources import open_pictures
from davae.data.split import heldout
from davae.errors import DataError, SettingsError
from forks import exit_code, forked

HELDOUT_OF_FORTY = ["017", "023", "035"]


# folders


def test_a_folder_of_pictures_with_captions_beside_them(tmp_path):
    files = {
        "b.png": picture(1),
        "b.txt": "\ufeff two words \n".encode(),
        "a.JPG": picture(2, 48, 40, "JPEG"),
        "a.txt": "a caf\u00e9".encode(),
        "sub/c.webp": picture(3, 64, 64, "WEBP"),
        "sub/c.json": b'{"caption": "from json", "group": "things"}',
        "d.png": picture(4),
        "d.txt": b"from txt",
        "d.json": b'{"caption": "from json"}',
        "notes.md": b"no picture",
        ".hidden.png": b"",
        ".git/e.png": b"",
    }

    pictures = open_pictures(fill(tmp_path, files), size=32)
    assert pictures.keys == ["a", "b", "d", "sub/c"]
    assert pictures.captions == ["a caf\u00e9", "two words", "from txt", "from json"]
    assert {refusal.name: refusal.kind for refusal in pictures.refused} == {
        ".hidden.png": "hidden",
        ".git/e.png": "hidden",
    }
    assert pictures.refusals_summary().startswith("2 refused: .hidden.png: hidden")

    batch = pictures.batch([1, 0, 3])
    assert (batch.shape, batch.dtype) == ((3, 3, 32, 32), torch.float32)
    assert torch.equal(((batch[0] + 1) * 127.5).round().to(torch.uint8), pictures.image(1))
    original = torch.from_numpy(np.array(Image.open(BytesIO(files["b.png"])))).permute(2, 0, 1)
    assert torch.equal(pictures.image(1), original)


def test_what_is_left_out_is_listed_with_its_reason(tmp_path):
    files = captioned(1) | {
        "small.png": picture(1, 31, 64),
        "small.txt": b"too small",
        "silent.png": picture(2),
        "blank.png": picture(3),
        "blank.txt": b" \n",
        "latin.png": picture(4),
        "latin.txt": "caf\u00e9".encode("latin-1"),
        "page.jpg": b"<html>not found</html>",
        "page.txt": b"a page",
        "photo.heic": b"\0\0\0\x18ftypheic",
        "photo.txt": b"a photo",
        "list.png": picture(5),
        "list.json": b'["caption"]',
        "broken.png": picture(6),
        "broken.json": b"[" * 100_000,
        "half.png": picture(7),
        "half.json": b'{"caption": "\\ud800"}',
        "twice.jpg": picture(8, kind="JPEG"),
        "twice.png": picture(9),
        "twice.txt": b"one of two",
        "long.png": picture(10),
        "long.txt": b"a" * ((1 << 20) + 1),
    }
    fill(tmp_path, files)

    # Links to files are files; other things are not.
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "good.png").symlink_to("000.png")
    (tmp_path / "good.txt").write_text("a link to a file")

    pictures = open_pictures(tmp_path, size=32)
    assert pictures.keys == ["000", "good", "twice"]
    expected = {
        "small.png": "31x64",
        "silent.png": "no caption",
        "blank.png": "no caption",
        "latin.txt": "UTF-8",
        "page.jpg": "format",
        "photo.heic": "format",
        "list.png": "no caption",
        "broken.png": "JSON",
        "half.png": "JSON",
        "twice.png": "twice.jpg",
        "long.txt": "1048576",
        "pipe.png": "regular",
        "loop.png": "opened",
        "gone.png": "opened",
    }
    check_reasons(pictures, expected)
    assert pictures.refusals_summary().startswith(f"{len(expected)} refused: ")


def test_a_name_that_is_no_text_is_refused(tmp_path):
    fill(tmp_path, captioned(1))
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.png")).write_bytes(picture(1))
    assert "UTF-8" in reasons(open_pictures(tmp_path, size=32))["'\\udcff.png'"]


def test_nothing_usable_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"looked for .*\.png.*32 pixels.*0 refused"):
        open_pictures(tmp_path, size=32)
    fill(tmp_path, {"a.png": picture(0), "notes.txt": b"no caption of a"})
    with pytest.raises(DataError, match=r"1 refused: a\.png: no caption"):
        open_pictures(tmp_path, size=32)
    with pytest.raises(DataError, match="no folder"):
        open_pictures(tmp_path / "missing", size=32)


@pytest.mark.parametrize(
    "arguments",
    [{"size": 8}, {"size": 32, "split": "test"}, {"size": 32, "limit": 0}],
)
def test_arguments_outside_their_range_are_refused(tmp_path, arguments):
    fill(tmp_path, captioned(1))
    with pytest.raises(SettingsError, match="allowed"):
        open_pictures(tmp_path, **arguments)


def test_a_split_without_a_picture_says_the_rule_and_the_way_out(tmp_path):
    fill(tmp_path, captioned(1))
    with pytest.raises(
        DataError, match=r"'heldout' \(about one picture in ten is held out, by a hash.* give more pictures"
    ):
        open_pictures(tmp_path, size=32, split="heldout")


@pytest.mark.parametrize("first", [0, 17, 100])
def test_of_few_pictures_at_least_one_is_held_out(tmp_path, caplog, first):
    for count in range(2, 12):
        keys = [f"{index:03d}" for index in range(first, first + count)]
        for key in keys:
            fill(tmp_path, {f"{key}.png": picture(int(key)), f"{key}.txt": b"a picture"})
        held_out = open_pictures(tmp_path, size=32, split="heldout").keys
        expected = [key for key in keys if heldout(key)]
        if not expected or expected == keys:
            expected = [min(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())]
            assert f"only {expected[0]} is held out" in caplog.text
        assert held_out == expected
        assert open_pictures(tmp_path, size=32, split="train").keys == sorted(set(keys) - set(held_out))
        caplog.clear()


def test_a_limit_takes_pictures_from_all_over(tmp_path):
    fill(tmp_path, captioned(10))
    assert open_pictures(tmp_path, size=32, limit=3).keys == ["000", "003", "006"]
    assert len(open_pictures(tmp_path, size=32, limit=11)) == 10


def test_a_folder_that_cannot_be_listed_is_refused():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = fill(Path(name), captioned(1))
        (folder / "locked").mkdir(mode=0o000)
        folder.chmod(0o755)

        def look() -> None:
            if os.geteuid() == 0:  # root may list everything
                os.setuid(65534)
            refused = reasons(open_pictures(folder, size=32))
            assert refused == {"locked": "a folder that cannot be listed (Permission denied); mend its rights"}

        assert exit_code(forked(look)) == 0


def test_damage_behind_the_header_is_found_by_sound(tmp_path, caplog):
    files = captioned(3)
    files["001.png"] = files["001.png"][:-200]
    pictures = open_pictures(fill(tmp_path, files), size=32)
    assert len(pictures) == 3
    with pytest.raises(DataError, match=r"001\.png: damaged"):
        pictures.batch([0, 1])

    sound = pictures.sound()
    assert (sound.keys, sound.captions) == (["000", "002"], ["picture 0", "picture 2"])
    assert list(reasons(sound)) == ["001.png"]
    assert torch.equal(sound.image(1), pictures.image(2))
    assert caplog.messages == [f"2 pictures are used, {sound.refusals_summary()}"]

    # The report is of this set; one without refusals leaves none.
    assert sound.sound(tmp_path / "out" / "refused.json") is sound
    assert json.loads((tmp_path / "out" / "refused.json").read_text()) == reasons(sound)
    assert caplog.messages[1:] == [f"{caplog.messages[0]}; all are in {tmp_path / 'out' / 'refused.json'}"]
    assert digest(sound) != digest(pictures)
    open_pictures(tmp_path, size=32, limit=1).sound(tmp_path / "out" / "refused.json")
    assert not (tmp_path / "out" / "refused.json").exists()

    (tmp_path / "000.png").write_bytes(files["000.png"][:-200])
    (tmp_path / "002.png").write_bytes(files["002.png"][:-200])
    with pytest.raises(DataError, match="every picture is damaged"):
        open_pictures(tmp_path, size=32).sound()


def test_a_file_that_changes_after_it_was_listed_is_named(tmp_path):
    pictures = open_pictures(fill(tmp_path, captioned(2)), size=32)
    (tmp_path / "000.png").unlink()
    (tmp_path / "001.png").write_bytes(b"short")
    for index in range(2):
        with pytest.raises(DataError, match=f"00{index}.png"):
            pictures.image(index)


def test_pictures_are_decoded_once_and_never_shared(tmp_path):
    pictures = open_pictures(fill(tmp_path, captioned(1)), size=32)
    first = pictures.image(0)
    original = first.clone()
    (tmp_path / "000.png").unlink()
    first.zero_()
    assert torch.equal(pictures.image(0), original)
    pictures.image(0).zero_()
    assert torch.equal(pictures.image(0), original)


def test_a_set_above_the_memory_limit_is_decoded_at_every_use(tmp_path, monkeypatch):
    monkeypatch.setattr("davae.data.sources.MEMORY_BYTES", 3 * 32 * 32)
    pictures = open_pictures(fill(tmp_path, captioned(2)), size=32)
    before = pictures.batch([0, 1, 0])
    assert torch.equal(pictures.sound().batch([0, 1, 0]), before)
    (tmp_path / "000.png").write_bytes((tmp_path / "001.png").read_bytes())
    assert torch.equal(open_pictures(tmp_path, size=32).image(0), pictures.image(1))


# square and scale


def test_fit_takes_the_centre_and_keeps_what_has_the_size():
    wide = torch.arange(3 * 16 * 21).remainder(251).to(torch.uint8).reshape(3, 16, 21)
    assert torch.equal(fit(wide, Bucket(16, 16)), wide[:, :, 2:18])
    assert torch.equal(fit(wide.transpose(1, 2), Bucket(16, 16)), wide[:, :, 2:18].transpose(1, 2))


def test_fit_scales_down_without_aliases():
    stripes = torch.zeros(3, 128, 128, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = fit(stripes, Bucket(32, 32))[:, :, 4:-4].float()
    assert (small - 127.5).abs().max() <= 2
    flat = torch.full((3, 100, 130), 77, dtype=torch.uint8)
    assert torch.equal(fit(flat, Bucket(48, 48)), torch.full((3, 48, 48), 77, dtype=torch.uint8))


def test_fit_never_scales_up():
    with pytest.raises(SettingsError, match="not scaled up"):
        fit(torch.zeros(3, 16, 15, dtype=torch.uint8), Bucket(16, 16))


# split


def test_the_split_depends_on_the_key_alone(tmp_path):
    assert [key for key in (f"{index:03d}" for index in range(40)) if heldout(key)] == HELDOUT_OF_FORTY
    fill(tmp_path, captioned(40))
    for_training = open_pictures(tmp_path, size=32, split="train")
    held_out = open_pictures(tmp_path, size=32, split="heldout")
    assert held_out.keys == HELDOUT_OF_FORTY
    assert sorted(for_training.keys + held_out.keys) == open_pictures(tmp_path, size=32).keys
    for name in ("000", "023"):  # other pictures come and go: nobody changes sides
        (tmp_path / f"{name}.png").unlink()
    assert open_pictures(tmp_path, size=32, split="heldout").keys == [key for key in HELDOUT_OF_FORTY if key != "023"]


def test_a_picture_that_is_not_square_is_flattened_on_white_and_cropped_in_the_middle(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (40, 32, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "tall.png")
    white = Image.alpha_composite(Image.new("RGBA", (32, 40), "white"), Image.fromarray(rgba)).convert("RGB")
    expected = torch.from_numpy(np.array(white)[4:-4]).permute(2, 0, 1)
    assert torch.equal(open_pictures(tmp_path, size=32, captions=False).image(0), expected)


def test_where_no_captions_are_needed_a_picture_without_one_is_used(tmp_path):
    fill(tmp_path, {"a.png": picture(0), "b.png": picture(1), "b.txt": b"two"})
    assert open_pictures(tmp_path, size=32, captions=False).captions == ["", "two"]
    assert open_pictures(tmp_path, size=32).keys == ["b"]


def test_reading_a_set_shows_its_progress_where_a_report_is_asked_for(tmp_path, capsys):
    fill(tmp_path / "set", {f"{number}.png": picture(number) for number in range(3)})
    pictures = open_pictures(tmp_path / "set", size=32, captions=False)
    pictures.sound()
    assert capsys.readouterr().err == ""
    pictures.sound(tmp_path / "refused.json")
    assert "reading pictures: 1/1" in capsys.readouterr().err
