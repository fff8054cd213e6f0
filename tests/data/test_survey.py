"""`davae data inspect`: what it counts, measures, refuses and shows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.stored import captioned, fill, picture
from davae.cli import main
from davae.data.pictures import read_png
from davae.data.sources import open_pictures
from davae.data.survey import contact_sheet, source_name, survey
from davae.method.metrics import half_size_psnr


def inspect(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "inspect", *map(str, arguments)])
    assert end.value.code == code


@pytest.fixture
def odd_set(tmp_path):
    files = captioned(6) | {
        "wide.png": picture(7, 96, 64),
        "wide.txt": b"two words",
        "copy.png": picture(8),
        "copy.txt": b"picture 0",
        "small.png": picture(9, 20, 40),
        "small.txt": b"too small",
        "silent.png": picture(10),
        "page.jpg": b"<html>",
    }
    files["damaged.png"] = picture(11)[:-200]
    files["damaged.txt"] = b"damaged behind its header"
    return fill(tmp_path / "set", files)


def test_the_facts_of_a_set_with_all_sorts_in_it(odd_set):
    facts = survey(open_pictures(odd_set, size=32))
    assert facts["pictures"] == 8
    refused = facts["refused"]
    assert refused["kinds"] == {"damaged": 1, "format": 1, "no caption": 1, "too small": 1}
    assert (refused["pictures"], refused["unreadable"]) == (4, 2)
    assert {item["name"]: item["kind"] for item in refused["each"]}["damaged.png"] == "damaged"
    assert facts["stored"]["width"] == {"least": 32, "5 %": 32, "median": 32, "95 %": 73.6, "greatest": 96}
    assert facts["buckets"] == [{"width": 32, "height": 32, "pictures": 8, "cut_off": round(1 / 3 / 8, 4)}]
    assert facts["captions"]["repeated"] == 2
    assert facts["captions"]["words"]["greatest"] == 2
    assert facts["loader"]["pictures"] == 8
    assert min(facts["loader"]["pictures_per_second"]) > 0
    assert "classes" not in facts


def test_classes_are_counted(tmp_path):
    files = {f"{index}.png": picture(index) for index in range(3)} | {f"{index}.cls": b"4" for index in range(2)}
    facts = survey(open_pictures(fill(tmp_path, files | {"2.cls": b"7"}), size=32, classes=True))
    assert facts["classes"] == {"classes": 2, "fewest": 1, "most": 2, "numbers": {}}


def test_the_command_prints_the_number_of_each_class_folder(tmp_path, capsys):
    fill(tmp_path / "set", {f"{name}/0.png": picture(0) for name in ("2", "10", "dogs")})
    inspect(tmp_path / "set", "--size", 32, "--classes", "--out", tmp_path / "out")
    printed = capsys.readouterr().out.split("class folder")[1].replace(" ", "")
    assert all(f"|{row}|" in printed for row in ("2|0", "10|1", "dogs|2"))


def test_softness_is_low_for_noise_and_high_for_what_was_scaled_up():
    small = torch.from_numpy(np.random.default_rng(0).random((1, 3, 32, 32), np.float32)) * 2 - 1
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)
    again = torch.nn.functional.interpolate(large, scale_factor=2, mode="bicubic").clamp(-1, 1)
    noise, once, twice = (half_size_psnr(image).item() for image in (small, large, again))
    assert noise + 3 < once < twice - 3
    assert half_size_psnr(torch.full((2, 3, 15, 17), 0.25)).min() > 100


def test_the_sheet_shows_the_pictures_in_their_places(tmp_path):
    colours = {"a": (255, 0, 0), "b": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a caption that is far too long for the place that it has under it " * 9)
    (tmp_path / "c.png").write_bytes(picture(0, 64, 64)[:-200])
    (tmp_path / "c.txt").write_text("damaged")
    sheet = contact_sheet(open_pictures(tmp_path, size=64))
    assert sheet.shape[1:] == (142, 1024)
    assert sheet[:, 64, 64].tolist() == [255, 0, 0]
    assert sheet[:, 64, 192].tolist() == [0, 0, 255]
    assert sheet[:, 64, 320].tolist() == [128, 128, 128]
    assert sheet[:, 64, 448].tolist() == [255, 255, 255]


def test_the_command_writes_the_facts_and_the_sheet(odd_set, tmp_path, capsys):
    inspect(odd_set, "--size", 32, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    for part in ("8 images; 4 refused, 2 of them unreadable", "page.jpg", "32x32", "no caption", "images/s"):
        assert part in printed
    facts = json.loads((tmp_path / "out/inspection.json").read_text())
    assert facts["source"] == str(odd_set)
    assert read_png(tmp_path / "out/contact_sheet.png").shape[0] == 3


def test_the_command_fails_where_both_stages_would_refuse_the_set(odd_set, tmp_path, capsys):
    fill(odd_set, {f"{name}.png": picture(0)[:-200] for name in "xyz"} | {f"{name}.txt": b"cut" for name in "xyz"})
    inspect(odd_set, "--size", 32, "--out", tmp_path / "out", code=3)
    assert "5 of 13 images cannot be read: both stages refuse such a set" in capsys.readouterr().err


def test_the_command_keeps_a_sheet_of_other_settings(odd_set, tmp_path, capsys):
    for size in (32, 64, 32):
        inspect(odd_set, "--size", size, "--out", tmp_path)
    assert len(list(tmp_path.glob("contact_sheet*.png"))) == 2


def test_the_command_speaks_json_and_buckets(odd_set, tmp_path, capsys):
    options = ["--size", 32, "--size", 64, "--aspect-ratio", "1:1", "--aspect-ratio", "3:2", "--bucket-step", 16]
    inspect(odd_set, *options, "--no-captions", "--out", tmp_path / "out", "--json")
    facts = json.loads(capsys.readouterr().out)
    sizes = {(row["width"], row["height"]): row["pictures"] for row in facts["buckets"]}
    assert sizes == {(32, 32): 8, (80, 48): 1}


def test_a_dry_run_prints_the_buckets_and_writes_nothing(tmp_path, capsys):
    inspect("memory://nowhere/a.tar", "--aspect-ratio", "2:1", "--out", tmp_path / "out", "--dry-run")
    assert json.loads(capsys.readouterr().out)["buckets"] == ["352x192"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/b", "b"), ("s3://x/train-*.tar", "train-*"), ("datasets:me/cats?split=train", "cats"), ("/", "data")],
)
def test_a_source_has_a_name(source, name):
    assert source_name(source) == name


@pytest.mark.parametrize("base", [False, True], ids=["words", "tokens"])
def test_captions_beyond_what_is_read_are_counted(base, base_folder, tmp_path, capsys):
    long = [f"{'red apple ' * 60}{end}" for end in ("on a table", "in a tree")]
    files = captioned(4) | {f"00{index}.txt": text.encode() for index, text in enumerate(long)}
    options = ["--base", base_folder] if base else []
    inspect(fill(tmp_path / "set", files), "--size", 32, "--out", tmp_path, "--prompt-tokens", 16, *options)
    said = capsys.readouterr().out
    assert f"longer than the 16 {'tokens' if base else 'words'} that are read: 2; 2 of them are another one" in said
    captions = json.loads((tmp_path / "inspection.json").read_text())["captions"]
    assert (captions["cut"], captions["merged"], captions["example"]) == (2, 2, sorted(text.strip() for text in long))
