"""The content of a source, listed without decoding: a folder, shards, a table of rows; on this machine or elsewhere."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from davae.data.pictures import Refusal
from davae.data.rows import SCHEME, is_rows, list_rows, load_parquet, load_rows, load_saved
from davae.data.shards import list_shards, remote_shards
from davae.data.stored import PICTURE_SUFFIXES, FileBytes, LocalFile, Sample, Samples, parse_json
from davae.errors import DataError, SettingsError

# A folder, a shard or a parquet file; a URL of shards; `datasets:NAME`; or a dataset of Hugging Face `datasets`.
PictureSource = Path | str | Any

# Tables about the pictures of a folder, joined by their column "file_name", as Hugging Face `datasets` has them.
METADATA = ("metadata.jsonl", "metadata.parquet")
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Listing:
    """The samples of a source by their keys, and the files that are refused already."""

    samples: Samples
    refused: list[Refusal] = field(default_factory=list)
    # Whether the keys are paths in a folder of pictures, whose sub-folders may be classes.
    folders: bool = False


def list_source(source: PictureSource) -> Listing:
    """Find out by its content what a source is, and list it."""
    if is_rows(source):
        return Listing(list_rows(source, "the dataset"))
    if isinstance(source, str) and source.startswith(SCHEME):
        return Listing(list_rows(load_rows(source), source))
    if isinstance(source, str) and "://" in source:
        return Listing(list_shards(remote_shards(source)))

    # Anything else is a path.
    path = Path(source)
    if path.is_dir():
        return _list_folder(path)
    if not path.is_file():
        allowed = f"the path of a folder, a tar shard or a parquet file, a URL of shards, or {SCHEME}NAME"
        raise DataError(f"{path} is no folder and no file; allowed is {allowed}")
    if path.suffix == ".parquet":
        return Listing(list_rows(load_parquet([path]), str(path)))
    return Listing(list_shards([LocalFile(str(path))]))


def _list_folder(folder: Path) -> Listing:
    """A folder of shards, of parquet files, of a saved dataset, or of pictures."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Listing(list_rows(load_saved(folder), str(folder)))

    shards = sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")])
    tables = sorted(path for path in folder.glob("*.parquet") if path.name != "metadata.parquet")
    if not shards and not tables:
        return _list_pictures(folder)

    # A folder with several kinds of content is more likely a mistake than a choice.
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
    contents = {"shards": shards, "parquet files": tables, "pictures": pictures}
    kinds = [kind for kind, files in contents.items() if files]
    if len(kinds) > 1:
        raise DataError(f"{folder} holds both {' and '.join(kinds)}; move either to a folder of its own")
    if shards:
        return Listing(list_shards([LocalFile(str(path)) for path in shards]))
    return Listing(list_rows(load_parquet(tables), str(folder)))


# ------------------------------------------------------------------------------------------------- folders of pictures


def _list_pictures(folder: Path) -> Listing:
    """Everything below `folder` that is not hidden; the key is the path without its suffix, as in "cats/tabby".

    Links to files are followed, links to folders are not. Pictures that are no regular files are refused.
    """
    listing = Listing({}, folders=True)
    tables: list[Path] = []

    def refuse(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        listing.refused.append(Refusal(name, f"a folder that cannot be listed ({error.strerror}); mend its rights"))

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tables += [Path(parent, name) for name in METADATA if name in names]
        for name in sorted(names):
            if not name.startswith(".") and name not in METADATA:
                _add_file(listing, Path(parent, name), folder)

    # Tables come last: their rows belong to pictures that must be listed by then.
    for table in tables:
        listing.refused.extend(_join(listing.samples, table, PurePosixPath(table.parent.relative_to(folder))))
    return listing


def _add_file(listing: Listing, path: Path, folder: Path) -> None:
    relative, suffix = path.relative_to(folder), path.suffix.lower()
    name = relative.as_posix()
    try:
        name.encode()
        status = path.stat()
    except UnicodeEncodeError:
        listing.refused.append(Refusal(ascii(name), "its name is not UTF-8; rename it"))
        return
    except OSError as error:
        listing.refused.append(Refusal(name, f"cannot be opened ({error.strerror}); mend or remove it"))
        return

    # Texts and pictures of one name are one sample.
    if stat.S_ISREG(status.st_mode):
        sample = listing.samples.setdefault(relative.with_suffix("").as_posix(), Sample())
        sample.add(suffix, FileBytes(name, LocalFile(str(path)), 0, status.st_size))
    elif suffix in PICTURE_SUFFIXES:
        listing.refused.append(Refusal(name, "not a regular file; remove it"))


def _join(samples: Samples, table: Path, folder: PurePosixPath) -> Iterator[Refusal]:
    """Give each row of a table to its picture; yields the rows that have none."""
    for place, row in _read_rows(table):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            yield Refusal(f"{folder / table.name}, {place}", 'no object with a "file_name"; mend it', "text")
            continue

        # The picture of exactly this name, not one of another format beside it.
        path = folder / name
        sample = samples.get(path.with_suffix("").as_posix() if path.name else "")
        if sample is None or path.as_posix() not in [picture.name for picture in sample.pictures]:
            shown = ascii(path.as_posix())[1:-1][:200]
            yield Refusal(shown, f"{table.name} names it, and it is not there; bring it or take its row out", "missing")
        else:
            sample.row = row


def _read_rows(table: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places; None in place of a line that is no row."""
    if table.suffix == ".jsonl":
        with table.open("rb") as stream:
            for number, line in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), 1):
                if line.strip():
                    yield f"line {number}", _parse_line(line)
        return

    # A parquet file is read a thousand rows at a time.
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise SettingsError(f"{table} needs pyarrow: pip install 'davae[datasets]'") from error
    try:
        with parquet.ParquetFile(table) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1000))
            for number, row in enumerate(chain.from_iterable(batches), 1):
                yield f"row {number}", row
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{table}: no sound parquet file ({error}); make or download it again") from error


def _parse_line(line: bytes) -> Any:
    with suppress(ValueError):
        if len(line) <= MAX_LINE_BYTES:
            return parse_json(line.decode("utf-8-sig"))
    return None
