"""Shards: read in place, like folders; a hostile or damaged one is a typed error."""

import contextlib
import gzip
import io
import tarfile

import pytest
import torch

from data.stored import captioned, digest, fill, picture, reasons, tar
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
    (further,) = pictures.refused
    assert (further.name, further.kind) == ("a.tar/x/a.seg.png", "same name")


def test_pictures_with_dots_in_their_names_are_refused_by_name(tmp_path):
    names = ["boat v1.5 07.jpg", "boat v1.6 08.JPG", "key.input.jpg", "x/.jpg"]
    files = captioned(1) | dict.fromkeys(names, picture(1)) | {"boat v1.5 07.txt": b"a boat"}
    pictures = open_pictures(tar(tmp_path / "a.tar", files), size=32, captions=False)
    assert pictures.keys == ["000"]
    assert sorted(reasons(pictures)) == [f"a.tar/{name}" for name in names]
    assert "the field '5 07.jpg' of 'boat v1'; rename it" in reasons(pictures)["a.tar/boat v1.5 07.jpg"]
    with pytest.raises(DataError, match="3 of 4 pictures cannot be read"):
        pictures.sound(max_unreadable=0.01)


def odd(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member


def members(*odd_ones: tarfile.TarInfo) -> bytes:
    """A good picture with its caption, and odd members behind them."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for name, data in captioned(1).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
        for member in odd_ones:
            shard.addfile(member, io.BytesIO(bytes(member.size)))
    return stream.getvalue()


def claiming(member: tarfile.TarInfo, size: int) -> bytes:
    """A member whose header says another size than it has."""
    member.size = size
    content = members().rstrip(b"\0")
    return content + bytes(-len(content) % 512) + member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def with_headers(**headers: str) -> tarfile.TarInfo:
    member = odd("000.json", size=512)
    member.pax_headers = {name.replace("_", "."): value for name, value in headers.items()}
    return member


HOSTILE = {
    "upward": members(odd("../evil.txt")),
    "upward inside": members(odd("x/../../evil.txt")),
    "upward by a header": members(with_headers(path="../evil.txt")),
    "absolute": members(odd("/etc/evil.txt")),
    "backslash": members(odd("x\\..\\evil.txt")),
    "link": members(odd("000.json", tarfile.SYMTYPE, "/etc/passwd")),
    "hard link": members(odd("000.json", tarfile.LNKTYPE, "000.txt")),
    "chain of links": members(
        odd("x", tarfile.SYMTYPE, "y"), odd("y", tarfile.SYMTYPE, "/etc"), odd("x/passwd", tarfile.LNKTYPE, "y/passwd")
    ),
    "character device": members(odd("000.json", tarfile.CHRTYPE)),
    "block device": members(odd("000.json", tarfile.BLKTYPE)),
    "fifo": members(odd("000.json", tarfile.FIFOTYPE)),
    "sparse, GNU": members(odd("000.json", tarfile.GNUTYPE_SPARSE)),
    "sparse, 1 TB": members(with_headers(GNU_sparse_size=str(1 << 40), GNU_sparse_map=f"0,512,{1 << 40},0")),
    "1 TB": claiming(odd("001.png"), 1 << 40),
    "a header of 1 GB": claiming(odd("x", tarfile.XHDTYPE), 1 << 30),
    "a name of 1 GB": claiming(odd("x", tarfile.GNUTYPE_LONGNAME), 1 << 30),
    "a negative size": claiming(odd("001.png"), -512),
    "twice": members(odd("000.txt")),
    "twice, spelt otherwise": members(odd("./000.txt")),
    "zero byte": members(with_headers(path="a\0b.txt")),
    "name of 4 kB": members(odd("a" * 4096 + ".txt")),
    "name of 4 kB, upward": members(odd("../" * 1300 + "evil.txt")),
    "name that is no UTF-8": members(odd("\udcff.txt")),
    "chain of headers": (
        odd("long", tarfile.GNUTYPE_LONGNAME, size=1).tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")
    )
    * 3000
    + bytes(1024),
    "cut off": members()[:4000],
    "not a tar": picture(0),
}


def tree(folder) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.soak("R12")
@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_refused_and_writes_nothing(tmp_path, monkeypatch, kind, packed):
    assert len(HOSTILE) >= 16
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(gzip.compress(HOSTILE[kind]) if packed else HOSTILE[kind])
    (tmp_path / "evil.txt").write_text("untouched")
    before = tree(tmp_path)
    for source in (path, path.parent):
        with pytest.raises(DataError, match=r"a\.tar") as refusal:
            open_pictures(source, size=32)
        assert type(refusal.value) is DataError
        assert len(str(refusal.value)) < 1000
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["a header of 1 GB", "a name of 1 GB"])
def test_a_header_is_refused_by_its_size_before_it_is_read(tmp_path, kind):
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(DataError, match="a header of 1073741824 bytes, allowed are 1048576"):
        open_pictures(path, size=32)


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", captioned(1), *(odd(f"n{index}.cls") for index in range(50)))
    monkeypatch.setattr(shards, "MAX_MEMBERS", 52)
    assert len(open_pictures(path, size=32)) == 1
    monkeypatch.setattr(shards, "MAX_MEMBERS", 51)
    with pytest.raises(DataError, match="more than the allowed 51 members"):
        open_pictures(path, size=32)


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
    pixels, content = plain.batch(range(3)), digest(plain)
    path = compressed(tmp_path / "a.tar")
    for source in (path, tmp_path):
        packed = open_pictures(source, size=32)
        assert (packed.keys, packed.captions, digest(packed)) == (plain.keys, plain.captions, content)
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


def test_a_compressed_shard_has_a_largest_size(tmp_path, monkeypatch):
    path = compressed(tar(tmp_path / "a.tar", captioned(1)))
    size = len(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", size)
    assert len(open_pictures(path, size=32)) == 1
    monkeypatch.setattr(shards, "MAX_UNPACKED_BYTES", size - 1)
    with pytest.raises(DataError, match=rf"more than {size - 1} bytes.*gunzip"):
        open_pictures(path, size=32)


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


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
def test_tars_that_were_joined_are_read_to_their_end(tmp_path, packed):
    joined = b""
    for part in range(3):
        files = {f"{part}{name}": data for name, data in captioned(2).items()}
        data = tar(tmp_path / f"{part}.tar", files).read_bytes()
        joined += gzip.compress(data) if packed else data
        (tmp_path / f"{part}.tar").unlink()

    path = tmp_path / ("a.tar.gz" if packed else "a.tar")
    path.write_bytes(joined)
    pictures = open_pictures(path, size=32)
    assert pictures.keys == ["0000", "0001", "1000", "1001", "2000", "2001"]
    assert [pictures.image(index).shape for index in range(6)] == [(3, 32, 32)] * 6


def test_what_stands_behind_the_end_of_a_shard_is_never_passed_over(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", captioned(1))
    data = path.read_bytes()
    for rest, message in [(b"no tar", "damaged or cut off"), (data, "twice"), (data[:700], r"a\.tar")]:
        path.write_bytes(data + rest)
        with pytest.raises(DataError, match=message):
            open_pictures(path, size=32)
    monkeypatch.setattr(shards, "MAX_PADDING_BYTES", 1 << 16)
    path.write_bytes(data + bytes(1 << 17))
    with pytest.raises(DataError, match="more than 65536 zeros"):
        open_pictures(path, size=32)
