"""Pictures in the rows of a table: Hugging Face `datasets`, in memory-mapped files or streamed, and parquet files."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from davae.data.pictures import PictureRefused
from davae.data.shards import MAX_UNPACKED_BYTES
from davae.data.stored import PICTURE_SUFFIXES, CellBytes, Sample, Samples
from davae.errors import DataError, SettingsError

SCHEME = "datasets:"
"""Of a source that `datasets.load_dataset` finds: `datasets:OWNER/NAME?split=train&streaming=true&take=1000`."""
PICTURE_COLUMNS = ("image", "picture", *sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))


def load_rows(source: str) -> Any:
    """The dataset that a source with `SCHEME` names: a name on the Hub, or a folder of parquet files or pictures.

    What follows a `?` is `split` ("train" if not given), `name` (the configuration), `revision`, `streaming=true`, and
    `take`, how many rows from the start.

    Raises:
        SettingsError: `datasets` is not installed, or an option is unknown.
        DataError: it cannot be loaded.
    """
    path, _, query = source.removeprefix(SCHEME).partition("?")
    options: dict[str, Any] = dict(parse_qsl(query))
    allowed = ("split", "name", "revision", "streaming", "take")
    unknown = sorted(options.keys() - set(allowed))
    take, streaming = options.pop("take", None), options.pop("streaming", "false")
    if unknown or streaming not in ("true", "false") or not (take is None or take.isdecimal()):
        raise SettingsError(
            f"{source}: allowed after the ? are {', '.join(allowed)}, streaming=true or false, take=a whole number"
        )
    options = {"split": "train", **options}
    datasets = _datasets(source)
    try:
        rows = datasets.load_dataset(path, streaming=streaming == "true", **options)
    except Exception as error:  # the Hub, the network, the file formats: each has its own
        raise DataError(f"{source} cannot be loaded ({type(error).__name__}: {error})") from error
    return rows if take is None else rows.take(int(take))


def load_saved(folder: Path) -> Any:
    """The dataset that `Dataset.save_to_disk` wrote.

    Raises:
        SettingsError: `datasets` is not installed, or several splits lie there.
        DataError: it is damaged.
    """
    datasets = _datasets(str(folder))
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # arrow's and the operating system's
        raise DataError(f"{folder} cannot be loaded ({type(error).__name__}: {error})") from error
    if isinstance(rows, datasets.DatasetDict):
        raise SettingsError(f"{folder} holds splits: give the folder of one, such as {folder / next(iter(rows))}")
    return rows


def load_parquet(files: list[Path]) -> Any:
    """Parquet files whose rows hold pictures, which `datasets` converts once, into its cache.

    Raises:
        SettingsError: `datasets` is not installed.
        DataError: one is damaged.
    """
    datasets = _datasets(str(files[0]))
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files])
    except Exception as error:  # arrow's and the operating system's
        raise DataError(f"{files[0]} cannot be loaded ({type(error).__name__}: {error})") from error


def is_rows(source: object) -> bool:
    """Whether a source is a dataset of Hugging Face `datasets` itself, streamed or not."""
    return type(source).__module__.partition(".")[0] == "datasets"


def list_rows(rows: Any, name: str) -> Samples:
    """The rows of a dataset, by their `__key__` (as WebDataset's have) or else their number, "000000000" first.

    Of one that is not streamed the pictures stay where they are, and are read again at every use. A stream is read to
    its end, once and in its order, and its encoded pictures stay in memory: then the order of training is as exact as
    any other's.

    Args:
        rows: of `datasets`: a `Dataset` or an `IterableDataset`.
        name: what messages call it.

    Raises:
        DataError: no column holds pictures; two rows have the same key; or a stream holds more than
            `MAX_UNPACKED_BYTES`.
    """
    datasets = _datasets(name)
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise SettingsError(f"{name} has several splits: give one of {', '.join(rows)}")
    streamed = isinstance(rows, datasets.IterableDataset)
    rows = rows.decode(False) if streamed else _undecoded(rows, datasets)
    samples: Samples = {}
    column, held = "", 0
    for index, row in enumerate(rows if streamed else _texts(rows, datasets)):
        if not index:
            column = _picture_column(row if streamed else rows[0], name)
        key = str(row.get("__key__", f"{index:09d}"))
        if key in samples:
            raise DataError(f"{name}: two rows have the key {key!r}; every key must be there once")
        if streamed:
            cell = {column: row[column]}
            held += len(_bytes(cell[column]))
            if held > MAX_UNPACKED_BYTES:
                raise DataError(
                    f"{name}: more than {MAX_UNPACKED_BYTES} bytes of pictures in {index + 1} rows, which a stream "
                    "keeps in memory; take fewer rows (take=), do not stream it, or bring it as shards"
                )
            picture = CellBytes(key, partial(_cell, cell, column, key))
        else:
            picture = CellBytes(key, partial(_stored_cell, rows, index, column, key))
        said = {field: value for field, value in row.items() if field != column}
        samples[key] = Sample([picture], row=said)
    return samples


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SettingsError(f"{source} needs Hugging Face datasets: pip install 'davae[datasets]'") from error
    return datasets


def _texts(rows: Any, datasets: Any) -> Iterable[Mapping[str, Any]]:
    """The rows without their pictures, so that these are not read."""
    pictures = {
        column
        for column, kind in rows.features.items()
        if isinstance(kind, datasets.Image) or column in PICTURE_COLUMNS
    }
    others = [column for column in rows.column_names if column not in pictures]
    return rows.select_columns(others) if others else ({} for _ in range(len(rows)))


def _undecoded(rows: Any, datasets: Any) -> Any:
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _picture_column(row: Mapping[str, Any], name: str) -> str:
    for column, value in row.items():
        if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
            return column
        if isinstance(value, bytes) and column in PICTURE_COLUMNS:
            return column
    allowed = "one of type Image, or one of bytes with a name such as image, png or jpg"
    raise DataError(f"{name}: no column holds pictures, of {', '.join(row)}; needed is {allowed}")


def _stored_cell(rows: Any, index: int, column: str, key: str) -> bytes:
    return _cell(rows[index], column, key)


def _cell(row: Mapping[str, Any], column: str, key: str) -> bytes:
    value = row[column]
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise PictureRefused(key, f"cannot be read ({error.strerror}); mend its rights") from error
    return _bytes(value)


def _bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) else b""
