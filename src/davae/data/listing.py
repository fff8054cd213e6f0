"""The content of a source, listed without decoding: a folder, shards, a table of rows; on this machine or elsewhere."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

from davae.data.pictures import PictureRefused, Refusal
from davae.data.shards import MAX_UNPACKED_BYTES, list_shards, remote_shards
from davae.data.stored import PICTURE_SUFFIXES, CellBytes, FileBytes, LocalFile, Sample, Samples, parse_json
from davae.errors import DataError, SettingsError

# A folder, a shard or a parquet file; a URL of shards; `datasets:NAME`; or a dataset of Hugging Face `datasets`.
PictureSource = Path | str | Any

# Tables about the pictures of a folder, joined by their column "file_name", as Hugging Face `datasets` has them.
METADATA = ("metadata.jsonl", "metadata.parquet")
MAX_LINE_BYTES = 1 << 20

# Prefix of a source that `datasets.load_dataset` finds: `datasets:OWNER/NAME?split=train&streaming=true&take=1000`.
SCHEME = "datasets:"
OPTIONS = ("split", "name", "revision", "streaming", "take")
PICTURE_COLUMNS = ("image", "picture", *sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))


@dataclass(frozen=True)
class Listing:
    """The samples of a source by their keys, and the files that are refused already."""

    samples: Samples
    refused: list[Refusal] = field(default_factory=list)
    # Whether the keys are paths in a folder of pictures, whose sub-folders may be classes.
    folders: bool = False


def list_source(source: PictureSource) -> Listing:
    """Find out by its content what a source is, and list it."""
    if type(source).__module__.partition(".")[0] == "datasets":
        return Listing(_list_rows(source, "the dataset"))
    if isinstance(source, str) and source.startswith(SCHEME):
        return Listing(_list_rows(_load_named(source), source))
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
        return Listing(_list_rows(_load_parquet([path]), str(path)))
    return Listing(list_shards([LocalFile(str(path))]))


def _list_folder(folder: Path) -> Listing:
    """A folder of shards, of parquet files, of a saved dataset, or of pictures."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Listing(_list_rows(_load_saved(folder), str(folder)))

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
        return Listing(list_shards(list(map(LocalFile, map(str, shards)))))
    return Listing(_list_rows(_load_parquet(tables), str(folder)))


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
            sample.row = row


def _read_table(table: Path) -> Iterator[tuple[str, Any]]:
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


# ----------------------------------------------------------------------------------------------------- rows of datasets


def _load_named(source: str) -> Any:
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
    with _loading(source) as datasets:
        rows = datasets.load_dataset(path, streaming=streaming == "true", **options)
    return rows if take is None else rows.take(int(take))


def _load_saved(folder: Path) -> Any:
    """The dataset that `Dataset.save_to_disk` wrote."""
    with _loading(str(folder)) as datasets:
        rows = datasets.load_from_disk(str(folder))
    if isinstance(rows, datasets.DatasetDict):
        raise SettingsError(f"{folder} holds splits: give the folder of one, such as {folder / next(iter(rows))}")
    return rows


def _load_parquet(files: list[Path]) -> Any:
    """Parquet files whose rows hold pictures, which `datasets` converts once, into its cache."""
    with _loading(str(files[0])) as datasets:
        return datasets.Dataset.from_parquet(list(map(str, files)))


@contextmanager
def _loading(source: str) -> Iterator[Any]:
    """Gives Hugging Face `datasets` to load a source with; its errors become a DataError."""
    try:
        import datasets
    except ImportError as error:
        raise SettingsError(f"{source} needs Hugging Face datasets: pip install 'davae[datasets]'") from error
    try:
        yield datasets
    except Exception as error:  # the Hub, the network, arrow and the operating system each have their own
        raise DataError(f"{source} cannot be loaded ({type(error).__name__}: {error})") from error


def _list_rows(rows: Any, name: str) -> Samples:
    """The rows of a dataset, by their `__key__` (as WebDataset's have) or else their number, from "000000000".

    The pictures of a dataset that is not streamed stay where they are, and are read at every use. A stream is read to
    its end, once and in its order, and its encoded pictures stay in memory, so that the order of training is as exact
    as for any other source; more than `MAX_UNPACKED_BYTES` are refused. `name` is for messages.
    """
    import datasets

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


def _without_pictures(rows: Any, datasets: Any) -> Iterable[Mapping[str, Any]]:
    """The rows without their pictures, so that these are not read."""
    columns = []
    for column, kind in rows.features.items():
        if not isinstance(kind, datasets.Image) and column not in PICTURE_COLUMNS:
            columns.append(column)
    return rows.select_columns(columns) if columns else repeat({}, len(rows))


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
