"""The settings that `davae init` chooses, and the words for numbers: pure functions."""

from pathlib import Path

import pytest

from davae.cost.budget import Memory
from davae.cost.geometry import read_geometry
from davae.errors import SettingsError
from davae.job.estimate import Estimate, in_words, size_in_words
from davae.job.plan import (
    Request,
    choose_batch,
    choose_crop,
    choose_size,
    fit_time,
    parse_memory,
    plan_job,
    wanted_steps,
)
from davae.job.recipe import JobRecipe
from davae.job.verdicts import judge_base, judge_distance, judge_reconstruction

GIB = 2**30


@pytest.fixture(scope="module")
def planned() -> JobRecipe:
    """For the shipped pair."""
    geometry = read_geometry("", Path("recipe.toml"))
    return plan_job(Request("", "pictures", 256, count=50, memory_bytes=24 * GIB), geometry)


@pytest.mark.parametrize("text", ["24GB", "24 GiB", "24", "24g"])
def test_memory_is_read_as_people_write_it(text: str) -> None:
    assert parse_memory(text) == 24 * GIB


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "24MB"])
def test_other_memory_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="such as 24GB"):
        parse_memory(text)


def test_the_size_is_the_largest_that_the_images_have() -> None:
    geometry = read_geometry("", Path("recipe.toml"))  # 128 px
    assert choose_size(geometry, [300] * 10, None) == 256
    assert choose_size(geometry, [300] * 8 + [200] * 2, None) == 256
    assert choose_size(geometry, [300] * 7 + [200] * 3, None) == 128
    assert choose_size(geometry, [20], 64) == 64
    with pytest.raises(SettingsError, match=r"1 of 3 images have 128 pixels"):
        choose_size(geometry, [100, 100, 200], None)


@pytest.mark.parametrize(("size", "factor", "crop"), [(256, 8, 128), (1024, 8, 256), (64, 4, 64), (2048, 16, 256)])
def test_crops_fit_the_latents(size: int, factor: int, crop: int) -> None:
    assert choose_crop(size, factor) == crop
    assert crop % (2 * factor) == 0


def test_batches_fill_the_memory_and_no_more() -> None:
    assert choose_batch(Memory(4 * GIB, GIB), 24 * GIB, 16, "stage 2") == (16, False)
    assert choose_batch(Memory(10 * GIB, 2 * GIB), 24 * GIB, 16, "stage 2") == (4, False)
    assert choose_batch(Memory(18 * GIB, 6 * GIB), 24 * GIB, 16, "stage 2") == (1, True)
    with pytest.raises(SettingsError, match=r"stage 2 needs 48.0 GiB for weights and optimiser alone"):
        choose_batch(Memory(48 * GIB, GIB), 24 * GIB, 16, "stage 2")


def test_small_sets_are_seen_less_often_and_large_ones_as_in_the_paper() -> None:
    assert wanted_steps(1_000_000) == (10_000, 20_000)
    assert wanted_steps(50) == (2500, 1250)
    assert wanted_steps(4) == (300, 300)


def test_a_plan_has_both_stages_with_validation(planned: JobRecipe) -> None:
    one, two = planned.stage_one, planned.stage_two
    assert (one.steps, two.steps) == (2500, 1250)
    assert one.batch_size * one.gradient_accumulation == 8
    assert two.batch_size * two.gradient_accumulation == 16
    assert one.evaluate_every == 250
    assert two.validation_every == 125
    assert two.trained == "layers"
    assert not one.late_settings() + two.late_settings()


def test_less_time_means_fewer_steps_and_the_whole_fits(planned: JobRecipe) -> None:
    def estimate(recipe: JobRecipe) -> Estimate:
        drawing = 100 * recipe.stage_two.steps / recipe.stage_two.validation_every
        seconds = {"stage 1": 2.0 * recipe.stage_one.steps, "stage 2": 4.0 * recipe.stage_two.steps + drawing}
        return Estimate(seconds, 0.0, 0.0, None)

    assert estimate(planned).total == 11_000
    assert fit_time(planned, None, estimate) == planned
    assert fit_time(planned, 4.0, estimate) == planned
    hour = fit_time(planned, 1.0, estimate)
    assert 3000 < estimate(hour).total <= 3600
    assert hour.stage_one.steps == pytest.approx(2 * hour.stage_two.steps, rel=0.02)
    assert fit_time(planned, 1e-6, estimate).stage_two.steps == 1


def test_a_base_is_judged_by_its_renderings() -> None:
    assert judge_base(31.0, 0.03) == ("renders these images well", True)
    assert judge_base(24.0, 0.05)[1]
    assert "losses" in judge_base(30.0, 0.15)[0]
    assert not judge_base(18.0, 0.05)[1]
    assert not judge_base(30.0, 0.3)[1]


@pytest.mark.parametrize(
    ("upgrade", "full", "words"),
    [
        (33.0, 34.0, "most of the detail"),
        (32.0, 34.0, "part of the detail"),
        (30.5, 34.0, "little of the detail"),
        (29.0, 34.0, "no detail yet"),
        (35.0, 34.0, "1.00 dB above the base at full size"),
        (12.0, 12.0, "cannot render these images, at full size either"),
    ],
)
def test_a_reconstruction_is_judged_by_its_place_between_the_bounds(upgrade: float, full: float, words: str) -> None:
    rows = {"enlarged": 30.0, "upgrade": upgrade, "full size": full}
    values = {name: {"psnr": psnr, "lpips": 0.05} for name, psnr in rows.items()}
    assert words in judge_reconstruction(values, 5)


@pytest.mark.parametrize(("base", "words"), [(0.09, "are closer"), (0.05, "cannot tell"), (0.01, "are farther")])
def test_a_distance_is_judged_by_its_error(base: float, words: str) -> None:
    assert words in judge_distance({"base": [base, 0.005], "upgrade": [0.05, 0.005]}, 16)


def test_times_and_sizes_are_said_as_people_say_them() -> None:
    assert [in_words(seconds) for seconds in (4, 89, 600, 7300)] == ["4 s", "89 s", "10 min", "2 h 02 min"]
    assert [size_in_words(count) for count in (2048, 3 << 20, 5 << 30)] == ["2.0 KiB", "3.0 MiB", "5.0 GiB"]
