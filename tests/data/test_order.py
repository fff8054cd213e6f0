"""The order of the pictures is a pure function of the seed and the step."""

import pytest
import torch

from davae.data.order import batch_indices, random_crops
from davae.errors import SettingsError


@pytest.mark.parametrize("batch_size", [1, 4, 8, 37, 50])
def test_every_epoch_has_every_picture_once(batch_size):
    count = 37
    stream = [index for step in range(2 * count) for index in batch_indices(count, batch_size, seed=3, step=step)]
    assert len(stream) == 2 * count * batch_size
    epochs = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


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
