"""Which pictures ranks see: of any number of them, interrupted anywhere, all together what one rank would see (R6)."""

from itertools import chain

import pytest
import torch
from PIL import Image

from davae.data import loading, sources
from davae.data.loading import Ahead
from davae.data.order import batch_indices, random_crops
from davae.data.sources import PictureSet, open_pictures

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


@pytest.mark.soak("R6")
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


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    """Pictures that are decoded at every use, picture n as grey as n."""
    folder = tmp_path_factory.mktemp("numbered")
    for number in range(PICTURES):
        Image.new("RGB", (16, 16), (number, number, number)).save(folder / f"{number:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MEMORY_BYTES", 0)
        return open_pictures(folder, size=16, captions=False)


@pytest.mark.soak("R6")
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", range(5))
def test_interrupted_anywhere_any_number_of_decoding_threads_gives_the_same_pictures(
    workers: int, ranks: int, numbered: PictureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As stage 1 loads them: each rank its part, two batches ahead, which an interruption throws away.

    Around each interruption three steps are loaded before and three after it.
    """
    monkeypatch.setattr(loading, "WORKERS", workers)
    part, steps = 4 // ranks, -(-EPOCHS * PICTURES // 4)
    whole = [seen(4, 1, range(step, step + 1)) for step in range(steps)]

    def decoded(rank: int, steps: range) -> list[list[int]]:
        def make(step: int) -> list[int]:
            indices = numbered.step_indices(4, seed=5, step=step)[rank * part : (rank + 1) * part]
            return ((numbered.batch(indices)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()

        with Ahead(make) as load:
            return [load(step) for step in steps]

    for stopped in range(steps + 1):
        first, last = max(0, stopped - 3), min(stopped + 3, steps)
        ran = [decoded(rank, range(first, stopped)) + decoded(rank, range(stopped, last)) for rank in range(ranks)]
        assert [list(chain(*parts)) for parts in zip(*ran, strict=True)] == whole[first:last]


@pytest.mark.soak("R6")
@pytest.mark.parametrize("ranks", [2, 4])
def test_crops_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    images = torch.arange(8 * 3 * 9 * 9).reshape(8, 3, 9, 9)
    whole, numbers = random_crops(images, 4, seed=1, samples=range(8)), torch.arange(8)
    parts = [
        random_crops(part, 4, seed=1, samples=own.tolist())
        for part, own in zip(images.chunk(ranks), numbers.chunk(ranks), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
