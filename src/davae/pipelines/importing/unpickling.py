"""Writes a torch checkpoint's tensors as safetensors: `python -m davae.pipelines.importing.unpickling`.

`davae.pipelines.importing.reading` starts it. It knows no model, and the size of the file bounds its memory.
"""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Address space beside four times the file, which is read, unpacked, copied and written.
SPARE_BYTES = 2 * 2**30


def open_wrappers(entries: Mapping[Any, Any], wrappers: Sequence[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Open the first of `wrappers` that holds tensors, and so on: their names from outside in, and the tensors."""
    for name in wrappers:
        inner = entries.get(name)
        if isinstance(inner, Mapping):
            names, tensors = open_wrappers(inner, wrappers)
            if tensors:
                return [name, *names], tensors
    return [], {name: entry for name, entry in entries.items() if isinstance(name, str) and isinstance(entry, Tensor)}


def convert(source: Path, target: Path, wrappers: Sequence[str]) -> None:
    """Read `source` as tensors only and write those inside its wrappers to `target`, every dtype as it is."""
    # Bounded memory: a small pickle may ask for any amount.
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + 4 * source.stat().st_size + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)  # each thread's stack counts, too

    entries = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(entries, Mapping):
        raise TypeError(f"it holds a {type(entries).__name__}, not a dictionary of tensors")
    opened, tensors = open_wrappers(entries, wrappers)
    if not tensors:
        raise TypeError(f"it holds no tensors by name, but {list(entries)[:6]}")

    beside = [str(name) for name in entries if name not in opened[:1] and (opened or name not in tensors)]
    facts = {"opened": json.dumps(opened), "beside": json.dumps(beside)}
    # Cloned: safetensors takes neither views of one storage nor other orders of the axes.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, target, metadata=facts)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
