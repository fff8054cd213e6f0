"""Tables: metadata.jsonl and metadata.parquet beside pictures, pictures in parquet and in Hugging Face datasets."""

import csv
import json
from io import BytesIO

import pytest
import torch
from PIL import Image

from data.stored import captioned, digest, fill, picture, reasons, tar
from davae.data import listing
from davae.data.sources import open_pictures
from davae.errors import DataError, SettingsError
from trials import Trials

datasets = pytest.importorskip("datasets", reason="the extra datasets")
pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def table(path, **columns):
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def lines(*rows_: object) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows_).encode()


# beside pictures


def test_captions_of_every_sort_and_which_of_them_wins(tmp_path):
    files = {f"{name}.png": picture(index) for index, name in enumerate("abcde")}
    files |= {"sub/f.png": picture(9)}
    files |= {"a.txt": b"txt", "a.caption": b"caption", "b.caption": b" caption\n", "b.json": b'{"caption": "json"}'}
    files |= {"c.json": b'{"text": "json"}'}

    # A table has rows for all of them but one.
    names = ("a.png", "b.png", "c.png", "d.png", "e.png", "sub/f.png")
    table_rows = [{"file_name": name, "text": f"row of {name}"} for name in names]
    files |= {"metadata.jsonl": b"\xef\xbb\xbf" + lines(*table_rows[:4], "", *table_rows[5:])}

    pictures = open_pictures(fill(tmp_path, files), size=32)
    assert dict(zip(pictures.keys, pictures.captions, strict=True)) == {
        "a": "txt",
        "b": "caption",
        "c": "json",
        "d": "row of d.png",
        "sub/f": "row of sub/f.png",
    }
    assert list(reasons(pictures)) == ["e.png"]


def test_a_table_in_a_sub_folder_and_classes_in_it(tmp_path):
    files = {"x/1.png": picture(0), "x/2.png": picture(1)}
    rows_ = [{"file_name": "1.png", "label": 3}, {"file_name": "2.png", "label": 0}]
    pictures = open_pictures(fill(tmp_path, files | {"x/metadata.jsonl": lines(*rows_)}), size=32, classes=True)
    assert pictures.classes == [3, 0]


def test_a_parquet_table_reads_like_the_lines(tmp_path):
    files = {"a.png": picture(0), "b.png": picture(1)}
    fill(tmp_path / "jsonl", files | {"metadata.jsonl": lines({"file_name": "a.png", "text": "A"}, {"file_name": 3})})
    fill(tmp_path / "parquet", files)
    table(tmp_path / "parquet/metadata.parquet", file_name=["a.png", None], text=["A", "B"])
    sets = [open_pictures(tmp_path / name, size=32) for name in ("jsonl", "parquet")]
    assert digest(sets[0]) == digest(sets[1])
    assert all(len(pictures.refused) == 2 for pictures in sets)
    (tmp_path / "parquet/metadata.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"metadata\.parquet: no sound parquet"):
        open_pictures(tmp_path / "parquet", size=32)


def test_of_several_rows_for_one_file_the_others_are_refused(tmp_path):
    rows_ = [{"file_name": "000.png", "text": text} for text in ("one", "two", "three")]
    fill(tmp_path, {"000.png": picture(0), "001.png": picture(1), "001.txt": b"b", "metadata.jsonl": lines(*rows_)})
    pictures = open_pictures(tmp_path, size=32)
    assert pictures.captions == ["three", "b"]
    refused = reasons(pictures)
    assert list(refused) == ["metadata.jsonl, line 1", "metadata.jsonl, line 2"]
    assert refused["metadata.jsonl, line 2"].startswith("000.png: a later row, metadata.jsonl, line 3,")
    assert {refusal.kind for refusal in pictures.refused} == {"same name"}


def test_a_list_of_captions_is_refused_as_what_it_is(tmp_path):
    files = captioned(1) | {"a.png": picture(1), "a.json": b'{"caption": ["one", "two"]}', "b.png": picture(2)}
    files |= {"b.json": b'{"caption": {"en": "b"}}', "c.png": picture(3), "c.json": b'{"caption": ["x"], "text": "c"}'}
    pictures = open_pictures(fill(tmp_path, files), size=32)
    assert pictures.captions == ["picture 0", "c"]
    assert reasons(pictures) == {
        "a.png": 'the "caption" of a.json is a list of 2; allowed is one text',
        "b.png": 'the "caption" of b.json is of type dict; allowed is one text',
    }
    rows_ = dataset(1).remove_columns("text").add_column("text", [["one", "two"]])
    with pytest.raises(DataError, match='the "text" of its row is a list of 2'):
        open_pictures(rows_, size=32)
    assert len(open_pictures(rows_, size=32, captions=False)) == 1


def test_rows_without_a_picture_are_refused_by_name(tmp_path):
    fill(tmp_path.parent, {"outside.png": picture(1)})
    odd = [
        {"file_name": "gone.png", "text": "not there"},
        {"file_name": "../outside.png", "text": "outside"},
        {"file_name": str(tmp_path.parent / "outside.png"), "text": "outside"},
        {"file_name": "000.jpg", "text": "of another suffix"},
        {"file_name": ""},
        {"file_name": "x/\0/\ud800.png"},
        {"text": "no name"},
        ["no object"],
        '{"file_name": "000.png", "text": "\\ud800"}',
        "[" * 50_000,
        "no JSON",
        "x" * ((1 << 20) + 5),
    ]

    pictures = open_pictures(fill(tmp_path, captioned(2) | {"metadata.jsonl": lines(*odd)}), size=32)
    assert pictures.keys == ["000", "001"]
    assert pictures.captions == ["picture 0", "picture 1"]
    kinds = [refusal.kind for refusal in pictures.refused]
    assert set(kinds) == {"missing", "text"}
    assert len(kinds) >= len(odd)


def test_a_csv_table_reads_like_the_lines(tmp_path):
    text = '\ufefffile_name,text,label\n000.png,"an apple, red",\n001.png,a pear,12\n002.png,,x\n,nothing,\n'
    files = {f"{index:03d}.png": picture(index) for index in range(4)} | {"metadata.csv": text.encode()}
    pictures = open_pictures(fill(tmp_path, files), size=32)
    assert pictures.captions == ["an apple, red", "a pear"]
    assert list(reasons(pictures)) == ["metadata.csv, row 4", "002.png", "003.png"]
    assert open_pictures(tmp_path, size=32, classes=True).classes == [12]
    (tmp_path / "metadata.csv").write_bytes(b"file_name\n\xff\xfe")
    with pytest.raises(DataError, match=r"metadata\.csv: no sound table in UTF-8"):
        open_pictures(tmp_path, size=32)


def write_table(path, rows_) -> None:
    """The same rows in whatever a table about pictures may be."""
    columns = ("file_name", "text")
    if path.suffix == ".jsonl":
        path.write_bytes(lines(*rows_))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows_)
    else:
        table(path, **{name: [row.get(name) for row in rows_] for name in columns})


@pytest.mark.soak("R23", ci=12, full=1000)
def test_rows_used_and_refused_are_those_of_the_table(tmp_path, trials: Trials):
    for number, draw in enumerate(trials):
        files = {f"{draw.choice('ab')}/{place}.png": picture(place) for place in range(6)}
        rows_ = []
        for place in range(draw.randrange(1, 16)):
            name = draw.choice([*files, "a/gone.png", "../a/0.png", "a/0.jpg", ""])
            rows_.append({"file_name": name, "text": f"text {place}"} if name else {"text": "about nothing"})
        folder = fill(tmp_path / str(number), files)
        write_table(folder / draw.choice(["metadata.jsonl", "metadata.csv", "metadata.parquet"]), rows_)

        pictures = open_pictures(folder, size=32, captions=False)
        told = {row["file_name"]: row["text"] for row in rows_ if row.get("file_name") in files}
        said = {entry.picture.name: entry.caption for entry in pictures.entries}
        assert said == dict.fromkeys(files, "") | told, trials.replay
        assert len(pictures.refused) == len(rows_) - len(told), trials.replay
        for row in rows_:
            name = row.get("file_name")
            named = [each for each in pictures.refused if name and name in (each.name, each.reason.partition(":")[0])]
            assert not name or name in told or named, trials.replay


@pytest.mark.soak("R23", ci=4, full=200)
def test_pictures_in_rows_are_used_or_refused_by_their_keys(tmp_path, trials: Trials):
    """Random rows in one file or several, whole or streamed."""
    kinds = [picture(0), picture(1), picture(2, 8, 8), b"<html>", b"", None]
    cell_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for number, draw in enumerate(trials):
        cells = [{"bytes": draw.choice(kinds), "path": None} for _ in range(draw.randrange(1, 30))]
        cells.append({"bytes": picture(3), "path": None})
        start = 0
        while start < len(cells):
            end = start + draw.randrange(1, 30)
            part = pyarrow.array(cells[start:end], cell_type)
            table(tmp_path / f"{number}/{start:03d}.parquet", image=part, text=["a text"] * len(part))
            start = end
        source = draw.choice([tmp_path / str(number), f"datasets:{tmp_path}/{number}?streaming=true"])
        pictures = open_pictures(source, size=32)
        names = sorted(pictures.keys + [refusal.name for refusal in pictures.refused])
        assert names == [f"{row:09d}" for row in range(len(cells))], trials.replay
        good = [f"{row:09d}" for row, cell in enumerate(cells) if cell["bytes"] in (*kinds[:2], picture(3))]
        assert pictures.keys == good, trials.replay


# pictures in rows


def dataset(count: int = 4, **columns):
    cells = [{"bytes": picture(index), "path": f"{index}.png"} for index in range(count)]
    table_ = {"image": cells, "text": [f"picture {index}" for index in range(count)], **columns}
    return datasets.Dataset.from_dict(table_).cast_column("image", datasets.Image())


@pytest.fixture
def folder(tmp_path):
    files = captioned(4)
    return open_pictures(fill(tmp_path / "folder", {f"000000{name}": data for name, data in files.items()}), size=32)


def same(pictures, folder) -> None:
    assert pictures.keys == folder.keys
    assert pictures.captions == folder.captions
    assert digest(pictures) == digest(folder)
    assert torch.equal(pictures.batch(range(4)), folder.batch(range(4)))
    assert pictures.refused == []


def test_a_dataset_itself_saved_and_streamed_reads_like_the_folder(tmp_path, folder):
    rows_ = dataset()
    rows_.save_to_disk(tmp_path / "saved")
    same(open_pictures(rows_, size=32), folder)
    same(open_pictures(tmp_path / "saved", size=32), folder)
    same(open_pictures(rows_.to_iterable_dataset(), size=32), folder)


def test_parquet_files_and_names_read_like_the_folder(tmp_path, folder):
    dataset().to_parquet(tmp_path / "set/train.parquet")
    same(open_pictures(tmp_path / "set/train.parquet", size=32), folder)
    same(open_pictures(tmp_path / "set", size=32), folder)
    same(open_pictures(f"datasets:{tmp_path}/set", size=32), folder)
    same(open_pictures(f"datasets:{tmp_path}/set?split=train&streaming=true", size=32), folder)
    part = open_pictures(f"datasets:{tmp_path}/set?streaming=true&take=2", size=32)
    assert part.keys == folder.keys[:2]


def test_plain_bytes_and_webdatasets_columns(tmp_path):
    path = table(
        tmp_path / "a.parquet",
        png=[picture(0), picture(1)],
        json=[{"caption": "in json"}] * 2,
        txt=["in txt", None],
        cls=[3, 4],
        __key__=["x/b", "x/a"],
    )
    pictures = open_pictures(path, size=32, captions=False)
    assert pictures.keys == ["x/a", "x/b"]
    assert pictures.captions == ["", "in txt"]
    assert open_pictures(path, size=32, classes=True).classes == [4, 3]


def test_only_pictures_will_do_where_no_captions_are_needed():
    assert len(open_pictures(dataset().select_columns("image"), size=32, captions=False)) == 4


def test_a_cell_that_is_no_picture_is_refused(tmp_path):
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    rows_ = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": picture(0), "path": None},
                {"bytes": b"<html>", "path": None},
                {"bytes": None, "path": None},
                {"bytes": None, "path": str(tmp_path / "gone.png")},
                {"bytes": stream.getvalue(), "path": None},
            ],
            "text": ["a caption"] * 5,
        }
    )

    for rows_or_stream in (rows_, rows_.to_iterable_dataset()):
        pictures = open_pictures(rows_or_stream, size=32)
        assert pictures.keys == ["000000000"]
        kinds = {refusal.name: refusal.kind for refusal in pictures.refused}
        assert list(kinds.values()) == ["format", "damaged", "damaged", "too small"]


def test_what_is_no_set_of_pictures_is_a_typed_error(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no column holds pictures, of text"):
        open_pictures(datasets.Dataset.from_dict({"text": ["a"]}), size=32)
    with pytest.raises(DataError, match="two rows have the key 'a'"):
        open_pictures(dataset(2, __key__=["a", "a"]), size=32)

    # A dataset with splits, in memory and saved.
    splits = datasets.DatasetDict({"one": dataset(), "two": dataset()})
    with pytest.raises(SettingsError, match="give one of one, two"):
        open_pictures(splits, size=32)
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(SettingsError, match="splits/one"):
        open_pictures(tmp_path / "splits", size=32)

    # Names that cannot be loaded, and options that do not exist.
    with pytest.raises(DataError, match="cannot be loaded"):
        open_pictures(f"datasets:{tmp_path}/nowhere", size=32)
    for query in ("shuffle=1", "streaming=yes", "take=-1"):
        with pytest.raises(SettingsError, match="allowed after the"):
            open_pictures(f"datasets:a?{query}", size=32)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: no sound parquet file"):
        open_pictures(tmp_path / "a.parquet", size=32)

    # A stream that would fill the memory.
    monkeypatch.setattr(listing, "MAX_UNPACKED_BYTES", 5000)
    with pytest.raises(DataError, match="more than 5000 bytes of pictures in 2 rows"):
        open_pictures(dataset().to_iterable_dataset(), size=32)


def test_two_sorts_of_source_in_one_folder_are_an_error(tmp_path):
    dataset().to_parquet(tmp_path / "a.parquet")
    tar(tmp_path / "b.tar", captioned(1))
    with pytest.raises(DataError, match="both shards and parquet files"):
        open_pictures(tmp_path, size=32)


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SettingsError, match=r"davae\[datasets\]"):
        open_pictures(tmp_path / "a.parquet", size=32)


@pytest.mark.parametrize("streamed", [False, True])
def test_of_several_columns_of_pictures_the_one_named_image_counts(streamed):
    image = datasets.Image()
    cells = [{"bytes": picture(index), "path": None} for index in range(3)]
    columns = {"conditioning_image": cells[:1], "image": cells[1:2], "views": [cells], "text": ["a"]}
    rows_ = datasets.Dataset.from_dict(columns).cast_column("conditioning_image", image).cast_column("image", image)

    def opened(*gone: str):
        rest = rows_.remove_columns(gone)
        return open_pictures(rest.to_iterable_dataset() if streamed else rest, size=32)

    pictures = opened()
    assert torch.equal(pictures.image(0), opened("conditioning_image", "views").image(0))
    assert list(reasons(pictures)) == ["column conditioning_image", "column views"]
    assert opened("conditioning_image", "views").refused == []

    # An empty first cell does not hide the column.
    empty = datasets.Dataset.from_dict({"image": [None], "text": ["a"]}).cast_column("image", image)
    rows_ = datasets.concatenate_datasets([empty, rows_.remove_columns("views")])
    pictures = opened()
    assert pictures.keys == ["000000001"]
    assert list(reasons(pictures)) == ["column conditioning_image", "000000000"]
    rows_ = rows_.rename_column("image", "target")
    with pytest.raises(DataError, match="several columns hold pictures: target, conditioning_image; name"):
        opened()
