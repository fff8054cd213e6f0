"""Checkpoints on disk: written whole or not at all, checked by SHA-256, free of pickle.

A checkpoint is a folder `step-00000100` with one safetensors file for each group of tensors, state.json with the plain
values, and manifest.json, which names every file with its length and SHA-256 and is written last.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from davae.errors import CheckpointError, NumericsError
from davae.run import faults
from davae.run.storage import read_json, remove_whole, replaced_whole, storage_errors, write

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
# Larger numbers are refused like those that are not finite: their squares, and so every norm, overflow float32.
LARGEST = 1e19
MANIFEST_TYPES = {"format_version": int, "step": int, "recipe_digest": str, "files": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the step it was taken at, tensors on the CPU by group and name, plain values."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files do not fit its manifest."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, recipe_digest: str, keep: int) -> None:
    """Write `checkpoint` below `folder`, verify it, and only then delete all but the newest `keep` checkpoints.

    A tensor with a number that is not finite, or above `LARGEST`, is a NumericsError, and nothing is written. If the
    disk fails, that is a StorageError, or a DamagedCheckpointError if it shows on reading only; the old ones stay.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    needed = sum(tensor.nbytes for tensors in checkpoint.groups.values() for tensor in tensors.values())
    with replaced_whole(target, needed=needed) as partial:
        if problem := _find_bad_tensor(checkpoint.groups):
            raise NumericsError(
                f"step {checkpoint.step}: {problem}, so no checkpoint is written. The older ones are sound: lower the "
                "learning rate and start a new run"
            )
        _write_files(partial, checkpoint, recipe_digest)

    # Old checkpoints go when the new one has been read back.
    verify_checkpoint(target)
    for old in _checkpoints(folder)[:-keep]:
        remove_whole(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint below `folder`, or None; damaged ones are moved aside, with a warning that says why.

    If the newest was written by a newer davae, that is a CheckpointError.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        try:
            if problem := _find_bad_tensor(_load_groups(path, verify_checkpoint(path))):
                raise DamagedCheckpointError(f"{path} is damaged: {problem}")
        except DamagedCheckpointError as damage:
            aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
            logger.warning("%s; moved aside to %s, falling back to an older one", damage, aside.name)
            with storage_errors(aside):
                path.rename(aside)
        else:
            return path

    if paths:
        logger.warning("no sound checkpoint is left in %s: starting from step 0", folder)
    return None


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of the checkpoint `path` against its manifest, and return the manifest.

    A missing or damaged file is a DamagedCheckpointError, a checkpoint of a newer davae is a CheckpointError.
    """
    manifest = _read_manifest(path / "manifest.json")
    version = manifest["format_version"]
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, davae reads {FORMAT_VERSION}: update davae")
    if "state.json" not in manifest["files"] or any(Path(name).name != name for name in manifest["files"]):
        raise DamagedCheckpointError(f"{path / 'manifest.json'} is damaged: these are no files of a checkpoint")
    if path.name != f"step-{manifest['step']:08d}":
        raise DamagedCheckpointError(f"{path} is damaged: it holds step {manifest['step']}")

    # Length and SHA-256 of each file.
    for name, expected in manifest["files"].items():
        try:
            actual = _fingerprint(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        if actual != expected:
            raise DamagedCheckpointError(f"{path / name} is damaged: its SHA-256 or its length is not the manifest's")
    return manifest


def load_checkpoint(path: Path, *, recipe_digest: str, verified: bool = False) -> Checkpoint:
    """Read the checkpoint `path`, or raise a CheckpointError if it is damaged or of a recipe with another digest.

    `verified` skips the check for damage, which `latest_checkpoint` has made.
    """
    manifest = _read_manifest(path / "manifest.json") if verified else verify_checkpoint(path)
    # Digests of formats 1 to 3 included settings that may change by now; recipe.toml is compared in any case.
    if manifest["recipe_digest"] != recipe_digest and manifest["format_version"] > 3:
        raise CheckpointError(
            f"{path} was written with the recipe of digest {manifest['recipe_digest'][:12]}, this run has digest "
            f"{recipe_digest[:12]}. Give the old recipe to go on with it, or a new folder to start afresh"
        )

    # Format 1 knew no loss spikes.
    values = read_json(path / "state.json")
    if manifest["format_version"] < 2:
        values |= {"recent": [], "spikes": 0}
    return Checkpoint(manifest["step"], _load_groups(path, manifest), values)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest.json whose own digest fits, with all keys of their types."""
    try:
        faults.at("load", path)
        content = path.read_bytes()
        manifest = json.loads(content)
        if content != _seal(manifest):
            raise DamagedCheckpointError(f"{path} is damaged: its own digest does not fit")
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from error

    # The digest proves that nothing was damaged, not that the content makes sense.
    for key, kind in MANIFEST_TYPES.items():
        if not isinstance(manifest.get(key), kind):
            raise DamagedCheckpointError(f"{path} is damaged: {key} is {manifest.get(key)!r}")
    return manifest


def _load_groups(path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors in the files that a manifest names, by group and name."""
    groups = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                groups[Path(name).stem] = load_file(path / name)
            except (OSError, SafetensorError) as error:
                raise DamagedCheckpointError(f"{path / name} is damaged: {error}") from error
    return groups


def _find_bad_tensor(groups: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The fault of the first tensor that no checkpoint may hold, or ""."""
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.numel() and not tensor.abs().amax() <= LARGEST:  # false for NaN, too
                return f"{group} tensor {name} holds numbers that are not finite, or above {LARGEST:g}"
    return ""


def _write_files(folder: Path, checkpoint: Checkpoint, recipe_digest: str) -> None:
    for group, tensors in checkpoint.groups.items():
        faults.at("save.open", folder / f"{group}.safetensors")
        save_file(dict(tensors), folder / f"{group}.safetensors")
    write(folder / "state.json", _canonical(checkpoint.values))

    # The fingerprints are taken before the fsync, so that damage by the disk shows.
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "recipe_digest": recipe_digest,
        "files": {file.name: _fingerprint(file) for file in sorted(folder.iterdir())},
    }
    write(folder / "manifest.json", _seal(manifest))


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders below `folder`, oldest first, sound or not."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal(manifest: Mapping[str, Any]) -> bytes:
    """A manifest.json with its own SHA-256 in it."""
    content = dict(manifest)
    content.pop("digest", None)
    return _canonical({**content, "digest": hashlib.sha256(_canonical(content)).hexdigest()})


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
