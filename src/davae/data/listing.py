"""What a source holds, listed without decoding: a folder, shards, a table of rows; here or elsewhere."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.data.folders import list_folder
from davae.data.rows import SCHEME, is_rows, list_rows, load_parquet, load_rows, load_saved
from davae.data.shards import list_shards, remote_shards
from davae.data.stored import PICTURE_SUFFIXES, Refusal, Samples
from davae.errors import DataError

Source = Path | str | Any
"""A folder, a shard or a parquet file; a URL of shards; `datasets:NAME`; or a dataset of Hugging Face `datasets`."""


@dataclass(frozen=True)
class Listing:
    """The samples of a source by their keys, and what is refused already."""

    samples: Samples
    refused: list[Refusal] = field(default_factory=list)
    folders: bool = False
    """Whether the keys are paths in a folder of pictures, whose sub-folders may be classes."""


def list_source(source: Source) -> Listing:
    """Find out what a source is, by what is there, and list it.

    Raises:
        DataError: it is missing, damaged, not to be trusted, or two things at once.
        SettingsError: what it needs is not installed.
    """
    if is_rows(source):
        return Listing(list_rows(source, "the dataset"))
    if isinstance(source, str) and source.startswith(SCHEME):
        return Listing(list_rows(load_rows(source), source))
    if isinstance(source, str) and "://" in source:
        return Listing(list_shards(remote_shards(source)))
    path = Path(source)
    if path.is_file():
        rows = path.suffix == ".parquet"
        return Listing(list_rows(load_parquet([path]), str(path)) if rows else list_shards([path]))
    if not path.is_dir():
        raise DataError(
            f"{path} is no folder, no tar shard and no parquet file; give the path of one, a URL of shards, "
            f"or {SCHEME}NAME"
        )
    return _list_folder(path)


def _list_folder(folder: Path) -> Listing:
    """A folder of shards, of parquet files, of a saved dataset, or of pictures."""
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Listing(list_rows(load_saved(folder), str(folder)))
    shards = sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")])
    tables = sorted(path for path in folder.glob("*.parquet") if path.name != "metadata.parquet")
    if not shards and not tables:
        return Listing(*list_folder(folder), folders=True)
    found = [(shards, "shards"), (tables, "parquet files")]
    loose = Counter(path.suffix.lower() for path in folder.iterdir())
    kinds = [kind for some, kind in [*found, (loose.keys() & PICTURE_SUFFIXES, "pictures")] if some]
    if len(kinds) > 1:
        raise DataError(f"{folder} holds both {' and '.join(kinds)}; move either to a folder of its own")
    return Listing(list_shards(shards) if shards else list_rows(load_parquet(tables), str(folder)))
