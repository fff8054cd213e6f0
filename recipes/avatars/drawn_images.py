"""The drawn images as tensors, for the scripts beside this file."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from davae.data import avatars
from davae.data.pictures import to_bytes, to_floats
from davae.errors import DataError

BATCH = 64


class DrawnImages:
    """The first images of draw.py's training set, or of its held-out set, read from disk when they are asked for."""

    def __init__(self, folder: Path, *, held_out: bool = False, limit: int | None = None) -> None:
        paths = sorted(folder.glob("held_out.npy" if held_out else "training-*.npy"))
        if not paths:
            raise DataError(f"{folder} holds no images: run recipes/avatars/draw.py {folder}")
        self._files = [np.load(path, mmap_mode="r") for path in paths]
        self._per_file = len(self._files[0])

        count = sum(len(file) for file in self._files)
        self._count = count if limit is None else min(limit, count)
        self.attributes = [
            avatars.draw_attributes(number) for number in islice(avatars.numbers(held_out=held_out), self._count)
        ]

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1]."""
        places = [divmod(index, self._per_file) for index in indices]
        return to_floats(torch.from_numpy(np.stack([self._files[file][row] for file, row in places])))

    def half_size(self) -> Tensor:
        """All images at half their side, as the base sees them: uint8 [N, 3, H / 2, W / 2]."""
        parts = torch.arange(len(self)).split(BATCH)
        return torch.cat([to_bytes(halved(self.batch(part.tolist()))) for part in parts])


def halved(images: Tensor) -> Tensor:
    """Images at half their side, by antialiased bicubic interpolation."""
    side = images.shape[-1] // 2
    return F.interpolate(images, size=side, mode="bicubic", antialias=True).clamp(-1, 1)
