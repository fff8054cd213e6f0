"""WebDataset shards, on this machine or at a URL, listed without unpacking: nothing goes to disk."""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from davae.data.pictures import Refusal, Stream
from davae.data.stored import (
    PICTURE_SUFFIXES,
    FileBytes,
    LocalFile,
    RemoteFile,
    Sample,
    Samples,
    is_archive,
    must_be_told,
    refuse_aside,
)
from davae.errors import DataError, DavaeError

# All compressed shards of a set once unpacked: they stay in memory while it is in use.
MAX_UNPACKED_BYTES = 1 << 30
# What a sample of such a shard takes beside its bytes, rounded up.
SAMPLE_BYTES = 1 << 12
# Most members of one shard; shards of WebDataset have about ten thousand.
MAX_MEMBERS = 200_000
# Most shards that a range in a URL stands for.
MAX_SHARDS = 100_000
MAX_NAME_BYTES = 1024
# Longest extended header of a member, which is read into memory.
MAX_HEADER_BYTES = 1 << 20
# Most zeros behind the end of a tar; another tar may follow them.
MAX_PADDING_BYTES = 1 << 24


def list_shards(shards: Sequence[LocalFile | RemoteFile]) -> tuple[Samples, list[Refusal]]:
    """The members of several shards, in their order, by WebDataset's key: the path up to the name's first dot.

    A plain tar is read in place; at a URL only the members' headers are fetched. A `.tar.gz` is unpacked into memory,
    never to disk. Pictures and archives that have no place in a sample are refused by name.
    """
    samples: Samples = {}
    refused: list[Refusal] = []
    unpacked = 0
    for shard in shards:
        file: LocalFile | RemoteFile = shard
        if shard.name.endswith(".gz"):
            file = _unpack(shard, MAX_UNPACKED_BYTES - unpacked)
            unpacked += len(file.unpacked or b"")
        members = _list_shard(shard, file, refused)
        unpacked += SAMPLE_BYTES * len(members) if file is not shard else 0
        for key in members.keys() & samples.keys():
            raise DataError(f"{shard.name}: its key {key!r} is in an earlier shard too; every key must be there once")
        samples |= members
    return samples, refused


def _list_shard(shard: LocalFile | RemoteFile, file: LocalFile | RemoteFile, refused: list[Refusal]) -> Samples:
    short = shard.name.rpartition("/")[2]
    samples: Samples = {}
    dotted: list[tuple[str, str, str]] = []

    # Every member is a place in the file.
    try:
        with file.open() as stream:
            for member in _members(stream, shard.name):
                path = PurePosixPath(member.name)
                stem, dot, suffix = path.name.partition(".")
                key, name = (path.parent / stem).as_posix(), f"{short}/{path}"
                if aside := refuse_aside(path):
                    if must_be_told(path.name):
                        refused.append(replace(aside, name=name))
                    continue

                sample = samples.setdefault(key, Sample())
                content = FileBytes(name, file, member.offset_data, member.size)
                sample.add((dot + suffix).lower(), content)
                if "." in suffix and path.suffix.lower() in PICTURE_SUFFIXES:
                    dotted.append((key, suffix, name))
                elif is_archive(path.name):
                    refused.append(Refusal(name, "an archive in a shard; unpack it and give it by itself", "archive"))
    except DavaeError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise DataError(f"{shard.name}: no sound, uncompressed tar ({error}); make or download it again") from error

    # Beside a picture of their key they are further fields of its sample; alone they are lost pictures.
    for key, suffix, name in dotted:
        reason = f"WebDataset cuts names at the first dot, so this is the field {suffix!r} of {key!r}; "
        if samples[key].pictures:
            refused.append(Refusal(name, f"{reason}{samples[key].pictures[0].name} is its picture", "same name"))
        else:
            refused.append(Refusal(name, f"{reason}rename it so that its only dot is that of its suffix", "format"))
    return samples


def remote_shards(url: str) -> list[RemoteFile]:
    """The shards of a URL: one, a range such as `train-{0000..0099}.tar`, a pattern with `*`, or a folder's."""
    if span := re.search(r"\{(\d+)\.\.(\d+)\}", url):
        # Numbers keep their leading zeros.
        first, last = span.groups()
        if int(last) - int(first) >= MAX_SHARDS:
            raise DataError(f"{url}: allowed is a range of at most {MAX_SHARDS} shards")
        numbered: list[RemoteFile] = []
        for number in range(int(first), int(last) + 1):
            numbered += remote_shards(url.replace(span.group(), str(number).zfill(len(first)), 1))
        return numbered

    if "*" not in url and url.endswith((".tar", ".tar.gz")):
        return [RemoteFile(url)]
    folder = url.rstrip("/")
    patterns = [url] if "*" in url else [f"{folder}/*.tar", f"{folder}/*.tar.gz"]
    shards = [shard for pattern in patterns for shard in RemoteFile(pattern).matches()]
    if not shards:
        raise DataError(f"{url} holds no shards; give the URL of a .tar, of a folder of them, or a pattern")
    return shards


class _Headers:
    """The stream from which tarfile reads headers, without those that would fill the memory."""

    def __init__(self, stream: Stream) -> None:
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes, allowed are {MAX_HEADER_BYTES}")
        return self._stream.read(size)


def _members(stream: Stream, shard: str) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, or of several that were joined by `cat`, each checked; every end is checked, too."""
    size = stream.seek(0, io.SEEK_END)
    headers: Any = _Headers(stream)
    seen: set[str] = set()
    start: int | None = 0
    while start is not None:
        stream.seek(start)
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="strict") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # there may be a million
                if not member.isdir():
                    _check_member(shard, member, seen, size)
                    yield member
            end = tar.offset

        # tarfile stops without an error where a header is damaged or missing.
        stream.seek(end)
        if stream.read(512) != bytes(512):
            raise DataError(f"{shard}: damaged or cut off at byte {end}; make or download it again")
        start = _find_next_tar(stream, end + 512, shard)


def _find_next_tar(stream: Stream, start: int, shard: str) -> int | None:
    """The first block from `start` that is not zero, or None if there is none."""
    for place in range(start, start + MAX_PADDING_BYTES, 1 << 15):
        blocks = stream.read(1 << 15)
        if not blocks:
            return None
        if rest := blocks.lstrip(b"\0"):
            return place + (len(blocks) - len(rest)) // 512 * 512
    raise DataError(f"{shard}: more than {MAX_PADDING_BYTES} zeros from byte {start}; make or download it again")


def _unpack(shard: LocalFile | RemoteFile, allowed: int) -> LocalFile:
    try:
        with shard.open() as packed, gzip.open(packed) as stream:
            data = stream.read(allowed + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shard.name}: no sound gzip file ({error}); make or download it again") from error
    if len(data) > allowed:
        reason = f"with it the compressed shards have more than {MAX_UNPACKED_BYTES} bytes when unpacked; gunzip them: "
        reason += "plain tars may have any size"
        raise DataError(f"{shard.name}: {reason}")
    return LocalFile(shard.name, data)


def _check_member(shard: str, member: tarfile.TarInfo, seen: set[str], size: int) -> None:
    """Refuse a member that no honest shard has."""
    place = f"{shard}: member {member.name[:100]!r}"
    name = PurePosixPath(member.name)

    # Nothing but plain files, at places inside the shard.
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise DataError(f"{place} is no plain file; only plain files are allowed, so make the shard again without it")
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{place} has a name that leads out of the shard; only relative names without .. are allowed")
    if len(member.name.encode()) > MAX_NAME_BYTES:
        raise DataError(f"{place} has a name of more than the allowed {MAX_NAME_BYTES} bytes; shorten it")
    # Each once, and all of it there.
    if name.as_posix() in seen:
        raise DataError(f"{place} is there twice; every name must be there once, so make the shard again")
    if member.offset_data + member.size > size:
        raise DataError(f"{place} is longer than the file; make or download the shard again")

    seen.add(name.as_posix())
    if len(seen) > MAX_MEMBERS:
        raise DataError(f"{shard}: more than the allowed {MAX_MEMBERS} members; split it into several shards")
