"""Overlapping tiles, each on its own, averaged with weights that fall smoothly to their borders.

Imports torch only, so that this one file can lie beside weights.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def blended_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: float, channels: int, up: int, down: int
) -> Tensor:
    """What `run` makes of tiles of `x`, put together: [B, `channels`, H / `down` * `up`, W / `down` * `up`].

    Args:
        run: works on `x`, and on any part of it whose sides are multiples of `down`.
        x: [B, any, H, W], one of its sides larger than a tile.
        tile: its side, in `down` positions of `x`.
        overlap: part of it that neighbours share at least.
        channels: of the output.
        up: positions of the output for `down` of `x`.
        down: see `up`.
    """
    height, width = (length // down for length in x.shape[-2:])  # these and all below in `down` positions of `x`
    stride = max(1, int(tile * (1 - overlap)))
    tops, lefts = ([*range(0, length - tile, stride), max(0, length - tile)] for length in (height, width))
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), channels, height * up, width * up, dtype=dtype, device=x.device)
    weights = torch.zeros_like(total[:1, :1])
    for top, left in product(tops, lefts):
        piece = run(x[..., top * down : (top + tile) * down, left * down : (left + tile) * down])
        weight = torch.outer(*(_feather(length, total) for length in piece.shape[-2:]))
        rows, columns = (slice(at * up, at * up + n) for at, n in zip((top, left), weight.shape, strict=True))
        total[..., rows, columns] += piece * weight
        weights[..., rows, columns] += weight
    return (total / weights).to(x.dtype)


def _feather(length: int, like: Tensor) -> Tensor:
    """Weights [length] that rise as a squared sine from each border and never reach zero."""
    position = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
    return torch.sin(torch.pi * position).square() + 1e-4
