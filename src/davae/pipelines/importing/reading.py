"""Checkpoint files as named tensors. Pickled files are opened in another process, which runs nothing that they say."""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from davae.errors import CheckpointError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # all but the first are torch files, and pickled
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMA_WRAPPERS = ("ema_state_dict", "ema")
WRAPPERS = ("model_state_dict", "state_dict", "model")
PREFIXES = ("module.", "model.")  # data-parallel and Lightning wrappers put these before every name

# A torch file may take so many seconds to open, and one more for so many bytes of it.
SECONDS, BYTES_PER_SECOND = 120, 5_000_000


@dataclass(frozen=True)
class ForeignCheckpoint:
    """The tensors of another program's file, out of their wrappers and without their prefixes."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    # Wrappers that were opened, from outside in, and entries beside them, which were not read.
    opened: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    # Prefixes that were removed from the names.
    prefixes: tuple[str, ...] = ()

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; refuses a file without it."""
        if key not in self.tensors:
            examples = ", ".join(sorted(self.tensors)[:4])
            raise mismatch(self.path, key, f"found none, wanted a tensor. The file has, for example, {examples}")
        return tuple(self.tensors[key].shape)


@dataclass(frozen=True)
class Statistics:
    """Means and deviations of latent channels, base first."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def check_channels(self, channels: int, whose: str) -> None:
        """Refuse statistics of another number of channels."""
        if len(self.mean) != channels:
            raise CheckpointError(f"the statistics are of {len(self.mean)} channels, but {whose} has {channels}")


def mismatch(path: Path, key: str, difference: str) -> CheckpointError:
    """The error to raise at the first key that a layout does not explain."""
    return CheckpointError(f"{path}: the first mismatch is {key}: {difference}")


def read_checkpoint(path: Path, *, ema: bool = True) -> ForeignCheckpoint:
    """Read all tensors of a file; with `ema` the moving average, where a torch file has that beside the raw weights.

    Python objects that are no tensors and numbers that are not finite are refused.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        problem = "is a folder: give a file in it" if path.is_dir() else "is no checkpoint file"
        if not path.exists():
            problem = "is not there"
        raise CheckpointError(f"{path} {problem}; allowed are files in {', '.join(SUFFIXES)}")

    opened: list[str] = []
    beside: list[str] = []
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors, opened, beside = _unpickle(path, (*EMA_WRAPPERS, *WRAPPERS) if ema else WRAPPERS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint, copy it anew: {error}") from error

    # A number that is not finite would spoil every result without a word.
    tensors, prefixes = _remove_prefixes(tensors, path)
    for key, tensor in tensors.items():
        if tensor.dtype in DTYPES and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds numbers that are not finite: the file is of a failed run")
    return ForeignCheckpoint(path, sha256, tensors, tuple(opened), tuple(beside), tuple(prefixes))


def read_statistics(path: Path) -> Statistics:
    """Read `mean` and `std`, one number a channel, from JSON or from tensors of any shape, such as [1, C, 1, 1]."""
    try:
        if path.suffix == ".json":
            numbers = json.loads(path.read_bytes())
            mean, std = list(map(float, numbers["mean"])), list(map(float, numbers["std"]))
        else:
            tensors = read_checkpoint(path).tensors
            mean, std = tensors["mean"].double().flatten().tolist(), tensors["std"].double().flatten().tolist()
    except (OSError, ValueError, TypeError, KeyError) as error:
        wanted = "`mean` and `std`, one number for each latent channel"
        raise CheckpointError(f"{path} holds no statistics, {wanted}: {error!r}") from error
    if len(mean) != len(std) or not all(0 < deviation < float("inf") for deviation in std):
        raise CheckpointError(f"{path}: {len(mean)} means and {len(std)} deviations; wanted are as many, all above 0")
    return Statistics(tuple(mean), tuple(std))


def _unpickle(path: Path, wrappers: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of a torch file, the wrappers that were opened, and the entries beside them."""
    with tempfile.TemporaryDirectory(prefix="davae-import-") as folder:
        written = Path(folder, "tensors.safetensors")
        # -P: no module is imported from the working directory.
        program = [sys.executable, "-P", "-m", "davae.pipelines.importing.unpickling"]
        command = [*program, str(path), str(written), *wrappers]
        seconds = SECONDS + path.stat().st_size / BYTES_PER_SECOND
        settings: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": seconds}
        try:
            process = subprocess.run(command, **settings, check=False)
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"{path} was not open after {seconds:.0f} s: it is no plain checkpoint") from error
        if process.returncode:
            raise CheckpointError(
                f"{path} cannot be read as tensors only ({_find_reason(process.stderr)}). It is damaged, or holds "
                "Python objects, which davae does not run: if you trust it, save its state dict as safetensors"
            )

        with safe_open(written, "pt") as file:
            facts = file.metadata()
        return load_file(written), json.loads(facts["opened"]), json.loads(facts["beside"])


def _find_reason(errors: str) -> str:
    """What stopped the other process, in few words."""
    foreign = re.search(r"GLOBAL (\S+)", errors)
    if foreign:
        return f"it asks for {foreign[1]}"
    for line in reversed(errors.splitlines()):
        if line.strip() and not line.startswith("Check the docu"):
            return line.strip()[:200]
    return "its process was ended"


def _remove_prefixes(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their names without prefixes, and the prefixes that were removed."""
    renamed: dict[str, Tensor] = {}
    removed: set[str] = set()
    for key, tensor in tensors.items():
        name = key
        while name.startswith(PREFIXES):
            prefix, _, name = name.partition(".")
            removed.add(f"{prefix}.")
        if name in renamed:
            raise CheckpointError(f"{path} has {name} twice, with and without a prefix ({', '.join(PREFIXES)})")
        renamed[name] = tensor
    return renamed, sorted(removed)
