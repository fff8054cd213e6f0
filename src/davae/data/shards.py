"""WebDataset shards, here or at a URL, listed without unpacking: nothing goes to disk."""

import gzip
import io
import re
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from davae.data.pictures import Stream
from davae.data.stored import FileBytes, RemoteBytes, RemoteFile, Sample, Samples, StoredBytes
from davae.errors import DataError, DavaeError

MAX_UNPACKED_BYTES = 1 << 30
"""Of one compressed shard, which stays in memory while its set is in use."""
MAX_MEMBERS = 1_000_000
"""Of one shard."""
MAX_NAME_BYTES = 1024
MAX_HEADER_BYTES = 1 << 20
"""Of one member's extended header, which is read into memory."""


def list_shards(shards: list[Path] | list[RemoteFile]) -> Samples:
    """The members of several shards, in their order.

    Raises:
        DataError: as `list_shard`, or a key is in two of them.
    """
    samples: Samples = {}
    for shard in shards:
        listed = list_shard(shard)
        for key in listed.keys() & samples.keys():
            raise DataError(f"{_name(shard)}: its key {key!r} is in an earlier shard too; every key must be there once")
        samples |= listed
    return samples


def list_shard(shard: Path | RemoteFile) -> Samples:
    """The members of one shard, in its order, by WebDataset's key: the path up to the name's first dot.

    Of a plain tar nothing is unpacked, and of each member only its place in the file is kept; at a URL only the
    members' headers are fetched. A `.tar.gz` is unpacked into memory, never to disk.

    Raises:
        DataError: the tar is damaged or cut off, or it is compressed and not named `.tar.gz`, or unpacked it has more
            than `MAX_UNPACKED_BYTES`; or it holds a link, a device or another thing that is no plain file, a name that
            is absolute, leads upward or is too long, a name twice, or too many members. A tar that does is not to be
            trusted.
    """
    name = _name(shard)
    short = name.rpartition("/")[2]
    memory = _unpack(shard) if short.endswith(".gz") else None
    samples: Samples = {}
    seen: set[str] = set()
    try:
        with io.BytesIO(memory) if memory is not None else _open(shard) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            headers: Any = _Headers(stream)
            with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="strict") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    if member.isdir():
                        continue
                    _check_member(name, member, seen, size)
                    path = PurePosixPath(member.name)
                    stem, dot, suffix = path.name.partition(".")
                    place: StoredBytes
                    if memory is None and isinstance(shard, RemoteFile):
                        place = RemoteBytes(f"{short}/{path}", shard, member.offset_data, member.size)
                    else:
                        local = shard if isinstance(shard, Path) else Path(short)
                        place = FileBytes(f"{short}/{path}", local, member.offset_data, member.size, memory)
                    samples.setdefault((path.parent / stem).as_posix(), Sample()).add((dot + suffix).lower(), place)
                end = tar.offset
            # tarfile stops without a word where a header is damaged or missing
            stream.seek(end)
            if stream.read(512) != bytes(512):
                raise DataError(f"{name}: damaged or cut off at byte {end}; make or download it again")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, DavaeError):
            raise
        raise DataError(f"{name}: no sound, uncompressed tar ({error}); make or download it again") from error
    return samples


def remote_shards(url: str) -> list[RemoteFile]:
    """The shards of a URL: one, a numbered range such as `train-{0000..0099}.tar`, a pattern with `*`, or a folder's.

    Raises:
        DataError: there are none.
    """
    span = re.search(r"\{(\d+)\.\.(\d+)\}", url)
    if span is not None:
        first, last = span.groups()
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        return [shard for number in numbers for shard in remote_shards(url.replace(span.group(), number, 1))]
    if "*" in url:
        found = RemoteFile(url).matches()
    elif url.endswith((".tar", ".tar.gz")):
        found = [RemoteFile(url)]
    else:
        folder = url.rstrip("/")
        found = [*RemoteFile(f"{folder}/*.tar").matches(), *RemoteFile(f"{folder}/*.tar.gz").matches()]
    if not found:
        raise DataError(f"{url} holds no shards; give the URL of a .tar, of a folder of them, or a pattern")
    return found


class _Headers:
    """What tarfile reads headers from: it reads nothing else, and would read one of any size."""

    def __init__(self, stream: Stream) -> None:
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, allowed are {MAX_HEADER_BYTES}")
        return self._stream.read(size)


def _name(shard: Path | RemoteFile) -> str:
    return shard.url if isinstance(shard, RemoteFile) else str(shard)


def _open(shard: Path | RemoteFile) -> Stream:
    return shard.open() if isinstance(shard, RemoteFile) else shard.open("rb")


def _unpack(shard: Path | RemoteFile) -> bytes:
    name = _name(shard)
    try:
        with _open(shard) as packed, gzip.open(packed) as stream:
            data = stream.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: no sound gzip file ({error}); make or download it again") from error
    if len(data) > MAX_UNPACKED_BYTES:
        raise DataError(
            f"{name}: more than {MAX_UNPACKED_BYTES} bytes when unpacked, the most of one compressed shard; "
            "gunzip it: a plain tar of any size is read in place"
        )
    return data


def _check_member(shard: str, member: tarfile.TarInfo, seen: set[str], size: int) -> None:
    place = f"{shard}: member {member.name[:100]!r}"
    name = PurePosixPath(member.name)
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise DataError(f"{place} is no plain file; only plain files are allowed, so make the shard again without it")
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{place} has a name that leads out of the shard; only relative names without .. are allowed")
    if len(member.name.encode()) > MAX_NAME_BYTES:
        raise DataError(f"{place} has a name of more than the allowed {MAX_NAME_BYTES} bytes; shorten it")
    if name.as_posix() in seen:
        raise DataError(f"{place} is there twice; every name must be there once, so make the shard again")
    if member.offset_data + member.size > size:
        raise DataError(f"{place} is longer than the file; make or download the shard again")
    seen.add(name.as_posix())
    if len(seen) > MAX_MEMBERS:
        raise DataError(f"{shard}: more than the allowed {MAX_MEMBERS} members; split it into several shards")
