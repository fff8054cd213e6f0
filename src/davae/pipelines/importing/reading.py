"""Checkpoint files as named tensors. Pickled ones are opened in another process, which runs nothing that they say."""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from davae.errors import CheckpointError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of the names of torch files."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EMA_WRAPPERS = ("ema_state_dict", "ema")
WRAPPERS = ("model_state_dict", "state_dict", "model")
PREFIXES = ("module.", "model.")
"""What data-parallel and Lightning wrappers put before every name."""
SECONDS, BYTES_A_SECOND = 120, 5_000_000
"""A torch file may take the first, and its size over the second, to be opened."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors, out of their wrappers and without their prefixes."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    opened: tuple[str, ...] = ()
    """Wrappers that were opened, from outside in."""
    beside: tuple[str, ...] = ()
    """Entries beside those, which were not read."""
    prefixes: tuple[str, ...] = ()
    """What was taken off the names."""

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor that must be there.

        Raises:
            CheckpointError: it is missing.
        """
        if key not in self.tensors:
            raise CheckpointError(
                f"{self.path}: the first mismatch is {key}: found none, wanted a tensor. The file has, for example, "
                f"{', '.join(sorted(self.tensors)[:4])}: is it of this kind, and whole?"
            )
        return tuple(self.tensors[key].shape)


@dataclass(frozen=True)
class Statistics:
    """Means and deviations of latent channels, base first."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_checkpoint(path: Path, *, ema: bool = True) -> Checkpoint:
    """All tensors of a `.safetensors` file, or of a torch file (`PICKLED`).

    Args:
        path: the file.
        ema: whether the moving average is taken where a torch file has both that and the raw weights.

    Raises:
        CheckpointError: it is missing, damaged, of another format, holds Python objects that are no tensors, or numbers
            that are not finite or of no usual dtype.
    """
    if path.suffix not in (".safetensors", *PICKLED) or not path.is_file():
        what = "is no checkpoint file" if path.exists() else "is not there"
        what = "is a folder: give a file in it" if path.is_dir() else what
        raise CheckpointError(f"{path} {what}; allowed are files in {', '.join(('.safetensors', *PICKLED))}")
    wrappers = (*EMA_WRAPPERS, *WRAPPERS) if ema else WRAPPERS
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix == ".safetensors":
            tensors, facts = load_file(path), dict[str, list[str]]()
        else:
            tensors, facts = _unpickled(path, wrappers)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. It is damaged or no checkpoint: copy it anew"
        ) from error
    named, prefixes = _without_prefixes(tensors, path)
    for key, tensor in named.items():
        if tensor.dtype in DTYPES and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds numbers that are not finite: the file is of a failed run")
    return Checkpoint(
        path, sha256, named, tuple(facts.get("opened", ())), tuple(facts.get("beside", ())), tuple(prefixes)
    )


def read_statistics(path: Path) -> Statistics:
    """`mean` and `std`, one number a channel: from JSON, or tensors of any shape, such as [1, C, 1, 1].

    Raises:
        CheckpointError: there are none, or a deviation is not above 0.
    """
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_bytes())
            mean, std = ([float(number) for number in found[name]] for name in ("mean", "std"))
        else:
            tensors = read_checkpoint(path).tensors
            mean, std = (tensors[name].double().flatten().tolist() for name in ("mean", "std"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} holds no statistics: {error!r}. Wanted are `mean` and `std`, one number for each latent channel"
        ) from error
    if len(mean) != len(std) or not all(0 < deviation < float("inf") for deviation in std):
        raise CheckpointError(f"{path}: {len(mean)} means and {len(std)} deviations; wanted are as many, all above 0")
    return Statistics(tuple(mean), tuple(std))


def _unpickled(path: Path, wrappers: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    with tempfile.TemporaryDirectory(prefix="davae-import-") as folder:
        written = Path(folder, "tensors.safetensors")
        # -P: a file in the working directory that is named like a module is not one.
        program = "davae.pipelines.importing.unpickling"
        command = [sys.executable, "-P", "-m", program, str(path), str(written), *wrappers]
        seconds = SECONDS + path.stat().st_size / BYTES_A_SECOND
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"{path} was not open after {seconds:.0f} s: it is no plain checkpoint") from error
        if done.returncode:
            raise CheckpointError(
                f"{path} cannot be read as tensors only ({_reason(done.stderr)}). It is damaged, or holds Python "
                "objects, which davae does not run: where you trust it, save its state dict alone, as safetensors"
            )
        with safe_open(written, "pt") as opened:
            facts = {name: json.loads(value) for name, value in opened.metadata().items() if name != "format"}
        return load_file(written), facts


def _reason(errors: str) -> str:
    """What stopped the other process, in few words."""
    foreign = re.search(r"GLOBAL (\S+)", errors)
    if foreign:
        return f"it asks for {foreign[1]}"
    lines = [line.strip() for line in errors.splitlines() if line.strip() and not line.startswith("Check the docu")]
    return lines[-1][:200] if lines else "its process was ended"


def _without_prefixes(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    named: dict[str, Tensor] = {}
    taken_off = []
    for key, tensor in tensors.items():
        name = key
        while prefix := next((each for each in PREFIXES if name.startswith(each)), ""):
            name = name.removeprefix(prefix)
            taken_off.append(prefix)
        if name in named:
            raise CheckpointError(f"{path} has {name} twice, with and without a prefix ({', '.join(PREFIXES)})")
        named[name] = tensor
    return named, sorted(set(taken_off))
