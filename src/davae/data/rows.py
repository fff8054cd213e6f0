"""Pictures in the rows of a table: Hugging Face `datasets`, in memory-mapped files or streamed, and parquet files."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from davae.data.pictures import PictureRefused
from davae.data.shards import MAX_UNPACKED_BYTES
from davae.data.stored import PICTURE_SUFFIXES, CellBytes, Sample, Samples
from davae.errors import DataError, SettingsError

# Prefix of a source that `datasets.load_dataset` finds: `datasets:OWNER/NAME?split=train&streaming=true&take=1000`.
SCHEME = "datasets:"
OPTIONS = ("split", "name", "revision", "streaming", "take")
PICTURE_COLUMNS = ("image", "picture", *sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))


def load_rows(source: str) -> Any:
    """The dataset that a source with `SCHEME` names: a name on the Hub, or a folder of parquet files or pictures.

    After a `?` may stand `split` ("train" if not given), `name` (the configuration), `revision`, `streaming=true`, and
    `take`, the number of rows from the start.
    """
    path, _, query = source.removeprefix(SCHEME).partition("?")
    options: dict[str, Any] = {"split": "train", **dict(parse_qsl(query))}
    unknown = options.keys() - set(OPTIONS)
    take, streaming = options.pop("take", None), options.pop("streaming", "false")
    if unknown or streaming not in ("true", "false") or not (take is None or take.isdecimal()):
        raise SettingsError(
            f"{source}: allowed after the ? are {', '.join(OPTIONS)}, streaming=true or false, take=a whole number"
        )

    # The rest is for `datasets` to understand.
    load = _import_datasets(source).load_dataset
    rows = _load(partial(load, path, streaming=streaming == "true", **options), source)
    return rows if take is None else rows.take(int(take))


def load_saved(folder: Path) -> Any:
    """The dataset that `Dataset.save_to_disk` wrote."""
    datasets = _import_datasets(str(folder))
    rows = _load(partial(datasets.load_from_disk, str(folder)), str(folder))
    if isinstance(rows, datasets.DatasetDict):
        raise SettingsError(f"{folder} holds splits: give the folder of one, such as {folder / next(iter(rows))}")
    return rows


def load_parquet(files: list[Path]) -> Any:
    """Parquet files whose rows hold pictures, which `datasets` converts once, into its cache."""
    name = str(files[0])
    return _load(partial(_import_datasets(name).Dataset.from_parquet, list(map(str, files))), name)


def is_rows(source: object) -> bool:
    """Whether a source is a dataset of Hugging Face `datasets`, streamed or not."""
    return type(source).__module__.partition(".")[0] == "datasets"


def list_rows(rows: Any, name: str) -> Samples:
    """The rows of a dataset, by their `__key__` (as WebDataset's have) or else their number, from "000000000".

    The pictures of a dataset that is not streamed stay where they are, and are read at every use. A stream is read to
    its end, once and in its order, and its encoded pictures stay in memory, so that the order of training is as exact
    as for any other source; more than `MAX_UNPACKED_BYTES` are refused. `name` is for messages.
    """
    datasets = _import_datasets(name)
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise SettingsError(f"{name} has several splits: give one of {', '.join(rows)}")
    streamed = isinstance(rows, datasets.IterableDataset)
    rows = rows.decode(False) if streamed else _without_decoding(rows, datasets)

    # The first row shows which column holds the pictures.
    samples: Samples = {}
    column, held = "", 0
    for index, row in enumerate(rows if streamed else _without_pictures(rows, datasets)):
        if not index:
            column = _find_picture_column(row if streamed else rows[0], name)
        key = str(row.get("__key__", f"{index:09d}"))
        if key in samples:
            raise DataError(f"{name}: two rows have the key {key!r}; every key must be there once")

        # A stream cannot be read again: its pictures stay in memory.
        read = partial(_read_stored_cell, rows, index, column, key)
        if streamed:
            read = partial(_read_cell, row[column], key)
            held += len(_get_bytes(row[column]))
        if held > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{name}: more than {MAX_UNPACKED_BYTES} bytes of pictures in {index + 1} rows, which a stream keeps "
                "in memory; take fewer rows (take=), do not stream it, or bring it as shards"
            )
        rest = {field: value for field, value in row.items() if field != column}
        samples[key] = Sample([CellBytes(key, read)], row=rest)
    return samples


def _import_datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SettingsError(f"{source} needs Hugging Face datasets: pip install 'davae[datasets]'") from error
    return datasets


def _load(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except Exception as error:  # the Hub, the network, arrow and the operating system each have their own
        raise DataError(f"{name} cannot be loaded ({type(error).__name__}: {error})") from error


def _without_pictures(rows: Any, datasets: Any) -> Iterable[Mapping[str, Any]]:
    """The rows without their pictures, so that these are not read."""
    columns = [name for name in rows.column_names if name not in PICTURE_COLUMNS]
    columns = [name for name in columns if not isinstance(rows.features[name], datasets.Image)]
    return rows.select_columns(columns) if columns else ({} for _ in range(len(rows)))


def _without_decoding(rows: Any, datasets: Any) -> Any:
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _find_picture_column(row: Mapping[str, Any], name: str) -> str:
    for column, value in row.items():
        if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
            return column
        if isinstance(value, bytes) and column in PICTURE_COLUMNS:
            return column
    needed = "one of type Image, or one of bytes with a name such as image, png or jpg"
    raise DataError(f"{name}: no column holds pictures, of {', '.join(row)}; needed is {needed}")


def _read_stored_cell(rows: Any, index: int, column: str, key: str) -> bytes:
    return _read_cell(rows[index][column], key)


def _read_cell(cell: Any, key: str) -> bytes:
    # A cell may name a file in place of its bytes.
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise PictureRefused(key, f"cannot be read ({error.strerror}); mend its rights") from error
    return _get_bytes(cell)


def _get_bytes(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else b""
