"""The content of a source, listed without decoding: a folder, shards, a table of rows; on this machine or elsewhere."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from davae.data.bounds import TOLD_KEYS, RowTexts, check_parquet, check_regular, read_named_file
from davae.data.folders import Listing, walk_folder
from davae.data.masks import set_masks_aside
from davae.data.pictures import Refusal
from davae.data.shards import MAX_UNPACKED_BYTES, list_shards, remote_shards
from davae.data.stored import PICTURE_SUFFIXES, CellBytes, LocalFile, Sample, Samples
from davae.errors import DataError, DavaeError, SettingsError

# A folder, a shard or a parquet file; a URL of shards; `datasets:NAME`; or a dataset of Hugging Face `datasets`.
PictureSource = Path | str | Any

# Prefix of a source that `datasets.load_dataset` finds: `datasets:OWNER/NAME?split=train&streaming=true&take=1000`.
SCHEME = "datasets:"
OPTIONS = ("split", "name", "revision", "streaming", "take")
PICTURE_COLUMNS = ("image", "picture", *sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))


def list_source(source: PictureSource) -> Listing:
    """Find out by its content what a source is, and list it; masks of its pictures are refused."""
    listing = _list_source(source)
    listing.refused.extend(set_masks_aside(listing.samples))
    return listing


def _list_source(source: PictureSource) -> Listing:
    if type(source).__module__.partition(".")[0] == "datasets":
        return _list_rows(source, "the dataset")
    if isinstance(source, str) and source.startswith(SCHEME):
        return _list_rows(_load_named(source), source, _named_folders(source))
    if isinstance(source, str) and "://" in source:
        return Listing(*list_shards(remote_shards(source)))

    # Anything else is a path.
    path = Path(source)
    if path.is_dir():
        return _list_folder(path)
    if not path.is_file():
        allowed = f"the path of a folder, a tar shard or a parquet file, a URL of shards, or {SCHEME}NAME"
        raise DataError(f"{path} is no folder and no file; allowed is {allowed}")
    if path.suffix == ".parquet":
        return _list_rows(_load_parquet([path]), str(path), [path.parent])
    return Listing(*list_shards([LocalFile(str(path))]))


def _list_folder(folder: Path) -> Listing:
    """A folder of shards, of parquet files, of a saved dataset, or of pictures."""
    tree = walk_folder(folder)
    saved = [name for name in ("dataset_info.json", "dataset_dict.json") if (folder / name).is_file()]

    # A folder with several kinds of content is more likely a mistake than a choice.
    pictures = [sample.pictures[0].name for sample in tree.listing.samples.values() if sample.pictures]
    shards, tables = ([path.name for path in paths] for paths in (tree.shards, tree.tables))
    contents = {"shards": shards, "parquet files": tables, "a saved dataset": saved, "pictures": pictures}
    kinds = [kind for kind, names in contents.items() if names]
    if len(kinds) > 1:
        first, second, *_ = kinds
        raise DataError(
            f"{folder} holds both {first} and {second}, such as {contents[first][0]} and {contents[second][0]}; move "
            "either to a folder of its own"
        )
    if not any((saved, shards, tables)):
        return tree.listing
    if shards:
        found = Listing(*list_shards([LocalFile(str(path)) for path in tree.shards]))
    else:
        rows = _load_saved(folder) if saved else _load_parquet(tree.tables)
        found = _list_rows(rows, str(folder), [folder])
    found.refused.extend(tree.listing.refused)
    return found


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
    if Path(path).is_dir():
        check_regular(Path(path))
    with _loading(source) as datasets:
        rows = datasets.load_dataset(path, streaming=streaming == "true", **options)
    return rows if take is None else rows.take(int(take))


def _named_folders(source: str) -> list[Path]:
    """Where the files may lie that the rows of a source with `SCHEME` name."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(source.removeprefix(SCHEME).partition("?")[0])
    caches = [Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]
    return [path, *caches] if path.is_dir() else caches


def _load_saved(folder: Path) -> Any:
    """The dataset that `Dataset.save_to_disk` wrote."""
    check_regular(folder)
    with _loading(str(folder)) as datasets:
        rows = datasets.load_from_disk(str(folder))
    if isinstance(rows, datasets.DatasetDict):
        raise SettingsError(f"{folder} holds splits: give the folder of one, such as {folder / next(iter(rows))}")
    return rows


def _load_parquet(files: list[Path]) -> Any:
    """Parquet files whose rows hold pictures, which `datasets` converts once, into its cache."""
    with _loading(str(files[0])) as datasets:
        for file in files:
            check_parquet(file)
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
    except DavaeError:
        raise
    except Exception as error:  # the Hub, the network, arrow and the operating system each have their own
        raise DataError(f"{source} cannot be loaded ({type(error).__name__}: {error})") from error


def _list_rows(rows: Any, name: str, folders: Sequence[Path] | None = None) -> Listing:
    """The rows of a dataset, by their `__key__` (as WebDataset's have) or else their number, from "000000000".

    The pictures of a dataset that is not streamed stay where they are, and are read at every use. A stream is read to
    its end, once and in its order, and its encoded pictures stay in memory, so that the order of training is as exact
    as for any other source; more than `MAX_UNPACKED_BYTES` are refused. `name` is for messages. A
    cell may name a file in one of the `folders`; in any, if there are none.
    """
    import datasets

    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise SettingsError(f"{name} has several splits: give one of {', '.join(rows)}")
    streamed = isinstance(rows, datasets.IterableDataset)
    rows = rows.decode(False) if streamed else _without_decoding(rows, datasets)

    # Types, where they are known, and the first row show which column holds the pictures.
    typed = [column for column, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)]
    samples: Samples = {}
    refused: list[Refusal] = []
    column, held, numbered, texts = "", 0, True, RowTexts(name)
    for index, row in enumerate(rows if streamed else _without_pictures(rows, datasets)):
        if not index:
            column, refused = _choose_picture_column(row if streamed else rows[0], typed, name)
        numbered = "__key__" not in row
        key = f"{index:09d}" if numbered else str(row["__key__"])
        if key in samples:
            raise DataError(f"{name}: two rows have the key {key!r}; every key must be there once")

        # A stream cannot be read again: its pictures stay in memory.
        read = partial(_read_stored_cell, rows, index, column, key, folders)
        if streamed:
            read = partial(_read_cell, row[column], key, folders)
            held += len(_get_bytes(row[column]))
        if held > MAX_UNPACKED_BYTES:
            raise DataError(
                f"{name}: more than {MAX_UNPACKED_BYTES} bytes of pictures in {index + 1} rows, which a stream keeps "
                "in memory; take fewer rows (take=), do not stream it, or bring it as shards"
            )
        samples[key] = Sample([CellBytes(key, read)], row=texts.keep(row))
    return Listing(samples, refused, numbered=numbered)


def _without_pictures(rows: Any, datasets: Any) -> Iterable[Mapping[str, Any]]:
    """The rows with nothing but key, captions and classes, so that pictures are not read."""
    columns = []
    for column, kind in rows.features.items():
        if not isinstance(kind, datasets.Image) and column in ("__key__", *TOLD_KEYS):
            columns.append(column)
    return rows.select_columns(columns) if columns else repeat({}, len(rows))


def _without_decoding(rows: Any, datasets: Any) -> Any:
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _choose_picture_column(row: Mapping[str, Any], typed: Container[str], name: str) -> tuple[str, list[Refusal]]:
    """The column of the pictures, which is "image" if there are several, and refusals of the others."""
    columns: list[str] = []
    for column, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        has_pictures = isinstance(first, dict) and {"bytes", "path"} <= first.keys()
        if has_pictures or column in typed or (isinstance(value, bytes) and column in PICTURE_COLUMNS):
            columns.append(column)
    single = [column for column in columns if not isinstance(row[column], list)]

    if not single:
        needed = "one of type Image, or one of bytes with a name such as image, png or jpg"
        raise DataError(f"{name}: no column holds pictures, of {', '.join(row)}; needed is {needed}")
    if len(single) > 1 and "image" not in single:
        raise DataError(
            f'{name}: several columns hold pictures: {", ".join(single)}; name the one to train on "image", or take '
            "the others out"
        )
    chosen = "image" if "image" in single else single[0]
    reason = f'a further column of pictures beside {chosen!r}; take it out, or name it "image" to train on it'
    return chosen, [Refusal(f"column {column}", reason, "same name") for column in columns if column != chosen]


def _read_stored_cell(rows: Any, index: int, column: str, key: str, folders: Sequence[Path] | None) -> bytes:
    return _read_cell(rows[index][column], key, folders)


def _read_cell(cell: Any, key: str, folders: Sequence[Path] | None) -> bytes:
    # A cell may name a file in place of its bytes.
    if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
        return read_named_file(cell["path"], folders, key)
    return _get_bytes(cell)


def _get_bytes(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else b""
