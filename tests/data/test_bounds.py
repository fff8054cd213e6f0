"""A source takes no more memory, rows or time than its bytes are worth, and reads regular files of its own folder."""

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data.stored import captioned, fill, peak_memory_below, picture, reasons, tar
from davae.data import bounds, shards
from davae.data.pictures import PictureRefused, read_picture
from davae.data.sources import open_pictures
from davae.errors import DataError

datasets = pytest.importorskip("datasets", reason="the extra datasets")
pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def write_rows(path: Path, columns: dict[str, object]) -> Path:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, compression="zstd")
    return path


def repeated(text: str, times: int) -> object:
    """A column that is one text and as many references to it."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), [text])


def test_a_row_names_regular_files_of_its_folder_only(tmp_path):
    fill(tmp_path, {"set/in.png": picture(0), "out.png": picture(1)})
    os.mkfifo(tmp_path / "set" / "pipe.png")
    names = ["in.png", "../out.png", "/dev/zero", "pipe.png", "gone.png", str(tmp_path / "set" / "in.png"), "\0"]
    cells = [{"bytes": None, "path": name} for name in names]
    path = write_rows(tmp_path / "set" / "rows.parquet", {"image": cells, "text": ["a picture"] * len(names)})
    pictures = open_pictures(path, size=32)
    assert pictures.keys == ["000000000", "000000005"]
    outside, pipe = "outside of the set's folder", "no regular file"
    for key, reason in {1: outside, 2: outside, 3: pipe, 4: "No such file", 6: "names no file"}.items():
        assert reason in reasons(pictures)[f"{key:09d}"]


@pytest.mark.parametrize("name", ["rows.parquet", "metadata.parquet"])
def test_a_small_table_stands_for_no_gigabytes_of_text(tmp_path, name):
    """4 GB of captions in a few kilobytes."""
    count = 4096
    columns = {"text": repeated("x" * (1 << 20), count), "file_name": repeated("000.png", count)}
    if name == "rows.parquet":
        columns["image"] = [{"bytes": b"x", "path": None}] * count
    path = write_rows(fill(tmp_path, captioned(1) if name == "metadata.parquet" else {}) / name, columns)
    assert path.stat().st_size < 60_000
    with peak_memory_below(300 << 20), pytest.raises(DataError, match=rf"{name}: more than {1 << 30} bytes of text"):
        open_pictures(tmp_path, size=32)


def test_a_small_table_has_no_millions_of_rows(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", {"png": pyarrow.nulls(300_000, pyarrow.binary())})
    with pytest.raises(DataError, match="300000 rows in a file of its size, allowed are 100000"):
        open_pictures(path, size=32)


def test_texts_of_rows_are_bounded_and_equal_ones_count_once(tmp_path, monkeypatch):
    lines = "".join(f'{{"file_name": "{index:03d}.png", "text": "{"x" * 90}"}}\n' for index in range(3))
    fill(tmp_path, {f"{index:03d}.png": picture(index) for index in range(3)} | {"metadata.jsonl": lines.encode()})
    monkeypatch.setattr(bounds, "MAX_TABLE_TEXT_BYTES", 90)
    assert len(open_pictures(tmp_path, size=32)) == 3
    monkeypatch.setattr(bounds, "MAX_TABLE_TEXT_BYTES", 89)
    with pytest.raises(DataError, match=r"metadata\.jsonl: more than 89 bytes of text"):
        open_pictures(tmp_path, size=32)


def test_a_caption_in_a_row_is_as_long_as_one_in_a_file(tmp_path):
    rows = {"image": [{"bytes": picture(n), "path": None} for n in range(2)], "text": ["x" * ((1 << 20) + 1), "short"]}
    pictures = open_pictures(write_rows(tmp_path / "rows.parquet", rows), size=32)
    assert pictures.captions == ["short"]
    assert "longer than the allowed 1048576 letters" in reasons(pictures)["000000000"]


def test_compressed_shards_are_bounded_together(tmp_path, monkeypatch):
    import gzip

    sizes = []
    for number in range(2):
        path = tar(tmp_path / f"{number}.tar", {f"{number}.png": picture(number), f"{number}.txt": b"a picture"})
        data = path.read_bytes()
        sizes.append(len(data))
        (tmp_path / f"{number}.tar.gz").write_bytes(gzip.compress(data))
        path.unlink()
    enough = sum(sizes) + shards.SAMPLE_BYTES
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", enough)
    assert len(open_pictures(tmp_path, size=32)) == 2
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", enough - 1)
    with pytest.raises(DataError, match=r"1\.tar\.gz: with it the compressed shards have more than"):
        open_pictures(tmp_path, size=32)


def test_pipes_are_no_sources(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="no folder and no file"):
        open_pictures(tmp_path / "a.tar", size=32)
    with pytest.raises(DataError, match="no regular file"):
        open_pictures(f"file://{tmp_path}/a.tar", size=32)
    fill(tmp_path / "set", captioned(1))
    os.mkfifo(tmp_path / "set" / "metadata.jsonl")
    assert list(reasons(open_pictures(tmp_path / "set", size=32))) == ["metadata.jsonl"]
    with pytest.raises(DataError, match=r"metadata\.jsonl is no regular file"):
        open_pictures(f"datasets:{tmp_path}/set", size=32)


def test_aliases_in_a_card_are_refused(tmp_path):
    levels = "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abc", "bcd", strict=True)
    )
    fill(tmp_path, captioned(1) | {"README.md": f"---\na: &a [1]\n{levels}---\n".encode()})
    with pytest.raises(DataError, match="YAML aliases"):
        open_pictures(f"datasets:{tmp_path}", size=32)


def test_an_animation_has_a_quarter_of_the_pixels():
    stream = BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(stream.getvalue(), "a", max_pixels=4 * 64 * 64).shape == (3, 64, 64)
    with pytest.raises(PictureRefused, match=r"64x64 pixels in an animation, allowed are 4095; save its first frame"):
        read_picture(stream.getvalue(), "a", max_pixels=4 * 64 * 64 - 1)


def test_a_range_of_shards_has_an_end():
    with pytest.raises(DataError, match="a range of at most 100000 shards"):
        open_pictures("memory://a/{0..999999999}.tar", size=32)
