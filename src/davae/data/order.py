"""Which pictures, and which parts of them, a training step sees: pure functions of the seed and the step.

Nothing is stored, so that a run that resumes at a step sees the same as an undisturbed run.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from davae.errors import SettingsError
from davae.seeds import generator, sample_generators

ORDER = 2
"""The version of the order that new runs have. Version 1 shuffles sets of any size as a list; both are kept."""
SHUFFLED = 1 << 14
"""A set up to this size is shuffled as a list, which makes all of its orders equally likely, in 0.2 ms."""
ROUNDS = 8
"""Of the Feistel network."""

Places = NDArray[np.uint64]


def batch_indices(
    count: int, batch_size: int, *, seed: int, step: int, bucket: int = 0, version: int = ORDER
) -> list[int]:
    """The pictures of one step, out of `count`.

    The permutations of the epochs, each keyed by (seed, epoch, bucket), are strung together and cut into batches:
    every epoch has every picture exactly once, and a batch may reach from one epoch into the next.
    """
    if count < 1 or batch_size < 1 or step < 0:
        raise SettingsError(f"{count=}, {batch_size=}, {step=}: allowed are numbers from 1, 1 and 0")
    # Start inside the epoch that the step falls into, and go on into the next as far as needed.
    indices: list[int] = []
    epoch, start = divmod(step * batch_size, count)
    position = (bucket,) if bucket else ()
    while len(indices) < batch_size:
        random = generator(seed, "picture order", epoch, *position)
        places = range(start, min(start + batch_size - len(indices), count))
        indices += permute(places, count, random, version=version)
        epoch, start = epoch + 1, 0
    return indices


def permute(places: range, count: int, random: torch.Generator, *, version: int = ORDER) -> list[int]:
    """Where a permutation of `count` numbers, drawn from `random`, sends these places: in time and memory of theirs.

    Beyond `SHUFFLED` it is a Feistel network over pairs (left, right): each round adds a hash of one half to the other,
    which can be taken off again (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The rectangle of
    pairs is the least that holds all numbers; a result outside of them goes through the network again.
    """
    if version == 1 or count <= SHUFFLED:
        return torch.randperm(count, generator=random)[places.start : places.stop].tolist()

    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (ROUNDS,), generator=random).numpy().view(np.uint64)
    height = math.isqrt(count - 1) + 1
    width = -(-count // height)

    def scramble(numbers: Places) -> Places:
        left, right = np.divmod(numbers, np.uint64(width))
        for turn, key in enumerate(keys):
            if turn % 2:
                right = (right + _hash(left, key) % np.uint64(width)) % np.uint64(width)
            else:
                left = (left + _hash(right, key) % np.uint64(height)) % np.uint64(height)
        return left * np.uint64(width) + right

    # Follow the cycles back into the range: less than one number in `width` is outside.
    numbers = scramble(np.asarray(places, np.uint64))
    while (outside := numbers >= count).any():
        numbers[outside] = scramble(numbers[outside])
    return numbers.tolist()


def _hash(numbers: Places, key: np.uint64) -> Places:
    """64 bits that depend on every bit of a number and of the key: the finaliser of MurmurHash3, wrapping around."""
    hashed = numbers * np.uint64(0x9E3779B97F4A7C15) + key
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashed = (hashed ^ (hashed >> np.uint64(33))) * np.uint64(factor)
    return hashed ^ (hashed >> np.uint64(33))


def bucket_batch(
    counts: Sequence[int], batch_size: int, *, seed: int, step: int, version: int = ORDER
) -> tuple[int, list[int]]:
    """The bucket of one step, and its pictures among the `counts[bucket]` that it has.

    Each bucket has its own stream of batches (`batch_indices`), and so its own epochs. Batch k of a bucket of n
    pictures stands at (k + 1/2) batch_size / n epochs, and the steps take all batches in the order of these places: at
    any step every bucket, however small, has had its share to within one batch. One bucket gives `batch_indices`.
    """
    if not counts or min(counts) < 1 or batch_size < 1 or step < 0:
        raise SettingsError(f"{counts=}, {batch_size=}, {step=}: allowed are buckets, and numbers from 1, 1 and 0")
    # Jump near the step: rounding leaves out or adds at most half a batch of each bucket, so this is never too far.
    epochs = Fraction(max(0, step - len(counts)) * batch_size, sum(counts))
    done = [int(epochs * count / batch_size + Fraction(1, 2)) for count in counts]

    # From there, one batch after the other.
    places = [(Fraction(2 * done[bucket] + 1, count), bucket) for bucket, count in enumerate(counts)]
    heapq.heapify(places)
    for _ in range(step - sum(done)):
        _, bucket = places[0]
        done[bucket] += 1
        heapq.heapreplace(places, (Fraction(2 * done[bucket] + 1, counts[bucket]), bucket))
    _, bucket = places[0]
    order = batch_indices(counts[bucket], batch_size, seed=seed, step=done[bucket], bucket=bucket, version=version)
    return bucket, order


def random_crops(
    images: Shaped[Tensor, "batch channels height width"], size: int, *, seed: int, samples: Sequence[int]
) -> Shaped[Tensor, "batch channels size size"]:
    """A square of side `size` out of each image, at a place that is drawn by its number in the run, from `samples`."""
    height, width = images.shape[-2:]
    if not 1 <= size <= min(height, width):
        raise SettingsError(f"size={size}: allowed are crops of side 1 to {min(height, width)} out of these images")

    crops = []
    for image, random in zip(images, sample_generators(seed, "crop", samples), strict=True):
        top = int(torch.randint(height - size + 1, (), generator=random))
        left = int(torch.randint(width - size + 1, (), generator=random))
        crops.append(image[:, top : top + size, left : left + size])
    return torch.stack(crops)
