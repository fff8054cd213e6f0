"""Aspect-ratio buckets: their table, who goes where, what is cut off, in what order; and batches made ahead."""

import threading
import time

import pytest
import torch

from data.stored import fill, picture
from davae.data import loading
from davae.data.buckets import Bucket, Crop, bucket_table, central_crop, choose_bucket, fit
from davae.data.loading import Ahead
from davae.data.order import batch_indices, bucket_batch
from davae.data.sources import open_pictures
from davae.errors import DataError, SettingsError

RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1")


@pytest.mark.parametrize(("size", "multiple"), [(256, 32), (512, 32), (1024, 64), (64, 16)])
def test_buckets_have_about_the_area_and_sides_that_divide(size, multiple):
    buckets = bucket_table([size], RATIOS, multiple=multiple)
    assert Bucket(size, size) in buckets
    for bucket in buckets:
        assert bucket.height % multiple == bucket.width % multiple == 0
        # each side is off by half a step at most
        off = multiple / 2 * (bucket.height + bucket.width) + multiple**2
        assert abs(bucket.height * bucket.width - size**2) <= off
        assert abs(bucket.width - size * bucket.aspect_ratio**0.5) <= multiple / 2


def test_without_ratios_there_are_squares_only_and_twice_is_once():
    assert bucket_table([32]) == (Bucket(32, 32),)
    assert bucket_table([64, 32, 32], multiple=16) == (Bucket(32, 32), Bucket(64, 64))
    assert bucket_table([32], ["2:2", "1:1"]) == (Bucket(32, 32),)


@pytest.mark.parametrize("text", ["3/2", "0:1", "1:0", "1:9", "-1:1", "1.5:1", "3:2:1", ""])
def test_what_is_no_aspect_ratio_is_refused(text):
    with pytest.raises(SettingsError, match="allowed is width:height"):
        bucket_table([256], [text])


def test_a_size_that_is_no_multiple_is_refused():
    with pytest.raises(SettingsError, match="size=100: allowed are multiples of 32"):
        bucket_table([100], multiple=32)


def test_a_picture_goes_to_the_nearest_shape_and_the_largest_size_that_it_fills():
    buckets = bucket_table([256, 512], RATIOS, multiple=32)
    assert choose_bucket(1000, 1000, buckets)[:2] == (512, 512)
    assert choose_bucket(511, 520, buckets)[:2] == (256, 256)  # one too few for 512
    assert choose_bucket(1920, 1080, buckets)[:2] == (384, 672)
    assert choose_bucket(500, 282, buckets)[:2] == (192, 352)
    assert choose_bucket(5000, 600, buckets)[:2] == (352, 736)
    assert choose_bucket(255, 4000, buckets) == choose_bucket(200, 4000, buckets)  # 9:16 has width 192
    assert choose_bucket(191, 4000, buckets) is None
    for width, height in ((300, 290), (700, 260), (200, 900)):
        chosen = choose_bucket(width, height, buckets)
        mirrored = choose_bucket(height, width, [Bucket(b.width, b.height, 1 / b.aspect_ratio) for b in buckets])
        assert chosen[:2] == mirrored[:2][::-1]


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (100, 48), (48, 100), (333, 77), (65, 48)])
def test_the_crop_is_the_largest_of_the_shape_in_the_middle(width, height):
    for bucket in (Bucket(32, 48), Bucket(48, 32), Bucket(48, 48)):
        if width < bucket.width or height < bucket.height:
            continue
        crop = central_crop(width, height, bucket)
        assert crop.width == width or crop.height == height
        assert bucket.width <= crop.width <= width
        assert bucket.height <= crop.height <= height
        assert abs(crop.width * bucket.height - crop.height * bucket.width) <= max(bucket[:2])  # rounded down
        assert 0 <= width - crop.width - 2 * crop.left <= 1
        assert 0 <= height - crop.height - 2 * crop.top <= 1


def test_fit_shows_the_crop_and_nothing_else():
    image = torch.randint(0, 256, (3, 48, 100), dtype=torch.uint8)
    crop = central_crop(100, 48, Bucket(48, 80))
    assert crop == Crop(0, 10, 48, 80)
    assert torch.equal(fit(image, Bucket(48, 80)), image[:, :, 10:90])
    marked = torch.zeros(3, 96, 200, dtype=torch.uint8)
    marked[:, :, :20] = marked[:, :, 180:] = 255  # outside of the crop, and of the filter's reach by more than ringing
    assert fit(marked, Bucket(48, 80))[:, :, 2:-2].max() == 0


# in a set


@pytest.fixture
def bucketed(tmp_path):
    sides = [(64, 64), (96, 64), (64, 96), (200, 130), (96, 60), (40, 40)] * 3
    files = {f"{index:02d}.png": picture(index, *size) for index, size in enumerate(sides)}
    buckets = bucket_table([48], ["1:1", "3:2", "2:3"], multiple=8)
    return open_pictures(fill(tmp_path, files), size=48, captions=False, buckets=buckets)


def test_a_set_knows_the_buckets_and_crops_of_its_pictures(bucketed):
    assert [bucket[:2] for bucket in bucketed.buckets] == [(40, 56), (48, 48), (56, 40)]
    assert list(map(len, bucketed.members)) == [9, 3, 3]
    assert [refusal.name for refusal in bucketed.refused] == ["05.png", "11.png", "17.png"]
    assert all(
        refusal.kind == "too small" and "smaller than 56x40 pixels" in refusal.reason for refusal in bucketed.refused
    )

    for bucket, members in zip(bucketed.buckets, bucketed.members, strict=True):
        assert bucketed.batch(members).shape == (len(members), 3, *bucket[:2])

    # Pictures of several buckets are no batch, but squares of one size.
    with pytest.raises(SettingsError, match="several buckets"):
        bucketed.batch([0, 1])
    assert bucketed.squares(range(5)).shape == (5, 3, 40, 40)
    central = bucketed.batch(bucketed.members[0])[..., 8:48]
    assert torch.equal(bucketed.squares(bucketed.members[0]), central)
    batches = list(bucketed.batches([4, 0, 1, 2, 3], 2))
    assert batches == [[4, 1], [3], [0], [2]]


def test_nothing_large_enough_names_the_smallest_bucket(tmp_path):
    buckets = bucket_table([64], ["2:1"], multiple=16)
    with pytest.raises(DataError, match=r"at least 96x48 pixels.*95x200"):
        open_pictures(fill(tmp_path, {"a.png": picture(0, 95, 200)}), size=64, captions=False, buckets=buckets)


# order


def batches(counts, batch_size, steps, seed=0):
    return [bucket_batch(counts, batch_size, seed=seed, step=step) for step in range(steps)]


@pytest.mark.parametrize("counts", [[7], [5, 3], [1, 40, 9], [4, 4, 4], [100, 1, 1, 1, 13], list(range(1, 16))])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_bucket_goes_through_its_epochs_and_has_its_share_at_any_time(counts, batch_size):
    steps = 2 * sum(counts) + 20
    streams = [[] for _ in counts]
    for step, (bucket, places) in enumerate(batches(counts, batch_size, steps), start=1):
        assert len(places) == batch_size
        streams[bucket] += places
        for stream, count in zip(streams, counts, strict=True):
            assert abs(len(stream) / batch_size - step * count / sum(counts)) < 1 + len(counts) / 2
    for stream, count in zip(streams, counts, strict=True):
        epochs = [stream[start : start + count] for start in range(0, len(stream) - count + 1, count)]
        assert epochs
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_the_step_alone_decides():
    counts = [9, 4, 1]
    undisturbed = batches(counts, 3, 60)
    for step in (0, 1, 17, 59):
        assert bucket_batch(counts, 3, seed=0, step=step) == undisturbed[step]
    assert undisturbed != batches(counts, 3, 60, seed=1)
    assert bucket_batch(counts, 3, seed=0, step=10**9)[0] in range(3)


def test_one_bucket_is_the_order_without_buckets_and_equal_buckets_differ():
    assert batches([37], 8, 30) == [(0, batch_indices(37, 8, seed=0, step=step)) for step in range(30)]
    first, second = ([places for bucket, places in batches([16, 16], 16, 8) if bucket == which] for which in (0, 1))
    assert all(one != two for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize(("counts", "batch_size", "step"), [([], 1, 0), ([3, 0], 1, 0), ([3], 0, 0), ([3], 1, -1)])
def test_impossible_steps_are_refused(counts, batch_size, step):
    with pytest.raises(SettingsError, match="allowed"):
        bucket_batch(counts, batch_size, seed=0, step=step)


def test_a_sets_steps_are_of_one_bucket_each(bucketed):
    seen = [bucketed.step_indices(3, seed=2, step=step) for step in range(5)]
    for indices in seen:
        bucketed.batch(indices)
    assert sorted(index for indices in seen for index in indices) == list(range(15))


# threads and ahead


def test_threads_keep_the_order_and_raise_the_first_error(bucketed, monkeypatch):
    alone = bucketed.squares(range(15))
    names = set()

    def seen(number: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.01)
        if number in (5, 3):
            raise DataError(f"number {number}")
        return -number

    monkeypatch.setattr(loading, "WORKERS", 4)
    bucketed._memory.clear()
    assert torch.equal(bucketed.squares(range(15)), alone)
    before = threading.active_count()
    assert loading.in_threads(seen, [8, 7, 0, 6]) == [-8, -7, 0, -6]
    assert threading.main_thread().name not in names
    assert len(names) > 1
    with pytest.raises(DataError, match="number 3"):
        loading.in_threads(seen, range(6))
    assert threading.active_count() == before
    names.clear()
    assert loading.in_threads(seen, [8, 7], alone=True) == [-8, -7]
    assert names == {threading.main_thread().name}


def test_batches_ahead_are_those_of_the_function():
    calls = []

    def make(number: int) -> int:
        calls.append((number, threading.current_thread().name))
        return number * number

    with Ahead(make) as load:
        assert [load(number) for number in (0, 1, 2, 7, 8, 3, 3)] == [0, 1, 4, 49, 64, 9, 9]
    assert all("ahead" in name for _, name in calls)


def test_the_next_batches_are_made_meanwhile():
    made = threading.Semaphore(0)

    def make(number: int) -> int:
        made.release()
        return number

    with Ahead(make) as load:
        load(0)
        for _ in range(3):  # its own and two more, without being asked
            assert made.acquire(timeout=20)
        time.sleep(0.02)
        assert not made.acquire(blocking=False)


def test_an_error_is_raised_at_its_own_number_and_the_thread_ends():
    def make(number: int) -> int:
        if number == 2:
            raise DataError("the third one")
        return number

    before = threading.active_count()
    with Ahead(make) as load:
        assert (load(0), load(1)) == (0, 1)
        with pytest.raises(DataError, match="the third one"):
            load(2)
        assert load(3) == 3
    assert threading.active_count() == before
