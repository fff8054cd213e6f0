"""Random numbers as a pure function of (seed, purpose, place in the run): no order of calls can disturb them."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator keyed by `seed`, the purpose of its numbers, and the place in the run where they are drawn.

    Two keys that differ in any part give independent streams; equal keys give equal streams on every machine.
    """
    key = hashlib.sha256(repr((seed, purpose, position)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def sample_generators(seed: int, purpose: str, samples: Iterable[int]) -> list[torch.Generator]:
    """A generator for each sample of a batch, keyed by its number in the run (`Ranks.sample_numbers`)."""
    return [generator(seed, purpose, sample) for sample in samples]


def randn(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Normal numbers of `shape` [B, ...]; each sample draws from its own one of B generators."""
    numbers = torch.empty(*shape)
    for sample, own in zip(numbers, generators, strict=True):
        sample.normal_(generator=own)
    return numbers


def rand(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform numbers [B] in [0, 1); each sample draws from its own one of B generators."""
    return torch.cat([torch.rand(1, generator=own) for own in generators])
