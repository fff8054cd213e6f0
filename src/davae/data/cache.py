"""Tensors that are computed once and kept on disk: entries by key, in safetensors shards that cannot be half there."""

import fcntl
import functools
import hashlib
import json
import logging
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from davae.errors import CheckpointError, SettingsError
from davae.run.storage import read_json, remove_temporaries, storage_error, write_atomically, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of what an entry is found by: raise it, too, when davae itself computes entries otherwise."""
OPEN_SHARDS = 64
"""So many stay open for reading; what is read of them is mapped, not copied into memory."""
ASIDE = "damaged-"
"""Before the name of a shard that is set aside."""

Entry = Mapping[str, Tensor]


class TensorCache:
    """The entries of one kind that were made by the same model and settings, in a folder of their own below `folder`.

    The folder's name has a digest of those facts, so what another model made is never found. A shard is written whole
    or not at all, and its name is the SHA-256 of its content: any number of processes may write at once, and damage
    shows. Nothing is written where all entries are found, so a folder that is read-only will do.

    Args:
        folder: of all caches; shared by as many runs as one likes.
        kind: what the entries are, a word: "latents".
        facts: what all of them depend on, by name: the model's digest, its settings, versions.
    """

    def __init__(self, folder: Path, kind: str, facts: Mapping[str, str | int]) -> None:
        self.facts = {"format_version": FORMAT_VERSION, "kind": kind, **facts}
        self._digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / f"{kind}-{self._digest[:16]}"
        self._shards: dict[str, Path] = {}
        self._opened = functools.lru_cache(maxsize=OPEN_SHARDS)(_open)

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of one entry, by name, on the CPU.

        Raises:
            CheckpointError: its shard was removed since.
        """
        names, shard = self._opened(self._shards[key])
        return {name: shard.get_tensor(f"{key}/{name}") for name in names[key]}

    def set_damaged_aside(self, *, process: int = 0, processes: int = 1) -> None:
        """Read every shard and rename those that are not what was written, with a warning that names file and reason.

        Args:
            process: which of `processes` this is, each of which checks its share of the names.
            processes: how many there are.

        Raises:
            StorageError: a damaged shard cannot be renamed.
        """
        for path in shard_paths(self.folder):
            if zlib.crc32(path.name.encode()) % processes != process:
                continue
            reason = damage(path) or self._foreign(path)
            if reason:
                aside = path.with_name(ASIDE + path.name)
                try:
                    path.rename(aside)
                except FileNotFoundError:  # another run has found it, too
                    continue
                except OSError as error:
                    raise storage_error(aside, 0, error) from error
                logger.warning("%s %s; set aside as %s, its entries are made again", path, reason, aside.name)

    def find(self) -> None:
        """Look what entries there are now; of shards that `set_damaged_aside` has checked."""
        self._opened.cache_clear()
        self._shards = {}
        for path in shard_paths(self.folder):
            names, _ = _open(path)
            for key in names:
                self._shards.setdefault(key, path)  # the first by name, whoever looks

    @contextmanager
    def writing(self) -> Iterator[None]:
        """To be in while writing; what writers left that were killed is removed if there is no other writer.

        Raises:
            StorageError: the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / ".lock").open("wb"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                else:
                    remove_temporaries(self.folder)
                fcntl.flock(lock, fcntl.LOCK_SH)
            except OSError as error:
                raise storage_error(self.folder, 0, error) from error
            write_json(self.folder / "cache.json", self.facts)
            yield

    def write(self, entries: Mapping[str, Entry]) -> None:
        """Write entries as one shard, within `writing`.

        Raises:
            StorageError: they cannot be written; nothing of them is.
        """
        tensors = {
            f"{key}/{name}": tensor.contiguous() for key, entry in entries.items() for name, tensor in entry.items()
        }
        content = save(tensors, metadata={"facts": self._digest})
        write_atomically(self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)

    def _foreign(self, path: Path) -> str:
        try:
            with safe_open(path, framework="pt") as shard:
                return "" if (shard.metadata() or {}).get("facts") == self._digest else "is of another cache"
        except SafetensorError as error:
            return f"is no safetensors file ({error})"


def shard_paths(folder: Path) -> list[Path]:
    """The shards of one cache, in the order of their names, sound or not."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(ASIDE))


def damage(path: Path) -> str:
    """Why the content of a shard is not what was written, or "" if it is: it is read in full."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == path.stem else "is damaged (its SHA-256 is not its name)"


@dataclass(frozen=True)
class Contents:
    """What one cache holds: found by `contents`, each shard read in full."""

    folder: Path
    facts: dict[str, Any]
    entries: int
    bytes: int
    damaged: dict[str, str]
    """Reasons by file name; those that were set aside are not among them."""

    def to_text(self) -> str:
        """One line for people, and one for each damaged shard."""
        facts = ", ".join(f"{name} {str(value)[:16]}" for name, value in self.facts.items() if name != "kind")
        lines = [f"{self.folder.name}: {self.entries:,} entries, {self.bytes / 2**20:,.1f} MiB ({facts})"]
        return "\n".join(lines + [f"  {name} {reason}" for name, reason in self.damaged.items()])


def contents(folder: Path) -> list[Contents]:
    """What the caches below `folder` hold, after reading all of it.

    Raises:
        CheckpointError: there is no cache.
    """
    found = []
    for path in _caches(folder):
        keys: set[str] = set()
        damaged = {}
        for shard in shard_paths(path):
            if reason := damage(shard):
                damaged[shard.name] = reason
            else:
                keys |= _open(shard)[0].keys()
        size = sum(shard.stat().st_size for shard in shard_paths(path))
        found.append(Contents(path, read_json(path / "cache.json"), len(keys), size, damaged))
    return found


def prune(folder: Path, *, days: float | None = None, dry_run: bool = False) -> int:
    """Remove what no run will read: damaged shards, and what killed writers left. Returns the bytes that were freed.

    Args:
        folder: of caches.
        days: remove whole caches, too, in which so long nothing was written.
        dry_run: only say what would be freed.

    Raises:
        CheckpointError: there is no cache.
        SettingsError: a process is writing there; nothing of that cache is removed.
        StorageError: something cannot be removed.
    """
    freed = 0
    for path in _caches(folder):
        try:
            with (path / ".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shards = shard_paths(path)
                newest = max((shard.stat().st_mtime for shard in shards), default=0.0)
                old = days is not None and time.time() - newest > days * 86400
                useless = [*path.glob(ASIDE + "*"), *path.glob(".*.tmp-*"), *filter(damage, shards)]
                useless = list(path.iterdir()) if old else useless
                freed += sum(file.stat().st_size for file in useless)
                for file in useless if not dry_run else []:
                    file.unlink()
                if old and not dry_run:
                    path.rmdir()
        except BlockingIOError as error:
            raise SettingsError(f"a process is writing to {path}: wait for it, and prune again") from error
        except OSError as error:
            raise storage_error(path, 0, error) from error
    return freed


def _caches(folder: Path) -> list[Path]:
    found = sorted(path.parent for path in Path(folder).glob("*/cache.json"))
    if not found:
        raise CheckpointError(f"{folder} holds no cache: give the folder that a recipe has as `cache`, or RUN/cache")
    return found


def _open(path: Path) -> tuple[dict[str, list[str]], safe_open]:
    """The names of every entry's tensors by its key, and the open shard."""
    try:
        shard = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can no longer be read ({error}): run again, to make its entries anew") from error
    names: dict[str, list[str]] = {}
    for key, _, name in (tensor.partition("/") for tensor in shard.keys()):
        names.setdefault(key, []).append(name)
    return names, shard
