"""Shards: read in place, like folders; a hostile or damaged one is a typed error."""

import contextlib
import gzip
import random
import tarfile

import pytest
import torch

from data.stored import captioned, fill, picture, tar
from davae.data import shards
from davae.data.sources import open_pictures
from davae.errors import DataError


def test_a_shard_reads_like_the_folder(tmp_path):
    files = captioned(5)
    folder = open_pictures(fill(tmp_path / "folder", files), size=32)
    names = sorted(files)
    (tmp_path / "shards").mkdir()
    tar(tmp_path / "shards/0.tar", {f"./{name}": files[name] for name in names[:4]})
    tar(tmp_path / "shards/1.tar", {name: files[name] for name in names[4:]})
    (tmp_path / "shards/LICENSE").write_text("nothing to see")
    shards = open_pictures(tmp_path / "shards", size=32)
    assert (shards.keys, shards.captions) == (folder.keys, folder.captions)
    assert torch.equal(shards.batch(range(5)), folder.batch(range(5)))
    assert open_pictures(tmp_path / "shards/0.tar", size=32).keys == folder.keys[:2]


def test_keys_of_members_are_those_of_webdataset(tmp_path):
    files = {
        "x/a.PNG": picture(0),
        "x/a.txt": b"a",
        "x/a.seg.png": picture(1),
        "x/a.cls": b"3",
        "x/a.pyd": b"\x80\x04.",
    }
    pictures = open_pictures(tar(tmp_path / "a.tar", files, odd("x", tarfile.DIRTYPE)), size=32)
    assert pictures.keys == ["x/a"]
    assert pictures.refused == []


def odd(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member


@pytest.mark.parametrize(
    "member",
    [
        odd("../evil.txt"),
        odd("x/../../evil.txt"),
        odd("/etc/evil.txt"),
        odd("x\\..\\evil.txt"),
        odd("000.json", tarfile.SYMTYPE, "/etc/passwd"),
        odd("000.json", tarfile.LNKTYPE, "000.txt"),
        odd("000.json", tarfile.CHRTYPE),
        odd("000.json", tarfile.BLKTYPE),
        odd("000.json", tarfile.FIFOTYPE),
        odd("000.json", tarfile.GNUTYPE_SPARSE),
        odd("000.txt"),
        odd("./000.txt"),
        odd("../" * 1300 + "evil.txt"),
    ],
    ids=lambda member: f"{member.name[:20]}-{member.type.decode()}",
)
def test_a_hostile_member_condemns_the_shard(tmp_path, member):
    path = tar(tmp_path / "a.tar", captioned(1), member)
    with pytest.raises(DataError, match=r"a\.tar: member"):
        open_pictures(path, size=32)
    assert [item.name for item in tmp_path.iterdir()] == ["a.tar"]


def test_a_sparse_member_condemns_the_shard(tmp_path):
    member = odd("000.json", size=512)
    member.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": f"0,512,{1 << 40},0"}
    with pytest.raises(DataError, match="no plain file"):
        open_pictures(tar(tmp_path / "a.tar", captioned(1), member), size=32)


def test_a_key_in_two_shards_is_an_error(tmp_path):
    for name in ("0.tar", "1.tar"):
        tar(tmp_path / name, captioned(1))
    with pytest.raises(DataError, match=r"1\.tar: its key '000'"):
        open_pictures(tmp_path, size=32)


def test_shards_beside_pictures_are_an_error(tmp_path):
    tar(tmp_path / "0.tar", captioned(1))
    fill(tmp_path, captioned(1))
    with pytest.raises(DataError, match="both"):
        open_pictures(tmp_path, size=32)


def test_a_member_larger_than_the_file_is_an_error(tmp_path):
    header = odd("000.png", size=1 << 40).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(header + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar"):
        open_pictures(path, size=32)


def test_compressed_and_foreign_files_are_no_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as shard:
        shard.addfile(odd("a.txt"))
    for data in ((tmp_path / "a.tar").read_bytes(), b"", b"\0" * 512, picture(0), b"x" * 5000):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.tar|no usable picture"):
            open_pictures(tmp_path, size=32)


def compressed(path):
    (path.parent / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return path.parent / f"{path.name}.gz"


def test_a_compressed_shard_reads_like_the_plain_one(tmp_path):
    plain = open_pictures(tar(tmp_path / "a.tar", captioned(3)), size=32)
    pixels, digest = plain.batch(range(3)), plain.digest
    path = compressed(tmp_path / "a.tar")
    for source in (path, tmp_path):
        packed = open_pictures(source, size=32)
        assert (packed.keys, packed.captions, packed.digest) == (plain.keys, plain.captions, digest)
        assert torch.equal(packed.batch(range(3)), pixels)
    assert [item.name for item in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_damaged_compressed_shard_is_an_error(tmp_path):
    path = compressed(tar(tmp_path / "a.tar", captioned(2)))
    data = path.read_bytes()
    for end in range(0, len(data), 97):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"a\.tar\.gz"):
            open_pictures(path, size=32)
    for position in range(0, len(data), 397):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        with contextlib.suppress(DataError):  # of gzip's header, some bits mean nothing
            assert len(open_pictures(path, size=32)) == 2


def test_a_compressed_shard_is_hostile_as_a_plain_one(tmp_path):
    path = compressed(tar(tmp_path / "a.tar", captioned(1), odd("../evil.txt")))
    with pytest.raises(DataError, match=r"a\.tar\.gz: member"):
        open_pictures(path, size=32)


def test_a_compressed_shard_has_a_largest_size(tmp_path, monkeypatch):
    path = compressed(tar(tmp_path / "a.tar", captioned(1)))
    size = len(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", size)
    assert len(open_pictures(path, size=32)) == 1
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", size - 1)
    with pytest.raises(DataError, match=rf"more than {size - 1} bytes.*gunzip"):
        open_pictures(path, size=32)


def test_a_chain_of_headers_is_an_error(tmp_path):
    link = odd("long", tarfile.GNUTYPE_LONGNAME, size=1).tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(link * 3000 + bytes(1024))
    with pytest.raises(DataError, match="no sound"):
        open_pictures(tmp_path, size=32)


def test_many_empty_members_are_fine(tmp_path):
    path = tar(tmp_path / "a.tar", captioned(1), *(odd(f"n{index}.cls") for index in range(5000)))
    assert len(open_pictures(path, size=32)) == 1


def test_a_cut_shard_is_never_taken_for_a_whole_one(tmp_path):
    path = tar(tmp_path / "a.tar", captioned(4))
    data = path.read_bytes()
    content = len(data.rstrip(b"\0"))
    for end in range(0, content, 200):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"a\.tar"):
            open_pictures(path, size=32)


def test_damaged_shards_give_pictures_or_an_error(tmp_path):
    path = tar(tmp_path / "a.tar", captioned(3))
    data = path.read_bytes()
    mutate = random.Random(0)
    errors = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(mutate.randint(1, 4)):
            damaged[mutate.randrange(3) * 512 + mutate.randrange(512)] = mutate.randrange(256)
        path.write_bytes(damaged)
        try:
            open_pictures(path, size=32).sound()
        except DataError:
            errors += 1
    assert errors > 50
