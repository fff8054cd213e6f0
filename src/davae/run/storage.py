"""Files and folders that are written whole or not at all."""

import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from davae.errors import CheckpointError, SettingsError, StorageError
from davae.run import faults

# Most bytes of the name of a folder that davae writes: file systems allow 255, and temporary names are longer.
LONGEST_NAME = 220


@contextmanager
def replaced_whole(folder: Path, *, needed: int = 0) -> Iterator[Path]:
    """A sibling folder to write into, which takes the place of `folder` only once all of it is on the disk.

    Of several writers at once each has a folder of its own, and the last one's stays. `folder` is never gone: the two
    change places in one step, where the file system can do that.

    If `folder` is a symbolic link, the folder that it leads to is replaced; the link stays. Less room than the `needed`
    bytes, or something that cannot be written, is a StorageError: `folder` stays as it was or, if only the last fsync
    failed, is all new.
    """
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    old, lock = folder.with_name(f".{folder.name}.old"), -1
    try:
        # A process may have died before the folders changed places or, where that takes two steps, between them.
        _put_back(old, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.parent.glob(f".{glob.escape(folder.name)}.tmp-*"), old):
            _remove_abandoned(leftover)
        if shutil.disk_usage(folder.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        faults.at("save.open", partial)
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        with suppress(OSError):  # network file systems may have no locks of folders: nothing is tidied up there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial

        # safetensors writes for the owner alone: files get the rights that the umask gave the folder.
        mode = partial.stat().st_mode
        for path in (*partial.rglob("*"), partial):
            path.chmod(mode if path.is_dir() else mode & 0o666)
            fsync(path)

        # The old folder leaves only when the new one is complete.
        if not folder.exists():
            rename(partial, folder)
        elif not exchange(partial, folder):
            rename(folder, old)
            rename(partial, folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        _put_back(old, folder)
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        raise storage_error(folder, max(needed, written), error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed writer left; a living one holds the lock of its folder."""
    if not folder.is_dir():
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _put_back(old: Path, folder: Path) -> None:
    if old.exists() and not folder.exists():
        old.rename(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds all of it or its old content, even after a power cut; make its folder."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with storage_errors(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary, content)
            fsync(temporary)
            rename(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder; a kill half way through leaves litter for `remove_temporaries`, not half a folder."""
    doomed = folder.with_name(f".{folder.name}.tmp-old")
    with storage_errors(folder):
        rename(folder, doomed)
        faults.at("save.unlink", doomed)
        shutil.rmtree(doomed)


def remove_temporaries(folder: Path) -> None:
    """Remove litter of killed writers below `folder`; only the one process that writes there may call this."""
    # The second pattern is that of davae 0.1.0.
    for path in [*folder.rglob(".*.tmp-*"), *folder.rglob("step-*.tmp-*")]:
        # A folder below with a lock of its own, such as a cache that runs share, may have another writer.
        if any((folder / inner / ".lock").exists() for inner in path.relative_to(folder).parents[:-1]):
            continue
        with storage_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def check_replaceable(folder: Path, *, holds: str) -> None:
    """Refuse to replace a folder that davae did not write: one without the file `holds`."""
    if folder.exists() and not (folder / holds).is_file():
        raise SettingsError(
            f"{folder} exists and has no {holds}, so it is not davae's to replace: choose another folder, or remove "
            "it yourself"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before the work whose result goes there; nothing is made."""
    # Temporary names, beside it and inside of it, are a little longer.
    for part in folder.parts:
        if len(os.fsencode(part)) > LONGEST_NAME:
            raise SettingsError(f"{folder}: a name of over {LONGEST_NAME} bytes; give a folder with a shorter one")

    with storage_errors(folder):
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise SettingsError(f"{folder} is a file, or lies below one: give another folder")
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"x")


def try_lock(file: BinaryIO, *, shared: bool = False) -> bool:
    """Whether this process has the file's lock now; the system drops it when the process dies, however it dies."""
    with storage_errors(Path(file.name)):
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextmanager
def storage_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an error of the operating system into a StorageError about `path`, which needs so many bytes."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, needed, error) from error


def storage_error(path: Path, needed: int, error: Exception) -> StorageError:
    """The error to raise when `path` (`needed` bytes) could not be written; it tells how much room there is."""
    return StorageError(
        f"cannot write {path}: {error}. {needed:,} bytes are needed, {free_bytes(path):,} are free. "
        "Make room (or lift the quota, or make the folder writable) or choose another folder, and run again"
    )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` is, or would be."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    return shutil.disk_usage(nearest).free


# ------------------------------------------------------------------------- single operations, each a site for faults


def write(path: Path, content: bytes) -> None:
    """Make the file `path` and fill it."""
    faults.at("save.open", path)
    with path.open("wb") as file:
        faults.at("save.write", path)
        file.write(content)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name; a file of that name is replaced."""
    faults.at("save.rename", path)
    path.replace(target)


def exchange(path: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot do that."""
    faults.at("save.rename", path)
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(path), here, os.fsencode(other), both) == 0


def fsync(path: Path) -> None:
    """Force the file or folder `path` onto the disk."""
    faults.at("save.fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: it is damaged, copy the folder anew")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON, whole or not at all; numbers that are not finite become null."""
    write_atomically(path, (json.dumps(finite(dict(value)), indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """`value` with None in place of every non-finite float inside, which JSON cannot hold."""
    return change_leaves(value, lambda leaf: None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf)


def change_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nest of dicts and lists with `change` applied to everything in it that is neither."""
    if isinstance(value, dict):
        return {key: change_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [change_leaves(item, change) for item in value]
    return change(value)
