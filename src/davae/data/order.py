"""Which pictures, and which parts of them, a training step sees: pure functions of the seed and the step.

Nothing is stored, so that a run that resumes at a step sees the same as an undisturbed run.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Shaped
from torch import Tensor

from davae.errors import SettingsError
from davae.seeds import generator, sample_generators


def batch_indices(count: int, batch_size: int, *, seed: int, step: int, bucket: int = 0) -> list[int]:
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
        permutation = torch.randperm(count, generator=generator(seed, "picture order", epoch, *position))
        indices += permutation[start : start + batch_size - len(indices)].tolist()
        epoch, start = epoch + 1, 0
    return indices


def bucket_batch(counts: Sequence[int], batch_size: int, *, seed: int, step: int) -> tuple[int, list[int]]:
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
    return bucket, batch_indices(counts[bucket], batch_size, seed=seed, step=done[bucket], bucket=bucket)


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
