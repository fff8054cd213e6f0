"""The order of the pictures is a pure function of the seed and the step."""

import time
import tracemalloc

import numpy as np
import pytest
import torch

from davae.data import order
from davae.data.order import SHUFFLED, batch_indices, bucket_batch, permute, random_crops
from davae.errors import SettingsError
from davae.seeds import generator


@pytest.fixture(params=[SHUFFLED, 1], ids=["list", "network"])
def way(request, monkeypatch):
    """The small sets below are shuffled as a list, or by the network that larger ones have."""
    monkeypatch.setattr(order, "SHUFFLED", request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("batch_size", [1, 4, 8, 37, 50])
def test_every_epoch_has_every_picture_once(batch_size):
    count = 37
    stream = [index for step in range(2 * count) for index in batch_indices(count, batch_size, seed=3, step=step)]
    assert len(stream) == 2 * count * batch_size
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.usefixtures("way")
def test_an_interruption_at_any_step_changes_nothing():
    undisturbed = [batch_indices(37, 8, seed=1, step=step) for step in range(10)]
    for stop in range(10):
        torch.manual_seed(stop)  # what else a run draws does not matter
        torch.rand(stop)
        resumed = [batch_indices(37, 8, seed=1, step=step) for step in range(stop, 10)]
        assert resumed == undisturbed[stop:]


def test_seeds_give_different_orders():
    assert batch_indices(37, 37, seed=1, step=0) != batch_indices(37, 37, seed=2, step=0)


@pytest.mark.parametrize(("count", "batch_size", "step"), [(0, 8, 0), (37, 0, 0), (37, 8, -1)])
def test_impossible_batches_are_refused(count, batch_size, step):
    with pytest.raises(SettingsError, match="allowed"):
        batch_indices(count, batch_size, seed=0, step=step)


# large sets


def draw(places: range, count: int, seeds: int) -> np.ndarray:
    """What permutations from so many seeds have at these places, one row each."""
    return np.array([permute(places, count, generator(seed, "test")) for seed in range(seeds)])


def chi_squared(values: np.ndarray, ways: int) -> float:
    """How far the counts of 0 to ways - 1 are from equal ones, in standard deviations of what chance gives."""
    counts = np.bincount(values.ravel(), minlength=ways)
    expected = values.size / ways
    return (((counts - expected) ** 2 / expected).sum() - (ways - 1)) / (2 * (ways - 1)) ** 0.5


@pytest.mark.parametrize("count", [SHUFFLED + 1, 130**2, 130**2 + 1, 20_011, 1 << 16, 99_999])
def test_a_permutation_of_any_count_has_every_number_once(count):
    numbers = permute(range(count), count, generator(0, "test"))
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(count))
    assert permute(range(7, 99), count, generator(0, "test")) == numbers[7:99]


@pytest.mark.parametrize("count", [20_000, 10**8])
def test_every_place_and_every_pair_of_neighbours_is_uniform(count):
    numbers = draw(range(count // 2, count // 2 + 40), count, seeds=200) * 20 // count
    # Each number alone, by epochs and by places; then two neighbours, and the same place of two epochs.
    assert abs(chi_squared(numbers, 20)) < 4
    assert max(abs(chi_squared(place, 20)) for place in numbers.T) < 5
    assert abs(chi_squared(20 * numbers[:, :-1] + numbers[:, 1:], 400)) < 4
    assert abs(chi_squared(20 * numbers[:-1] + numbers[1:], 400)) < 4


def test_a_permutation_has_as_many_fixed_points_cycles_and_inversions_as_chance_gives():
    count, seeds = 20_000, 20
    fixed = cycles = inverted = 0
    for numbers in draw(range(count), count, seeds):
        fixed += (numbers == np.arange(count)).sum()
        inverted += (numbers[:-1] > numbers[1:]).mean()
        left = set(range(count))
        while left:
            cycles, number = cycles + 1, left.pop()
            while (number := int(numbers[number])) in left:
                left.remove(number)
    # Means 1, H(count) and 1/2 of one permutation; variances 1, about H(count) - 1.6 and 1 / (12 count).
    harmonic = np.log(count) + 0.577
    assert abs(fixed / seeds - 1) < 4 / seeds**0.5
    assert abs(cycles / seeds - harmonic) < 4 * ((harmonic - 1.6) / seeds) ** 0.5
    assert abs(inverted / seeds - 0.5) < 4 * (12 * count * seeds) ** -0.5


def measure_step(count: int, steps: int = 10) -> float:
    """Least seconds of this thread for a step of three buckets that hold so many pictures together."""
    counts, seconds = [count // 2, count // 3, count // 6], []
    for step in range(10**9, 10**9 + steps):
        began = time.thread_time()
        bucket, indices = bucket_batch(counts, 256, seed=0, step=step)
        seconds.append(time.thread_time() - began)
        assert len(set(indices)) == 256
        assert max(indices) < counts[bucket]
    return min(seconds)


def test_a_step_of_a_hundred_million_pictures_takes_as_long_as_one_of_few_and_little_memory():
    """How long is measured by benchmarks/order.py: here every call is checked, which takes most of the time."""
    assert measure_step(10**8) < 3 * measure_step(10**5)
    tracemalloc.start()
    measure_step(10**8, steps=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_old_order_stays_and_small_sets_have_it_still():
    def former(count: int) -> list[int]:
        return torch.randperm(count, generator=generator(5, "picture order", 0)).tolist()

    for count in (SHUFFLED, SHUFFLED + 1):
        old = batch_indices(count, count, seed=5, step=0, version=1)
        assert old == former(count)
        assert (batch_indices(count, count, seed=5, step=0) == old) == (count == SHUFFLED)


# crops


def test_crops_are_parts_of_the_images_at_places_of_their_own():
    places = torch.arange(12 * 16, dtype=torch.float32).reshape(1, 1, 12, 16).expand(64, 3, 12, 16)
    crops = random_crops(places, 8, seed=0, samples=range(5, 69))
    assert crops.shape == (64, 3, 8, 8)
    corners = crops[:, 0, 0, 0].long()
    for crop, corner in zip(crops, corners, strict=True):
        top, left = divmod(corner.item(), 16)
        assert torch.equal(crop, places[0, :, top : top + 8, left : left + 8])
    tops, lefts = corners // 16, corners % 16
    assert set(tops.tolist()) == set(range(5))
    assert set(lefts.tolist()) == set(range(9))
    assert torch.equal(crops, random_crops(places, 8, seed=0, samples=range(5, 69)))
    assert not torch.equal(crops, random_crops(places, 8, seed=0, samples=range(6, 70)))


def test_a_crop_of_the_whole_image_is_the_image():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    assert torch.equal(random_crops(images, 4, seed=0, samples=[0, 1]), images)
    for size in (0, 5):
        with pytest.raises(SettingsError, match="1 to 4"):
            random_crops(images, size, seed=0, samples=[0, 1])
