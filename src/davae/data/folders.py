"""A folder of pictures with their texts beside them or in a table, listed without decoding."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from davae.data.stored import PICTURE_SUFFIXES, FileBytes, Refusal, Sample, Samples
from davae.errors import DataError, SettingsError

METADATA = ("metadata.jsonl", "metadata.parquet")
"""A table of what is said about the pictures of a folder, by its column "file_name", as Hugging Face `datasets` has."""
MAX_LINE_BYTES = 1 << 20


def list_folder(folder: Path) -> tuple[Samples, list[Refusal]]:
    """Everything below `folder` that is not hidden; the key is the path without its suffix, as in "cats/tabby".

    Links to files are followed, links to folders are not. What is not a regular file is refused.

    Raises:
        DataError: a `metadata.parquet` is damaged.
        SettingsError: there is one, and pyarrow is not installed.
    """
    samples: Samples = {}
    refused: list[Refusal] = []
    tables: list[Path] = []

    def refuse(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        refused.append(Refusal(name, f"a folder that cannot be listed ({error.strerror}); mend its rights"))

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        tables += [Path(parent, name) for name in METADATA if name in names]
        for name in sorted(name for name in names if not name.startswith(".") and name not in METADATA):
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
                content = FileBytes(relative.as_posix(), path, 0, status.st_size)
                samples.setdefault(relative.with_suffix("").as_posix(), Sample()).add(suffix, content)
            elif suffix in PICTURE_SUFFIXES:
                refused.append(Refusal(relative.as_posix(), "not a regular file; remove it"))
    for table in tables:
        refused += _join(samples, table, PurePosixPath(table.parent.relative_to(folder).as_posix()))
    return samples, refused


def _join(samples: Samples, table: Path, folder: PurePosixPath) -> Iterator[Refusal]:
    """Give each row of a table to its picture; yields the rows that have none."""
    for place, row in _rows(table):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            yield Refusal(f"{folder / table.name}, {place}", 'no object with a "file_name"; mend it', "text")
            continue
        path = folder / name
        shown = ascii(path.as_posix())[1:-1][:200]
        sample = samples.get(path.with_suffix("").as_posix() if path.name else "")
        if sample is None or path.as_posix() not in [picture.name for picture in sample.pictures]:
            yield Refusal(shown, f"{table.name} names it, and it is not there; bring it or take its row out", "missing")
        else:
            sample.row = row


def _rows(table: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places; None for what is no row."""
    if table.suffix == ".jsonl":
        with table.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield f"line {number}", _parsed(line)
        return
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise SettingsError(f"{table} needs pyarrow: pip install 'davae[datasets]'") from error
    try:
        with parquet.ParquetFile(table) as file:
            for number, batch in enumerate(file.iter_batches(batch_size=1000)):
                for index, row in enumerate(batch.to_pylist()):
                    yield f"row {1000 * number + index + 1}", row
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{table}: no sound parquet file ({error}); make or download it again") from error


def _parsed(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        row = json.loads(line.decode("utf-8-sig"))
        json.dumps(row, ensure_ascii=False).encode()  # escapes can spell half characters, which are no text
    except (ValueError, RecursionError):
        return None
    return row
