"""Shards at URLs: read where they are, a part at a time, and as exactly as shards on disk."""

import gzip
import io
import tarfile

import fsspec
import pytest
import torch

from data.stored import captioned, digest, picture, tar
from davae.data import stored
from davae.data.sources import open_pictures
from davae.errors import DataError, SettingsError


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def two_shards(folder) -> None:
    files = captioned(5)
    names = sorted(files)
    folder.mkdir()
    tar(folder / "train-000.tar", {name: files[name] for name in names[:4]})
    tar(folder / "train-001.tar", {name: files[name] for name in names[4:]})


@pytest.mark.parametrize("url", ["{}/train-{{000..001}}.tar", "{}/*.tar", "{}", "{}/"])
@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_shards_at_a_url_are_those_on_disk(tmp_path, memory, protocol, url):
    two_shards(tmp_path / "set")
    here = open_pictures(tmp_path / "set", size=32)
    base = f"file://{tmp_path}/set"
    if protocol == "memory":
        base = "memory://set"
        for shard in (tmp_path / "set").iterdir():
            memory.pipe(f"/set/{shard.name}", shard.read_bytes())
    there = open_pictures(url.format(base), size=32)
    assert (there.keys, there.captions, digest(there)) == (here.keys, here.captions, digest(here))
    assert torch.equal(there.batch(range(5)), here.batch(range(5)))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_one_shard_and_a_compressed_one(tmp_path, memory):
    data = tar(tmp_path / "a.tar", captioned(2)).read_bytes()
    memory.pipe("/a.tar", data)
    memory.pipe("/b.tar.gz", gzip.compress(data))
    plain, packed = (open_pictures(f"memory://{name}", size=32) for name in ("a.tar", "b.tar.gz"))
    assert digest(plain) == digest(packed) == digest(open_pictures(tmp_path / "a.tar", size=32))


def test_listing_fetches_headers_and_not_the_pictures(tmp_path, memory, monkeypatch):
    files = {f"{index}.png": picture(index, 500, 500) for index in range(4)}
    files |= {f"{index}.txt": b"noise" for index in range(4)}
    shard = tar(tmp_path / "a.tar", files)
    memory.pipe("/a.tar", shard.read_bytes())

    # Every fetch is counted.
    fetched = []
    read = stored.RemoteFile.read
    monkeypatch.setattr(
        stored.RemoteFile, "read", lambda self, start, end: fetched.append(end - start) or read(self, start, end)
    )

    pictures = open_pictures("memory://a.tar", size=32)
    assert sum(fetched) < shard.stat().st_size / 5
    assert sum(fetched) > 0
    fetched.clear()
    pictures.image(2)
    assert sum(fetched) == len(files["2.png"])


def test_what_is_missing_empty_or_unknown_is_a_typed_error(tmp_path, memory):
    for url in ("memory://nowhere.tar", "memory://nowhere/*.tar", "memory://nowhere", f"file://{tmp_path}/x.tar.gz"):
        with pytest.raises(DataError, match=url.replace("*", r"\*").rstrip("/")):
            open_pictures(url, size=32)
    with pytest.raises(SettingsError, match="install what reads such URLs"):
        open_pictures("nosuchstore://a.tar", size=32)


def test_a_store_that_fails_is_tried_again_and_then_named(tmp_path, memory, monkeypatch):
    memory.pipe("/a.tar", tar(tmp_path / "a.tar", captioned(1)).read_bytes())
    pictures = open_pictures("memory://a.tar", size=32)
    waits, works = [], type(memory).cat_file
    monkeypatch.setattr("time.sleep", waits.append)

    def failing(self, path, start=None, end=None, **options):
        if len(waits) < 2:
            raise ConnectionError("the line is dead")
        return works(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(memory), "cat_file", failing)
    pictures.image(0)
    assert waits == [1, 2]
    monkeypatch.setattr("time.sleep", lambda _: None)
    waits.clear()
    with pytest.raises(DataError, match=r"a\.tar cannot be read, 3 times tried \(ConnectionError: the line is dead"):
        pictures.decode(0)


def test_a_shard_that_shrinks_is_named(tmp_path, memory):
    data = tar(tmp_path / "a.tar", captioned(1)).read_bytes()
    memory.pipe("/a.tar", data)
    pictures = open_pictures("memory://a.tar", size=32)
    memory.pipe("/a.tar", data[:1000])
    with pytest.raises(DataError, match="is it complete"):
        pictures.image(0)


def test_a_remote_shard_is_hostile_as_one_on_disk(memory):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        shard.addfile(tarfile.TarInfo("../evil.txt"))
    memory.pipe("/a.tar", stream.getvalue())
    with pytest.raises(DataError, match=r"memory://a\.tar: member"):
        open_pictures("memory://a.tar", size=32)
