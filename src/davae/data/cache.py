"""Tensors that are computed once and kept on disk: entries by key, in safetensors shards that cannot be half there."""

import fcntl
import functools
import hashlib
import json
import logging
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from davae.errors import CheckpointError, SettingsError
from davae.run.storage import read_json, remove_temporaries, storage_errors, try_lock, write_atomically, write_json

logger = logging.getLogger(__name__)

# Part of every cache's name: raise it, too, when davae itself computes entries otherwise.
FORMAT_VERSION = 1
# So many stay open for reading, mapped and not copied into memory.
OPEN_SHARDS = 64
# Prefix of a shard's name that is set aside.
ASIDE = "damaged-"
# The names of shards, and of the files that a killed writer leaves: nothing else in a cache's folder is touched.
SHARD = re.compile(r"[0-9a-f]{64}\.safetensors")
UNFINISHED = re.compile(rf"\.({SHARD.pattern}|cache\.json)\.tmp-\d+")

Entry = Mapping[str, Tensor]


class TensorCache:
    """The entries of one kind, such as "latents", in a folder of their own below `folder`, which runs may share.

    The folder's name has a digest of `facts`, which are all that the entries depend on (the model's digest, its
    settings, versions), so that no other model's entries are found. A shard is written whole or not at all, and its
    name is the SHA-256 of its content: any number of processes may write at once, and damage shows. Where all entries
    are found nothing is written, so that a read-only folder will do.
    """

    def __init__(self, folder: Path, kind: str, facts: Mapping[str, str | int]) -> None:
        self.facts = {"format_version": FORMAT_VERSION, "kind": kind, **facts}
        self._digest = _digest_facts(self.facts)
        self.folder = Path(folder) / f"{kind}-{self._digest[:16]}"
        self._shards: dict[str, Path] = {}
        self._opened = functools.lru_cache(maxsize=OPEN_SHARDS)(_open_shard)

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of one entry, by name, on the CPU."""
        names, shard = self._opened(self._shards[key])
        return {name: shard.get_tensor(f"{key}/{name}") for name in names[key]}

    def set_damaged_aside(self, *, process: int = 0, processes: int = 1) -> None:
        """Read every shard and rename those that are damaged or foreign, with a warning that names file and reason.

        Of several processes each checks its share of the names.
        """
        for path in shard_paths(self.folder):
            if zlib.crc32(path.name.encode()) % processes != process:
                continue

            # Renamed, not removed: somebody may want to know what happened. Another run may have done it meanwhile.
            if reason := find_damage(path) or self._find_foreign(path):
                aside = path.with_name(ASIDE + path.name)
                with storage_errors(aside), suppress(FileNotFoundError):
                    path.rename(aside)
                    logger.warning("%s %s; set aside as %s, its entries are made again", path, reason, aside.name)

    def find(self) -> None:
        """Look which entries there are now, in the shards that `set_damaged_aside` has checked."""
        self._opened.cache_clear()
        self._shards = {}
        for path in shard_paths(self.folder):
            names, _ = _open_shard(path)
            for key in names:
                self._shards.setdefault(key, path)  # the first shard by name, in every process

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the cache open for `write`; without another writer, remove the remains of writers that were killed."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("wb")

        # Writers share the lock; whoever gets it alone may tidy up before sharing it.
        with lock:
            if try_lock(lock):
                remove_temporaries(self.folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
            write_json(self.folder / "cache.json", self.facts)
            yield

    def write(self, entries: Mapping[str, Entry]) -> None:
        """Write entries as one shard, within `writing`; equal shards are one file."""
        tensors = {}
        for key, entry in entries.items():
            for name, tensor in entry.items():
                tensors[f"{key}/{name}"] = tensor.contiguous()
        content = save(tensors, metadata={"facts": self._digest})
        write_atomically(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def _find_foreign(self, path: Path) -> str:
        try:
            with safe_open(path, framework="pt") as shard:
                return "" if (shard.metadata() or {}).get("facts") == self._digest else "is of another cache"
        except SafetensorError as error:
            return f"is no safetensors file ({error})"


def shard_paths(folder: Path) -> list[Path]:
    """The shards of one cache in the order of their names, sound or not."""
    return sorted(path for path in folder.glob("*.safetensors") if SHARD.fullmatch(path.name))


def _digest_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_damage(path: Path) -> str:
    """Read a shard in full; returns how its content is damaged, or ""."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest == path.stem else "is damaged (its SHA-256 is not its name)"


# ----------------------------------------------------------------------------------------------------- davae cache ...


@dataclass(frozen=True)
class CacheContents:
    """The content of one cache, each shard of it read in full."""

    folder: Path
    facts: dict[str, Any]
    entries: int
    bytes: int
    # Reasons by file name; shards that were set aside are not among them.
    damaged: dict[str, str]

    def to_text(self) -> str:
        """One line for people, and one for each damaged shard."""
        facts = ", ".join(f"{name} {str(value)[:16]}" for name, value in self.facts.items() if name != "kind")
        line = f"{self.folder.name}: {self.entries:,} entries, {self.bytes / 2**20:,.1f} MiB ({facts})"
        return "\n".join([line, *(f"  {name} {reason}" for name, reason in self.damaged.items())])


def read_caches(folder: Path) -> list[CacheContents]:
    """Read the caches below `folder` in full, and count what they hold."""
    caches = []
    for path in _cache_folders(folder):
        # Entries of damaged shards do not count.
        keys: set[str] = set()
        damaged, size = {}, 0
        for shard in shard_paths(path):
            size += shard.stat().st_size
            if reason := find_damage(shard):
                damaged[shard.name] = reason
            else:
                keys |= _open_shard(shard)[0].keys()
        caches.append(CacheContents(path, read_json(path / "cache.json"), len(keys), size, damaged))
    return caches


def prune_caches(folder: Path, *, days: float | None = None, dry_run: bool = False) -> int:
    """Remove damaged shards and remains of killed writers, which no run reads. Returns the bytes that are freed.

    With `days`, whole caches are removed, too, in which so long nothing was written; a `dry_run` only counts. A cache
    to which a process is writing is a SettingsError, and nothing of it is removed. Files that no cache wrote stay.
    """
    freed = 0
    for path in _cache_folders(folder):
        with storage_errors(path), (path / ".lock").open("wb") as lock:
            if not try_lock(lock):
                raise SettingsError(f"a process is writing to {path}: wait for it, and prune again")

            # In a cache that is in use, only damaged and unfinished files are useless.
            shards, facts = shard_paths(path), path / "cache.json"
            useless = [file for file in path.iterdir() if UNFINISHED.fullmatch(file.name)]
            useless += [file for file in path.iterdir() if SHARD.fullmatch(file.name.removeprefix(ASIDE))]
            newest = max((shard.stat().st_mtime for shard in shards), default=facts.stat().st_mtime)
            old = days is not None and time.time() - newest > days * 86400
            if old:
                useless += [facts, path / ".lock"]
            else:
                useless = [file for file in useless if file not in shards or find_damage(file)]
            freed += sum(file.stat().st_size for file in useless)

            if not dry_run:
                for file in useless:
                    file.unlink()
                if old and not any(path.iterdir()):
                    path.rmdir()
    return freed


def _is_cache(folder: Path) -> bool:
    """Whether the folder's name has the digest of its own facts: other programs have files `cache.json`, too."""
    path = folder / "cache.json"
    if folder.is_symlink() or not path.is_file():
        return False
    try:
        facts = read_json(path)
    except CheckpointError:
        facts = {}
    if folder.name != f"{facts.get('kind')}-{_digest_facts(facts)[:16]}":
        logger.warning("%s is not of the cache that its folder is named after: left alone", path)
        return False
    return True


def _cache_folders(folder: Path) -> list[Path]:
    folders = sorted(path.parent for path in Path(folder).glob("*/cache.json") if _is_cache(path.parent))
    if not folders:
        raise CheckpointError(f"{folder} holds no cache: give the folder that a recipe has as `cache`, or RUN/cache")
    return folders


def _open_shard(path: Path) -> tuple[dict[str, list[str]], safe_open]:
    """The names of every entry's tensors by its key, and the open shard."""
    try:
        shard = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can no longer be read ({error}): run again, to make its entries anew") from error
    names: dict[str, list[str]] = {}
    for tensor in shard.keys():
        key, _, name = tensor.partition("/")
        names.setdefault(key, []).append(name)
    return names, shard
