"""Tensors that are computed once and kept on disk: entries by key, in safetensors shards that cannot be half there."""

import fcntl
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from davae.errors import CheckpointError
from davae.storage import storage_error, write_atomically, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
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
            process: which of `processes` this is, each of which checks its share.
            processes: how many there are.

        Raises:
            StorageError: a damaged shard cannot be renamed.
        """
        for path in shard_paths(self.folder)[process::processes]:
            reason = damage(path) or self._foreign(path)
            if reason:
                aside = path.with_name(ASIDE + path.name)
                logger.warning("%s %s; set aside as %s, its entries are made again", path, reason, aside.name)
                try:
                    path.rename(aside)
                except OSError as error:
                    raise storage_error(aside, 0, error) from error

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
                    for litter in self.folder.glob(".*.tmp-*"):
                        litter.unlink(missing_ok=True)
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


def cache_folders(folder: Path) -> Iterable[Path]:
    """The caches below `folder`, each with its cache.json.

    Raises:
        CheckpointError: there is none.
    """
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
