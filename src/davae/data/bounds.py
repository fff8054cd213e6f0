"""Bounds on what a table may take: text in memory, rows for its bytes, files that its cells name."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from davae.data.entries import CAPTION_KEYS, CLASS_KEYS, MAX_FILE_BYTES, MAX_TEXT_BYTES
from davae.data.pictures import PictureRefused
from davae.data.stored import explain_unreadable, try_often
from davae.errors import DataError, SettingsError

# Text in the rows of one source; equal texts count once.
MAX_TABLE_TEXT_BYTES = 1 << 32
# Text in the rows of any parquet file, equal ones or not; with more, it is at most so many times the file's bytes.
FREE_TEXT_BYTES, TEXT_OF_A_BYTE = 1 << 30, 16
# Rows that any parquet file may have; with more, each has at least so many bytes of the file. Lists have more values.
FREE_ROWS, BYTES_OF_A_ROW, VALUES_OF_A_ROW = 100_000, 2, 16
TOLD_KEYS = (*CAPTION_KEYS, *CLASS_KEYS)


class RowTexts:
    """What rows say about their pictures, kept in memory once for equal texts, up to `MAX_TABLE_TEXT_BYTES`."""

    def __init__(self, name: str) -> None:
        self._name, self._bytes = name, 0
        self._texts: dict[str, str] = {}

    def keep(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's captions and classes; of a text that is too long, enough to refuse it."""
        kept: dict[str, Any] = {}
        for key in TOLD_KEYS:
            value = row.get(key)
            if isinstance(value, str):
                value = value[: MAX_TEXT_BYTES + 1]
                if value not in self._texts:
                    self._bytes += len(value.encode(errors="surrogatepass"))
                value = self._texts.setdefault(value, value)
            elif isinstance(value, list | dict):
                self._bytes += len(str(value))
            if value is not None:
                kept[key] = value

        if self._bytes > MAX_TABLE_TEXT_BYTES:
            raise DataError(f"{self._name}: more than {MAX_TABLE_TEXT_BYTES} bytes of text; divide the set, or cut it")
        return kept


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """The parquet file, whose dictionaries stay such: a few bytes of it could stand for gigabytes of text otherwise."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise SettingsError(f"{path} needs pyarrow: pip install 'davae[datasets]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            yield file
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: no sound parquet file ({error}); make or download it again") from error


def check_parquet(path: Path) -> None:
    """Refuse a parquet file of which a few bytes stand for more rows or text than a set has."""
    with open_parquet(path) as file:
        check_rows(path, file.metadata)
        columns = [field.name for field in file.schema_arrow if str(field.type).startswith("dictionary")]
        allowed = max(FREE_TEXT_BYTES, path.stat().st_size * TEXT_OF_A_BYTE)
        total = 0
        for batch in file.iter_batches(batch_size=1000, columns=columns) if columns else ():
            for column in batch.columns:
                total += _count_text(column)
            if total > allowed:
                raise DataError(
                    f"{path}: more than {allowed} bytes of text in a file of its size; divide it, or cut it"
                )


def check_rows(path: Path, metadata: Any) -> None:
    """Refuse more rows, or values in a column, than a file of this size can say something about."""
    allowed = max(FREE_ROWS, path.stat().st_size // BYTES_OF_A_ROW)
    if metadata.num_rows > allowed:
        raise DataError(f"{path}: {metadata.num_rows} rows in a file of its size, allowed are {allowed}; make it anew")
    for column in range(metadata.num_columns):
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        values = sum(group.column(column).num_values for group in groups)
        if values > VALUES_OF_A_ROW * allowed:
            name = metadata.schema.column(column).path
            most = VALUES_OF_A_ROW * allowed
            raise DataError(f"{path}: {values} values of {name} in a file of its size, allowed are {most}; take it out")


def _count_text(column: Any) -> int:
    """Bytes of the texts in a column that is a dictionary with indices."""
    from pyarrow import compute

    lengths = compute.binary_length(column.dictionary)
    return compute.sum(lengths.take(column.indices)).as_py() or 0


def read_named_file(path: str, folders: Sequence[Path] | None, key: str) -> bytes:
    """The file that a cell names: a regular one, in one of these folders if there are any; or a PictureRefused."""
    place = Path(path)
    if folders is not None:
        # A relative path is one beside the table.
        place = Path(os.path.abspath(folders[0] / place))
        allowed = [*map(Path.absolute, folders), *map(Path.resolve, folders)]
        if not any(map(place.is_relative_to, allowed)):
            raise PictureRefused(key, "its row names a file outside of the set's folder; put its bytes into the row")

    def read() -> bytes:
        status = place.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PictureRefused(key, "its row names no regular file; bring one, or its bytes")
        if status.st_size > MAX_FILE_BYTES:
            reason = f"{status.st_size} bytes is more than the allowed {MAX_FILE_BYTES}; save it smaller"
            raise PictureRefused(key, reason, "too large")
        return place.read_bytes()

    try:
        return try_often(read)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = explain_unreadable(error) if isinstance(error, OSError) else f"its row names no file ({error})"
        raise PictureRefused(key, reason) from error


def check_regular(folder: Path) -> None:
    """Refuse a folder for another library to read if something in it is neither a folder nor a regular file."""
    for path in folder.rglob("*"):
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path} is no regular file; remove it")

    # Aliases in the head of a card stand for more than memory holds.
    card = folder / "README.md"
    if card.is_file() and card.stat().st_size <= MAX_TEXT_BYTES:
        head = card.read_bytes().partition(b"---")[2].partition(b"\n---")[0].decode(errors="replace")
        if _has_aliases(head):
            raise DataError(f"{card}: its head has YAML aliases, which are not read; write them out")
    elif card.is_file():
        raise DataError(f"{card}: more than the allowed {MAX_TEXT_BYTES} bytes; shorten it")


def _has_aliases(text: str) -> bool:
    import yaml

    try:
        return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError):
        return False  # for the other library to refuse
