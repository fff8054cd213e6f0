"""Random numbers as a pure function of (seed, purpose, step), so that no order of calls can disturb them."""

import hashlib

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator keyed by `seed`, by what the numbers are for, and by where in the run they are drawn.

    Two keys that differ in any part give independent streams; equal keys give equal streams on every machine.
    """
    key = hashlib.sha256(repr((seed, purpose, position)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
