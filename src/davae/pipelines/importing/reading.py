"""Checkpoint files as named tensors. Pickled files are opened in another process, which runs nothing that they say."""

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
    opened: tuple[str, ...] = ()  # wrappers, from outside in
    beside: tuple[str, ...] = ()  # entries beside them, which were not read
    prefixes: tuple[str, ...] = ()  # taken off the names

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; refuses a file without it."""
        if key not in self.tensors:
            examples = ", ".join(sorted(self.tensors)[:4])
            raise self.mismatch(key, f"found none, wanted a tensor. The file has, for example, {examples}")
        return tuple(self.tensors[key].shape)

    def mismatch(self, key: str, difference: str) -> CheckpointError:
        """The error to raise at the first key that a layout does not explain."""
        return CheckpointError(f"{self.path}: the first mismatch is {key}: {difference}")


def read_checkpoint(path: Path, *, ema: bool = True) -> ForeignCheckpoint:
    """Read all tensors of a file; with `ema` the moving average, where a torch file has that beside the raw weights.

    Python objects that are no tensors and numbers that are not finite are refused.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        problem = "is a folder: give a file in it" if path.is_dir() else "is no checkpoint file"
        if not path.exists():
            problem = "is not there"
        raise CheckpointError(f"{path} {problem}; allowed are files in {', '.join(SUFFIXES)}")

    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix != ".safetensors":
            tensors, opened, beside = _unpickle(path, (*EMA_WRAPPERS, *WRAPPERS) if ema else WRAPPERS)
        else:
            tensors, opened, beside = load_file(path), [], []
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint, copy it anew: {error}") from error

    # Names without the prefixes of wrappers.
    renamed: dict[str, Tensor] = {}
    prefixes: set[str] = set()
    for key, tensor in tensors.items():
        name = key
        while name.startswith(PREFIXES):
            prefix, _, name = name.partition(".")
            prefixes.add(f"{prefix}.")
        if name in renamed:
            raise CheckpointError(f"{path} has {name} twice, with and without a prefix ({', '.join(PREFIXES)})")
        # A number that is not finite would spoil every result without a word.
        if tensor.dtype in DTYPES and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite: the file is of a failed run")
        renamed[name] = tensor
    return ForeignCheckpoint(path, sha256, renamed, tuple(opened), tuple(beside), tuple(sorted(prefixes)))


def read_statistics(path: Path) -> Tensor:
    """Read means and deviations [2, C], float64: `mean` and `std` of a JSON or tensor file, there of any shape."""
    try:
        numbers = json.loads(path.read_bytes()) if path.suffix == ".json" else read_checkpoint(path).tensors
        mean = torch.as_tensor(numbers["mean"], dtype=torch.float64).flatten()
        std = torch.as_tensor(numbers["std"], dtype=torch.float64).flatten()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        wanted = "`mean` and `std`, one number for each latent channel"
        raise CheckpointError(f"{path} holds no statistics, {wanted}: {error!r}") from error

    if len(mean) != len(std) or not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        counts = f"{len(mean)} means and {len(std)} deviations"
        raise CheckpointError(f"{path}: {counts}; wanted are as many, all finite, and deviations above 0")
    return torch.stack([mean, std])


def _unpickle(path: Path, wrappers: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of a torch file, the wrappers that were opened, and the entries beside them."""
    with tempfile.TemporaryDirectory(prefix="davae-import-") as folder:
        written = Path(folder, "tensors.safetensors")
        # -P: no module is imported from the working directory.
        program = [sys.executable, "-P", "-m", "davae.pipelines.importing.unpickling"]
        command = [*program, str(path), str(written), *wrappers]
        seconds = SECONDS + path.stat().st_size / BYTES_PER_SECOND
        try:
            process = subprocess.run(command, capture_output=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"{path} was not open after {seconds:.0f} s: it is no plain checkpoint") from error
        if process.returncode:
            reason = _find_reason(process.stderr.decode(errors="replace"))
            raise CheckpointError(
                f"{path} cannot be read as tensors only ({reason}). It is damaged, or holds Python objects, which "
                "davae does not run: if you trust it, save its state dict as safetensors"
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
