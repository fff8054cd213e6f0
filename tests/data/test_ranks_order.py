"""Which pictures ranks see: of any number of them, interrupted anywhere, all together what one rank would see."""

import pytest
import torch

from davae.data.order import batch_indices, random_crops

PICTURES, EPOCHS = 37, 2


def seen(batch_size: int, ranks: int, steps: range) -> list[int]:
    """The pictures of these steps, rank by rank, as a run that starts at the first of them draws them."""
    part = batch_size // ranks
    return [
        index
        for step in steps
        for rank in range(ranks)
        for index in batch_indices(PICTURES, batch_size, seed=5, step=step)[rank * part : (rank + 1) * part]
    ]


@pytest.mark.parametrize("batch_size", [4, 8])
def test_interrupted_anywhere_and_gone_on_with_other_ranks_none_is_lost_or_seen_twice(batch_size: int) -> None:
    steps = -(-EPOCHS * PICTURES // batch_size)
    whole = seen(batch_size, 1, range(steps))
    for epoch in range(EPOCHS):
        assert sorted(whole[epoch * PICTURES : (epoch + 1) * PICTURES]) == list(range(PICTURES))
    for first in (1, 2, 4):
        for then in (1, 2, 4):
            for stopped in range(steps + 1):
                before = seen(batch_size, first, range(stopped))
                assert before + seen(batch_size, then, range(stopped, steps)) == whole


@pytest.mark.parametrize("ranks", [2, 4])
def test_crops_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    images = torch.arange(8 * 3 * 9 * 9).reshape(8, 3, 9, 9)
    whole, numbers = random_crops(images, 4, seed=1, samples=range(8)), torch.arange(8)
    parts = [
        random_crops(part, 4, seed=1, samples=own.tolist())
        for part, own in zip(images.chunk(ranks), numbers.chunk(ranks), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
