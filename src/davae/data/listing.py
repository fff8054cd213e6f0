"""The pictures and captions of a folder or of a WebDataset shard, listed without decoding; nothing goes to disk."""

import gzip
import os
import stat
import tarfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath

from davae.data.pictures import PictureRefused
from davae.errors import DataError

PICTURE_SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp "
    # pictures that are not read: listed, so that they are refused by name rather than passed over in silence
    ".avif .cr2 .dng .eps .heic .heif .ico .jp2 .jxl .nef .psd .svg .tga".split()
)

MAX_UNPACKED_BYTES = 1 << 30
"""Of one compressed shard, which stays in memory while its set is in use."""


@dataclass(frozen=True)
class Refusal:
    """A picture that is left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class StoredBytes:
    """A run of bytes on disk: a file, or the content of a shard's member."""

    name: str
    """What messages call it: the path inside the source."""
    path: Path
    offset: int
    length: int
    memory: bytes | None = field(default=None, repr=False, compare=False)
    """What `offset` counts in, if it is not the file itself: the shard in `path`, unpacked."""

    def read(self) -> bytes:
        """All of them.

        Raises:
            PictureRefused: the file is gone, unreadable, or shorter than when it was listed.
        """
        try:
            with self.path.open("rb") if self.memory is None else BytesIO(self.memory) as stream:
                stream.seek(self.offset)
                data = stream.read(self.length)
        except OSError as error:
            raise PictureRefused(self.name, f"cannot be read ({error.strerror}); mend its rights") from error
        if len(data) != self.length:
            raise PictureRefused(self.name, "shorter than when it was listed; leave the files alone while in use")
        return data


@dataclass
class Sample:
    """What a source holds under one key: encoded pictures, a `.txt`, a `.json` and a `.cls`."""

    pictures: list[StoredBytes] = field(default_factory=list)
    texts: dict[str, StoredBytes] = field(default_factory=dict)

    def add(self, suffix: str, content: StoredBytes) -> None:
        """Take one file in, by its suffix; what is neither a picture nor one of the three texts is passed over."""
        if suffix in PICTURE_SUFFIXES:
            self.pictures.append(content)
        elif suffix in (".txt", ".json", ".cls"):
            self.texts[suffix] = content


Samples = dict[str, Sample]


def list_folder(folder: Path) -> tuple[Samples, list[Refusal]]:
    """Everything below `folder` that is not hidden; the key is the path without its suffix, as in "cats/tabby".

    Links to files are followed, links to folders are not. What is not a regular file is refused.
    """
    samples: Samples = {}
    refused: list[Refusal] = []

    def refuse(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        refused.append(Refusal(name, f"a folder that cannot be listed ({error.strerror}); mend its rights"))

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            relative = path.relative_to(folder)
            suffix = path.suffix.lower()
            try:
                relative.as_posix().encode()
                status = path.stat()
            except UnicodeEncodeError:
                refused.append(Refusal(ascii(relative.as_posix()), "its name is not UTF-8; rename it"))
                continue
            except OSError as error:
                refused.append(Refusal(relative.as_posix(), f"cannot be opened ({error.strerror}); mend or remove it"))
                continue
            if stat.S_ISREG(status.st_mode):
                content = StoredBytes(relative.as_posix(), path, 0, status.st_size)
                samples.setdefault(relative.with_suffix("").as_posix(), Sample()).add(suffix, content)
            elif suffix in PICTURE_SUFFIXES:
                refused.append(Refusal(relative.as_posix(), "not a regular file; remove it"))
    return samples, refused


def list_shard(path: Path) -> Samples:
    """The members of one shard, in its order, by WebDataset's key: the path up to the name's first dot.

    Of a plain tar nothing is unpacked, and of each member only its place in the file is kept. A `.tar.gz` is unpacked
    into memory, never to disk.

    Raises:
        DataError: the tar is damaged or cut off, or it is compressed and not named `.tar.gz`, or unpacked it has more
            than `MAX_UNPACKED_BYTES`; or it holds a link, a device or another thing that is no plain file, a name that
            is absolute or leads upward, or a name twice. A tar that does is not to be trusted.
    """
    memory = _unpack(path) if path.name.endswith(".gz") else None
    size = path.stat().st_size if memory is None else len(memory)
    samples: Samples = {}
    seen: set[str] = set()
    try:
        stream = None if memory is None else BytesIO(memory)
        with tarfile.open(path, "r:", fileobj=stream, encoding="utf-8", errors="strict") as shard:
            for member in shard:
                if member.isdir():
                    continue
                _check_member(path, member, seen, size)
                name = PurePosixPath(member.name)
                stem, dot, suffix = name.name.partition(".")
                content = StoredBytes(f"{path.name}/{name}", path, member.offset_data, member.size, memory)
                samples.setdefault((name.parent / stem).as_posix(), Sample()).add((dot + suffix).lower(), content)
            end = shard.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: no sound, uncompressed tar ({error}); make or download it again") from error
    # tarfile stops without a word where a header is damaged or missing
    if StoredBytes(path.name, path, end, max(0, min(512, size - end)), memory).read() != bytes(512):
        raise DataError(f"{path}: damaged or cut off at byte {end}; make or download it again")
    return samples


def _unpack(path: Path) -> bytes:
    try:
        with gzip.open(path) as stream:
            data = stream.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: no sound gzip file ({error}); make or download it again") from error
    if len(data) > MAX_UNPACKED_BYTES:
        raise DataError(
            f"{path}: more than {MAX_UNPACKED_BYTES} bytes when unpacked, the most of one compressed shard; "
            "gunzip it: a plain tar of any size is read in place"
        )
    return data


def _check_member(path: Path, member: tarfile.TarInfo, seen: set[str], size: int) -> None:
    place = f"{path}: member {member.name!r}"
    name = PurePosixPath(member.name)
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise DataError(f"{place} is no plain file; only plain files are allowed, so make the shard again without it")
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise DataError(f"{place} has a name that leads out of the shard; only relative names without .. are allowed")
    if name.as_posix() in seen:
        raise DataError(f"{place} is there twice; every name must be there once, so make the shard again")
    if member.offset_data + member.size > size:
        raise DataError(f"{place} is longer than the file; make or download the shard again")
    seen.add(name.as_posix())
