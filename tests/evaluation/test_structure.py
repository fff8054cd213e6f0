"""How like each other base and detail latents are: every number against an independent calculation in numpy."""

import math

import numpy as np
import pytest
import torch

from davae.errors import SettingsError
from davae.evaluation.structure import (
    at_positions,
    by_chance,
    channel_correlation,
    group_mean_correlation,
    neighbourhood_agreement,
    radial_spectrum,
)


def latents(channels: int, seed: int, *, count: int = 3, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, channels, height, width))


def test_positions_are_vectors_of_channels_row_by_row() -> None:
    halves = latents(5, 0)
    vectors = at_positions(torch.from_numpy(halves))
    assert vectors.shape == (3 * 4 * 6, 5)
    np.testing.assert_array_equal(vectors[1 * 24 + 2 * 6 + 5].numpy(), halves[1, :, 2, 5])


def test_agreement_counts_common_neighbours() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(40, 3))
    other = np.concatenate([one[:, :2], random.normal(size=(40, 4))], axis=1)

    # The definition, point by point.
    shares = []
    for i in range(40):
        sets = []
        for points in (one, other):
            others = sorted((j for j in range(40) if j != i), key=lambda j: math.dist(points[i], points[j]))
            sets.append(set(others[:7]))
        shares.append(len(sets[0] & sets[1]) / 7)
    expected = sum(shares) / 40
    assert 0.2 < expected < 0.9

    agreement = neighbourhood_agreement(torch.from_numpy(one), torch.from_numpy(other), 7)
    assert agreement.dtype == torch.float64
    assert agreement.item() == pytest.approx(expected, abs=1e-12)


def test_agreement_is_one_for_a_rotation_and_chance_for_a_stranger() -> None:
    random = np.random.default_rng(1)
    points = random.normal(size=(400, 6))
    rotation = np.linalg.qr(random.normal(size=(6, 6)))[0]
    turned = torch.from_numpy(3 * points @ rotation + 5)
    assert neighbourhood_agreement(torch.from_numpy(points), turned).item() == 1
    stranger = torch.from_numpy(random.normal(size=(400, 6)))
    agreement = neighbourhood_agreement(torch.from_numpy(points), stranger).item()
    # 4,000 places with a chance of 10 in 399 each: hypergeometric rows, three standard errors are 0.0074.
    assert by_chance(400, 10) == 10 / 399
    assert agreement == pytest.approx(10 / 399, abs=0.0074)


@pytest.mark.parametrize("neighbours", [0, 11, 12])
def test_too_many_neighbours_are_refused(neighbours: int) -> None:
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 2)))
    with pytest.raises(SettingsError, match=f"neighbours={neighbours}: of 12 points allowed are 1 to 10"):
        neighbourhood_agreement(points, points, neighbours)


def test_channel_correlation_is_pearsons() -> None:
    base, detail = latents(3, 0) * 4 + 7, latents(5, 1)
    detail[:, 2] += 0.5 * base[:, 1]
    correlation = channel_correlation(torch.from_numpy(base), torch.from_numpy(detail)).numpy()
    assert correlation.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = np.corrcoef(base[:, i].ravel(), detail[:, j].ravel())[0, 1]
            assert correlation[i, j] == pytest.approx(expected, abs=1e-12)
    assert abs(correlation[1, 2]) > 0.8


def test_group_means_are_of_consecutive_channels() -> None:
    base, detail = latents(2, 0), latents(6, 1)
    detail[:, 3:] += 2 * base[:, 1:]
    rows = []
    for channel in range(2):
        mean = detail[:, 3 * channel : 3 * channel + 3].mean(axis=1)  # Eq. 3, r = 3, 0-based
        rows.append(np.corrcoef(base[:, channel].ravel(), mean.ravel())[0, 1])
    correlation = group_mean_correlation(torch.from_numpy(base), torch.from_numpy(detail))
    assert correlation == pytest.approx(np.mean(rows), abs=1e-12)
    with pytest.raises(SettingsError, match="multiple"):
        group_mean_correlation(torch.from_numpy(base), torch.from_numpy(detail[:, :5]))


def test_the_spectrum_is_that_of_a_discrete_fourier_transform() -> None:
    halves = latents(2, 0, count=2, height=6, width=8)
    spectrum = radial_spectrum(torch.from_numpy(halves)).numpy()
    assert len(spectrum) == 3

    # Each frequency by its definition, in the ring that its length rounds to.
    rings: dict[int, list[float]] = {1: [], 2: [], 3: []}
    y, x = np.mgrid[0:6, 0:8]
    for vertical in range(-3, 3):
        for horizontal in range(-4, 4):
            ring = round(math.hypot(vertical, horizontal))
            if ring in rings:
                wave = np.exp(-2j * np.pi * (vertical * y / 6 + horizontal * x / 8))
                for image in halves:
                    for channel in image:
                        rings[ring].append(abs((channel * wave).sum()) ** 2 / (6 * 8))
    np.testing.assert_allclose(spectrum, [np.mean(rings[k]) for k in (1, 2, 3)], rtol=1e-12)


def test_white_noise_has_a_level_spectrum_and_a_wave_its_own_frequency() -> None:
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=(40, 4, 16, 16)))
    torch.testing.assert_close(radial_spectrum(noise + 9), torch.ones(8).double(), atol=0.12, rtol=0)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(16).double() / 16).expand(1, 1, 16, 16)
    spectrum = radial_spectrum(wave)
    assert spectrum.argmax().item() + 1 == 3
    assert spectrum[2] > 1e9 * spectrum[[0, 1, 3, 4, 5, 6, 7]].max()
