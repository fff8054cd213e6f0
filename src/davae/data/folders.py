"""A folder as a source: every picture, archive and link below it is used, or refused by its name."""

import csv
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from davae.data.bounds import TOLD_KEYS, RowTexts, check_parquet, open_parquet
from davae.data.entries import CLASS_KEYS
from davae.data.pictures import Refusal
from davae.data.stored import (
    FileBytes,
    LocalFile,
    Sample,
    Samples,
    is_archive,
    must_be_told,
    parse_json,
    refuse_aside,
)
from davae.errors import DataError

# Tables about the pictures of a folder, joined by their column "file_name", as Hugging Face `datasets` has them.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Listing:
    """The samples of a source by their keys, and the files that are refused already."""

    samples: Samples
    refused: list[Refusal] = field(default_factory=list)
    # Whether the keys are paths in a folder of pictures, whose sub-folders may be classes.
    folders: bool = False
    # Whether the keys are numbers of rows, which say nothing about the pictures.
    numbered: bool = False


@dataclass(frozen=True)
class Tree:
    """A folder's pictures with their texts, at any depth, and the shards and tables that lie in the folder itself."""

    folder: Path
    listing: Listing = field(default_factory=lambda: Listing({}, folders=True))
    shards: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    # Each folder once, by its device and inode, with its name below `folder`.
    walked: dict[tuple[int, int], str] = field(default_factory=dict)

    def refuse(self, name: str, reason: str, **kind: Any) -> None:
        """Leave a file, a link or a folder out."""
        self.listing.refused.append(Refusal(name, reason, **kind))


def walk_folder(folder: Path) -> Tree:
    """Everything below `folder`; the key is the path without its suffix, as in "cats/tabby".

    Links are followed, to files and to folders, but each folder is listed once, under its own name if it has one below
    `folder`. Pictures that are no regular files are refused.
    """
    tree = Tree(folder)
    for parent in folder.resolve().parents:
        tree.walked[_identify(parent)] = ".."

    # Links last: what they lead to may be below `folder`, too.
    links = _walk(tree, folder)
    while links:
        links += _walk(tree, links.pop(0))

    # Tables at the very end: their rows belong to pictures that must be listed by then.
    for table in tree.metadata:
        if tree.shards or tree.tables:
            tree.refuse(
                _name(tree, table), "about files, and there are shards or parquet files; move it", kind="archive"
            )
        else:
            name = PurePosixPath(table.parent.relative_to(folder))
            tree.listing.refused.extend(_join(tree.listing.samples, table, name))
    return tree


def _walk(tree: Tree, top: Path) -> list[Path]:
    """List the folder `top` without following links; returns the links to folders."""

    def refuse(error: OSError) -> None:
        name = os.path.relpath(error.filename, tree.folder)
        tree.refuse(name, f"a folder that cannot be listed ({error.strerror}); mend its rights")

    links: list[Path] = []
    for parent, folders, names in os.walk(top, onerror=refuse):
        here, name = _identify(Path(parent)), _name(tree, Path(parent))
        if here in tree.walked:
            what = "leads above the set" if tree.walked[here] == ".." else f"is listed already, as {tree.walked[here]}"
            tree.refuse(name, f"a folder that {what}; remove the link", kind="link")
            folders.clear()
            continue

        # Hidden folders are walked for their pictures' names, but not left by links.
        tree.walked[here] = name
        for path in [Path(parent, name) for name in sorted(folders)]:
            if path.is_symlink():
                folders.remove(path.name)
                refusal = refuse_aside(path.relative_to(tree.folder))
                if refusal is None:
                    links.append(path)
                else:
                    tree.listing.refused.append(refusal)
        folders.sort()
        _add_files(tree, Path(parent), sorted(names))
    return links


def _add_files(tree: Tree, parent: Path, names: list[str]) -> None:
    # img2dataset puts a table about each shard beside it.
    shards = [name.removesuffix(".gz").removesuffix(".tar") for name in names if name.endswith((".tar", ".tar.gz"))]
    for name in names:
        if not (name.endswith(".parquet") and name.removesuffix(".parquet") in shards):
            _add_file(tree, parent / name)


def _identify(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _name(tree: Tree, path: Path) -> str:
    return path.relative_to(tree.folder).as_posix()


def _add_file(tree: Tree, path: Path) -> None:
    relative, suffix = path.relative_to(tree.folder), path.suffix.lower()
    name = relative.as_posix()
    refusal = refuse_aside(relative)
    try:
        name.encode()
        status = path.stat()
    except UnicodeEncodeError:
        tree.refuse(ascii(name), "its name is not UTF-8; rename it")
        return
    except OSError as error:
        reason = f"cannot be opened ({error.strerror}); mend or remove it"
        tree.listing.refused.append(refusal or Refusal(name, reason))
        return

    # Hidden files, and those that file servers keep.
    if refusal is not None:
        if must_be_told(name) or path.is_symlink():
            tree.listing.refused.append(refusal)
    elif not stat.S_ISREG(status.st_mode):
        if must_be_told(name) or path.name in METADATA:
            tree.refuse(name, "not a regular file; remove it")
    elif path.name in METADATA:
        tree.metadata.append(path)
    elif path.parent == tree.folder and name.endswith((".tar", ".tar.gz")):
        tree.shards.append(path)
    elif path.parent == tree.folder and suffix == ".parquet":
        tree.tables.append(path)
    elif is_archive(name):
        tree.refuse(name, "an archive beside or below the set; unpack it or give it by itself", kind="archive")
    else:
        # Texts and pictures of one name are one sample.
        sample = tree.listing.samples.setdefault(relative.with_suffix("").as_posix(), Sample())
        sample.add(suffix, FileBytes(name, LocalFile(str(path)), 0, status.st_size))


def _join(samples: Samples, table: Path, folder: PurePosixPath) -> Iterator[Refusal]:
    """Give each row of a table to its picture; yields the rows that have none."""
    texts = RowTexts(str(folder / table.name))
    for place, row in _read_table(table):
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
            # The last row counts.
            if sample.row_place:
                reason = f"a later row, {table.name}, {place}, is about the same file; one row for each"
                yield Refusal(sample.row_place, f"{path.as_posix()}: {reason}", "same name")
            sample.row, sample.row_place = texts.keep(row), f"{folder / table.name}, {place}"


def _read_table(table: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places; None in place of a line that is no row."""
    if table.suffix == ".jsonl":
        with table.open("rb") as stream:
            for number, line in enumerate(iter(partial(stream.readline, MAX_LINE_BYTES + 1), b""), 1):
                if line.strip():
                    yield f"line {number}", _parse_line(line)
        return

    if table.suffix == ".csv":
        yield from _read_csv(table)
        return

    # A parquet file is read a hundred rows at a time.
    check_parquet(table)
    with open_parquet(table) as file:
        columns = [name for name in file.schema_arrow.names if name in ("file_name", *TOLD_KEYS)]
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=100, columns=columns))
        for number, row in enumerate(chain.from_iterable(batches), 1):
            yield f"row {number}", row


def _read_csv(table: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places; all cells are text, and those of classes numbers if they are digits alone."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            for number, cells in enumerate(csv.DictReader(stream), 1):
                row: dict[str, Any] = {name: cell for name, cell in cells.items() if isinstance(name, str) and cell}
                for key in CLASS_KEYS:
                    if re.fullmatch("[0-9]{1,9}", row.get(key, "")):
                        row[key] = int(row[key])
                yield f"row {number}", row
    except (csv.Error, ValueError) as error:
        raise DataError(f"{table}: no sound table in UTF-8 ({error}); mend it") from error


def _parse_line(line: bytes) -> Any:
    with suppress(ValueError):
        if len(line) <= MAX_LINE_BYTES:
            return parse_json(line.decode("utf-8-sig"))
    return None
