"""Encoded pictures and the texts beside them, wherever they lie."""

import errno
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from davae.data.pictures import PictureRefused, Refusal, Stream
from davae.errors import DataError, SettingsError
from davae.run import faults

PICTURE_SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp "
    # Pictures that are not read: listed, so that they are refused by name rather than passed over in silence.
    ".avif .cr2 .dng .eps .heic .heif .ico .jp2 .jxl .nef .psd .svg .tga".split()
)
# Of those at the end of a name, in small letters, only .tar, .tar.gz and .parquet can be sources.
ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".parquet")
# Folders in which file servers and systems keep thumbnails and deleted files.
SERVER_FOLDERS = frozenset(
    "@eadir @tmp @recycle @recently-snapshot #recycle #snapshot $recycle.bin __macosx lost+found".split()
)
TEXT_SUFFIXES = (".txt", ".caption", ".json", ".cls")

# Bytes that are fetched at once to see the header of a remote picture.
HEADER_BYTES = 1 << 15
# How often a file is tried, with pauses of a second and then two, before it is an error.
ATTEMPTS = 3
# Errors of a disk, or of a mount, that may pass.
PASSING = (errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)

T = TypeVar("T")


# --------------------------------------------------------------------------------------------------------------- files


def try_often(action: Callable[[], T]) -> T:
    """The result of `action`, which reads a local file and is tried again after an error that may pass."""
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(attempt)
    return action()


def explain_unreadable(error: OSError) -> str:
    """Why a local file cannot be read, and how to mend it."""
    if error.errno in PASSING:
        return f"cannot be read, {ATTEMPTS} times tried ({error.strerror}); look at its disk or mount, and run again"
    return f"cannot be read ({error.strerror}); mend its rights"


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine by its path, or the content of a compressed one in memory."""

    name: str
    unpacked: bytes | None = field(default=None, repr=False, compare=False)

    def open(self) -> Stream:
        """A stream of all bytes."""
        faults.at("read")
        return Path(self.name).open("rb") if self.unpacked is None else io.BytesIO(self.unpacked)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`, or fewer where the file ends."""
        with self.open() as stream:
            stream.seek(start)
            return stream.read(end - start)


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL, any that fsspec knows: s3://, gs://, hf://, https://, file://, memory://, ..."""

    name: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return url_to_fs(self.name)

    @cached_property
    def size(self) -> int:
        """In bytes; what is no regular file is a DataError."""
        facts = self._try(lambda files, path: files.info(path))
        if facts["type"] != "file" or facts["size"] is None:
            raise DataError(f"{self.name} is no regular file of a known size; give one")
        return int(facts["size"])

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`, or a DataError."""
        data = self._try(lambda files, path: files.cat_file(path, start=start, end=end))
        if len(data) != end - start:
            raise DataError(f"{self.name}: {len(data)} bytes instead of {end - start} at {start}; is it complete?")
        return data

    def open(self, start: int = 0, end: int | None = None) -> Stream:
        """A seekable stream of the bytes from `start` to before `end`."""
        return io.BufferedReader(_Part(self, start, self.size if end is None else end))

    def matches(self) -> list["RemoteFile"]:
        """The files that this URL, a pattern with *, stands for, in sorted order."""
        urls = self._try(lambda files, path: list(map(files.unstrip_protocol, sorted(files.glob(path)))))
        return list(map(RemoteFile, urls))

    def _try(self, action: Callable[[Any, str], Any]) -> Any:
        try:
            files, path = self._place
        except (ImportError, ValueError) as error:
            raise SettingsError(f"{self.name}: {error}; install what reads such URLs, or give a path") from error

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action(files, path)
            except FileNotFoundError as error:
                raise DataError(f"{self.name} is not there; mend the URL") from error
            except Exception as error:  # every store raises its own
                if attempt == ATTEMPTS:
                    reason = f"{type(error).__name__}: {error}"
                    raise DataError(f"{self.name} cannot be read, {attempt} times tried ({reason})") from error
            time.sleep(attempt)
        raise AssertionError("the last attempt returns or raises")


class _Part(AbstractBufferedFile):
    """A part of a remote file, which is fetched `HEADER_BYTES` ahead."""

    def __init__(self, file: RemoteFile, begin: int, end: int) -> None:
        super().__init__(None, file.name, block_size=HEADER_BYTES, size=end - begin)
        self._file, self._begin = file, begin

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._file.read(self._begin + start, self._begin + end)


# --------------------------------------------------------------------------------------------------- pictures and texts


@dataclass(frozen=True)
class FileBytes:
    """A part of a file: all of it, or the content of a shard's member. `name` is its path inside the source."""

    name: str
    file: LocalFile | RemoteFile
    offset: int
    length: int

    def read(self) -> bytes:
        """All of the bytes, or a PictureRefused if they have changed since they were listed."""
        try:
            data = try_often(lambda: self.file.read(self.offset, self.offset + self.length))
        except OSError as error:
            raise PictureRefused(self.name, explain_unreadable(error)) from error
        if len(data) != self.length:
            raise PictureRefused(self.name, "shorter than when it was listed; leave the files alone while in use")
        return data

    def open(self) -> Stream:
        """A seekable stream that begins with the bytes, and need not fetch them all."""
        if isinstance(self.file, RemoteFile):
            return self.file.open(self.offset, self.offset + self.length)
        return io.BytesIO(self.read()) if self.offset else self.file.open()


@dataclass(frozen=True)
class CellBytes:
    """The content of a cell in a table, which `read` fetches anew at every call."""

    name: str
    read: Callable[[], bytes] = field(repr=False, compare=False)

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return len(self.read())

    def open(self) -> Stream:
        """A seekable stream of the bytes."""
        return io.BytesIO(self.read())


StoredBytes = FileBytes | CellBytes


@dataclass
class Sample:
    """The content of a source under one key: encoded pictures, texts by suffix, and the row of a table."""

    pictures: list[StoredBytes] = field(default_factory=list)
    texts: dict[str, StoredBytes] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    # Where the row stands, if it came from a table beside the picture.
    row_place: str = ""

    def add(self, suffix: str, content: StoredBytes) -> None:
        """Take one file in, by its suffix; files that are neither pictures nor texts are passed over."""
        if suffix in PICTURE_SUFFIXES:
            self.pictures.append(content)
        elif suffix in TEXT_SUFFIXES:
            self.texts[suffix] = content


Samples = dict[str, Sample]


def is_archive(name: str) -> bool:
    """Whether a name is that of an archive or of a table of pictures."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def must_be_told(name: str) -> bool:
    """Whether a file of this name is refused by name where it is not used."""
    return name.lower().endswith((*PICTURE_SUFFIXES, *ARCHIVE_SUFFIXES))


def refuse_aside(path: PurePath) -> Refusal | None:
    """A refusal if the path inside a source is hidden or one that file servers keep for themselves."""
    for part in path.parts:
        if part.lower() in SERVER_FOLDERS:
            return Refusal(path.as_posix(), f"in {part}, a folder of file servers; take the set out of it", "hidden")
        if part.startswith(".") and part not in (".", ".."):
            return Refusal(path.as_posix(), f"hidden, since {part} begins with a dot; rename it to use it", "hidden")
    return None


def parse_json(text: str) -> Any:
    """The value in a JSON text, or a ValueError; escapes can spell half characters, which are no text."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return value
