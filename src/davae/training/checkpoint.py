"""Checkpoints on disk: written whole or not at all, checked by SHA-256, free of pickle.

A checkpoint is a folder `step-00000100` with one safetensors file for each group of tensors, state.json with the plain
values, and manifest.json, which names every file with its length and SHA-256 and is written last.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from davae.errors import CheckpointError, NumericsError
from davae.storage import fsync, share_as_umask_says, storage_error

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the step it was taken at, tensors on the CPU by group and name, plain values."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, recipe_digest: str, keep: int) -> Path:
    """Write `checkpoint` below `folder`, verify it, and only then delete all but the newest `keep` checkpoints.

    Returns:
        The folder of the new checkpoint.

    Raises:
        NumericsError: a tensor holds a number that is not finite; nothing is written.
        StorageError: the disk is full, read-only or failing; nothing of the new checkpoint stays, the old ones do.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    needed = sum(t.numel() * t.element_size() for tensors in checkpoint.groups.values() for t in tensors.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _check_finite(checkpoint)
        temporary.mkdir()
        _write_files(temporary, checkpoint, recipe_digest)
        share_as_umask_says(temporary)
        fsync(temporary)
        temporary.rename(target)
        fsync(folder)
    except (OSError, SafetensorError) as error:
        raise storage_error(target, needed, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify_checkpoint(target)
    for old in _checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint below `folder`, or None when there is none.

    Damaged checkpoints are moved aside to `damaged-...`, with a logged warning that names the file and the reason.

    Raises:
        CheckpointError: the newest checkpoint was written by a newer version of davae.
        StorageError: a damaged checkpoint cannot be moved aside.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as damage:
            aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
            logger.warning("%s; moved aside to %s, falling back to an older one", damage, aside.name)
            try:
                path.rename(aside)
            except OSError as error:
                raise storage_error(aside, 0, error) from error
        else:
            return path
    if found:
        logger.warning("no sound checkpoint is left in %s: starting from step 0", folder)
    return None


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what its manifest says."""


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of the checkpoint `path` against its manifest, and return the manifest.

    Raises:
        DamagedCheckpointError: a file is missing, or has another length or SHA-256, or the folder was renamed.
        CheckpointError: the checkpoint was written by a newer version of davae.
    """
    manifest_path = path / "manifest.json"
    try:
        content = manifest_path.read_bytes()
        manifest = json.loads(content)
        if content != _canonical({**manifest, "digest": _digest_of(manifest)}):
            raise DamagedCheckpointError(f"{manifest_path} is damaged: its own digest does not fit")
    except OSError as error:
        raise DamagedCheckpointError(f"{manifest_path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise DamagedCheckpointError(f"{manifest_path} is damaged: {error}") from error
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['format_version']}, davae reads {FORMAT_VERSION}: update davae"
        )
    if path.name != f"step-{manifest['step']:08d}":
        raise DamagedCheckpointError(f"{path} is damaged: it holds step {manifest['step']}")
    for name, expected in manifest["files"].items():
        try:
            found = _fingerprint(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        if found["bytes"] != expected["bytes"]:
            reason = f"{found['bytes']:,} bytes instead of {expected['bytes']:,}"
            raise DamagedCheckpointError(f"{path / name} is damaged: {reason}")
        if found != expected:
            raise DamagedCheckpointError(f"{path / name} is damaged: its SHA-256 is not the manifest's")
    return manifest


def load_checkpoint(path: Path, *, recipe_digest: str) -> Checkpoint:
    """Read and verify the checkpoint `path`.

    Raises:
        CheckpointError: it is damaged, or it belongs to a recipe with another digest.
    """
    manifest = verify_checkpoint(path)
    if manifest["recipe_digest"] != recipe_digest:
        raise CheckpointError(
            f"{path} was written with the recipe of digest {manifest['recipe_digest'][:12]}, this run has digest "
            f"{recipe_digest[:12]}. Give the old recipe to go on with it, or a new folder to start afresh"
        )
    groups = {Path(name).stem: load_file(path / name) for name in manifest["files"] if name.endswith(".safetensors")}
    return Checkpoint(manifest["step"], groups, json.loads((path / "state.json").read_text()))


def remove_litter(folder: Path) -> None:
    """Remove what killed saves and deletions left below `folder`; only the one run that writes there may call it."""
    for path in folder.glob("step-*.tmp-*"):
        shutil.rmtree(path)


def _check_finite(checkpoint: Checkpoint) -> None:
    for group, tensors in checkpoint.groups.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise NumericsError(
                    f"step {checkpoint.step}: {group} tensor {name} holds numbers that are not finite, so no checkpoint"
                    " is written. The older ones are sound: lower the learning rate and start a new run"
                )


def _write_files(folder: Path, checkpoint: Checkpoint, recipe_digest: str) -> None:
    for group, tensors in checkpoint.groups.items():
        save_file(dict(tensors), folder / f"{group}.safetensors")
    (folder / "state.json").write_bytes(_canonical(checkpoint.values))
    files = sorted(folder.iterdir())
    for file in files:
        fsync(file)
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "recipe_digest": recipe_digest,
        "files": {file.name: _fingerprint(file) for file in files},
    }
    (folder / "manifest.json").write_bytes(_canonical({**manifest, "digest": _digest_of(manifest)}))
    fsync(folder / "manifest.json")


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders below `folder`, oldest first, sound or not."""
    paths = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def _remove(path: Path) -> None:
    # Renamed first: a kill half way through leaves litter, not a checkpoint that looks damaged.
    doomed = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise storage_error(path, 0, error) from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: manifest[key] for key in manifest if key != "digest"})).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
