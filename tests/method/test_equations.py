"""The formulas of docs/method.md, each against a calculation in numpy and float64 that is written out here.

Formulas with a file of tests to themselves are there: the discriminator's losses, the adaptive weights, min-SNR and the
cosine term, LightningDiT's layers, LPIPS, the imported layouts, latent structure.
"""

import math

import numpy as np
import pytest
import torch

import tiny
from davae.method.closed_form import decoder_metric, fit_closed_form
from davae.method.flow import detail_weight, flow_matching_losses, interpolate, sample_timesteps, velocity_target
from davae.method.losses import (
    channel_group_mean,
    detail_alignment_loss,
    gradient_l1,
    kl_loss_mean,
    kl_loss_sum,
    reconstruction_l1,
)
from davae.method.metrics import kid, psnr, ssim
from davae.method.stage_one_loss import add_latent_noise
from davae.method.widen import pad_channels
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.detail_blocks import DetailDownsample, DetailUpsample
from davae.seeds import randn, sample_generators

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


def close(found: torch.Tensor | float, expected: np.ndarray | float, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_equation_3_the_mean_over_groups_of_consecutive_channels(ratio: int) -> None:
    detail = normal(2, 4 * ratio, 3, 5)
    expected = np.zeros((2, 4, 3, 5))
    for channel in range(4):
        for member in range(ratio):
            expected[:, channel] += detail[:, channel * ratio + member] / ratio
    close(channel_group_mean(torch.from_numpy(detail), 4), expected)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_equation_4_the_squared_distance_to_the_base(ratio: int) -> None:
    detail, base = normal(2, 4 * ratio, 3, 5), normal(2, 4, 3, 5)
    expected = ((detail.reshape(2, 4, ratio, 3, 5).mean(axis=2) - base) ** 2).sum() / base.size
    close(detail_alignment_loss(torch.from_numpy(detail), torch.from_numpy(base)), expected)


def test_table_s1_l1_and_both_reductions_of_the_divergence() -> None:
    image, other = normal(2, 3, 6, 8), normal(2, 3, 6, 8)
    close(reconstruction_l1(torch.from_numpy(image), torch.from_numpy(other)), np.abs(image - other).sum() / image.size)
    mean, log_variance = normal(3, 4, 2, 5), normal(3, 4, 2, 5)
    summed = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    arguments = torch.from_numpy(mean), torch.from_numpy(log_variance)
    close(kl_loss_sum(*arguments), summed.sum() / 3)
    close(kl_loss_mean(*arguments), 2 * summed.sum() / mean.size)


def test_gradient_l1_is_that_of_finite_differences() -> None:
    image, other = normal(2, 3, 6, 8), normal(2, 3, 6, 8)
    down, right = (np.diff(image, axis=axis) - np.diff(other, axis=axis) for axis in (2, 3))
    expected = np.abs(down).sum() / down.size + np.abs(right).sum() / right.size
    close(gradient_l1(torch.from_numpy(image), torch.from_numpy(other)), expected)


@pytest.mark.parametrize("step", [0, 1, 7, 19, 20, 1000])
def test_equation_12_the_half_cosine(step: int) -> None:
    expected = (1 - np.cos(np.pi * step / 20)) / 2 if step < 20 else 1.0
    close(detail_weight(step, 20), expected)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_equation_13_the_weighted_mean_over_channels(weight: float) -> None:
    velocity, target = normal(4, 9, 5, 7), normal(4, 9, 5, 7)
    base, detail = ((velocity - target)[:, half] ** 2 for half in (slice(0, 3), slice(3, 9)))
    expected = (base.sum() + weight * detail.sum()) / ((3 + weight * 6) * 5 * 7) / 4
    total, logs = flow_matching_losses(
        torch.from_numpy(velocity), torch.from_numpy(target), base_channels=3, detail_weight=weight
    )
    close(total, expected)
    close(logs["base_loss"], base.mean())
    close(logs["detail_loss"], detail.mean())


def test_section_3_3_the_straight_path_and_its_derivative() -> None:
    latents, noise, sigma = normal(3, 4, 2, 2), normal(3, 4, 2, 2), np.array([0.1, 0.5, 0.9])
    arguments = torch.from_numpy(latents), torch.from_numpy(noise)
    path = np.stack([(1 - s) * x + s * e for s, x, e in zip(sigma, latents, noise, strict=True)])
    close(interpolate(*arguments, torch.from_numpy(sigma)), path)
    ahead = interpolate(*arguments, torch.from_numpy(sigma + 1e-6)).numpy()
    close(velocity_target(*arguments), (ahead - path) / 1e-6, tolerance=1e-8)


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
def test_timesteps_are_shifted_sigmoids_of_normals(shift: float) -> None:
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    t = 1 / (1 + np.exp(-(0.5 + 0.8 * drawn)))
    random = torch.Generator().manual_seed(3)
    found = sample_timesteps(64, shift=shift, generator=random, mean=0.5, std=0.8)
    close(found, shift * t / (1 + (shift - 1) * t), tolerance=1e-6)


@pytest.mark.parametrize("layout", ["d c p q", "(p q k c) d", "(c p q) d"])
def test_section_3_2_zeros_join_the_channel_axis(layout: str) -> None:
    sizes = {"d": 5, "c": 3, "p": 2, "q": 2, "k": 2 if "k" in layout else 1}
    axes = [axis for axis in layout if axis.isalpha()]
    full = normal(*(sizes[axis] for axis in axes))
    widened = np.concatenate([full, np.zeros_like(np.repeat(full, 2, axis=axes.index("c")))], axis=axes.index("c"))
    flat = layout.startswith("(")
    weight, expected = (array.reshape(-1, 5) if flat else array for array in (full, widened))
    close(pad_channels(torch.from_numpy(weight), layout, 6, patch=2, predictions=sizes["k"]), expected)


# ------------------------------------------------------------------------------------------------ the autoencoder


def convolved(picture: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, padded with zeros: [Ci, H, W] -> [Co, H, W]."""
    _, height, width = picture.shape
    padded = np.pad(picture, ((0, 0), (1, 1), (1, 1)))
    result = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for row in range(3):
        for column in range(3):
            result += np.einsum(
                "oi,ihw->ohw", weight[:, :, row, column], padded[:, row : row + height, column : column + width]
            )
    return result


def unshuffled(picture: np.ndarray) -> np.ndarray:
    """[C, H, W] -> [4 C, H/2, W/2]: channel 4 c + 2 i + j is channel c at the rows 2 y + i and the columns 2 x + j."""
    return np.stack([channel[i::2, j::2] for channel in picture for i in (0, 1) for j in (0, 1)])


def test_section_2_1_the_down_block() -> None:
    block = DetailDownsample(4, 8).double()
    picture = normal(4, 6, 4)
    main = unshuffled(convolved(picture, block.conv.weight.detach().numpy(), block.conv.bias.detach().numpy()))
    folded = unshuffled(picture)
    shortcut = np.stack([(folded[2 * channel] + folded[2 * channel + 1]) / 2 for channel in range(8)])
    close(block(torch.from_numpy(picture)[None])[0].detach(), main + shortcut)


def test_section_2_1_the_up_block() -> None:
    block = DetailUpsample(4, 8).double()
    picture = normal(4, 3, 2)
    main = convolved(picture, block.conv.weight.detach().numpy(), block.conv.bias.detach().numpy())
    found = unshuffled(block(torch.from_numpy(picture)[None])[0].detach().numpy())
    close(found, np.stack([main[channel] + picture[channel // 8] for channel in range(32)]))


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel."""
    x = np.abs(distance)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def halving(length: int, *, antialias: bool) -> np.ndarray:
    """[length / 2, length]: torch's bicubic filter, whose a is -0.75, and -0.5 with antialias."""
    matrix = np.zeros((length // 2, length))
    for row in range(length // 2):
        centre = 2 * row + 0.5
        if antialias:
            weights = cubic((np.arange(length) - centre) / 2, -0.5)
            matrix[row] = weights / weights.sum()
        else:
            for tap in range(2 * row - 1, 2 * row + 3):
                matrix[row, np.clip(tap, 0, length - 1)] += cubic(np.array(tap - centre), -0.75)
    return matrix


@pytest.mark.parametrize("downsample", ["bicubic", "bicubic-antialias"])
def test_section_3_1_the_base_picture(downsample: str) -> None:
    vae = tiny.tiny_sd3_pipeline().vae
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=4, base_downsample=downsample).double()
    picture = np.tanh(normal(3, 16, 24))
    rows, columns = (halving(length, antialias=downsample == "bicubic-antialias") for length in (16, 24))
    expected = np.clip(np.einsum("yh,xw,chw->cyx", rows, columns, picture), -1, 1)
    close(autoencoder.base_picture(torch.from_numpy(picture)[None])[0], expected)


@pytest.fixture
def fitted() -> tuple[AutoencoderDA, torch.Tensor]:
    autoencoder = AutoencoderDA.from_base(tiny.tiny_sd3_pipeline().vae, detail_channels=4).double().eval()
    pictures = torch.from_numpy(np.tanh(normal(6, 3, 32, 32)))
    fit_closed_form(autoencoder, pictures, seed=1)
    return autoencoder, pictures


@torch.no_grad()
def test_section_10_the_closed_form_start(fitted: tuple[AutoencoderDA, torch.Tensor]) -> None:
    autoencoder, pictures = fitted
    base = autoencoder.encode_base(pictures).numpy()
    latents = autoencoder.encode_pretrained(pictures).numpy()
    full = np.stack([unshuffled(picture) for picture in latents])
    zb, zf = (array.transpose(1, 0, 2, 3).reshape(array.shape[1], -1) for array in (base, full))
    ones = np.vstack([zb, np.ones(zb.shape[1])])
    solution = np.linalg.lstsq(ones.T, zf.T, rcond=None)[0].T  # 1. Zf ~ A Zb + a
    residual = zf - solution @ ones
    values, vectors = np.linalg.eigh(decoder_metric(autoencoder, pictures[:24], 1).numpy())  # 2. M
    root = vectors * np.sqrt(values) @ vectors.T
    inverse = vectors / np.sqrt(values) @ vectors.T
    spectrum = np.linalg.eigh(root @ residual @ residual.T @ root)  # 3. U: the first D eigenvectors
    directions = spectrum.eigenvectors[:, ::-1][:, :4]
    code = directions.T @ root @ zf  # 4.
    centred = code - code.mean(axis=1, keepdims=True)
    left, _, right = np.linalg.svd((zb - zb.mean(axis=1, keepdims=True)) @ centred.T)  # the turn to the base
    turn = left @ right / np.sqrt((centred**2).mean())
    mean, _ = autoencoder.encode_detail(pictures)
    found = mean.numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    close(found, turn @ centred, tolerance=1e-6)
    kept = np.eye(len(zf)) - inverse @ directions @ directions.T @ root
    read = kept @ (solution @ ones) + inverse @ directions @ (np.linalg.inv(turn) @ found + code.mean(axis=1)[:, None])
    decoded = autoencoder.detail_upsample(torch.cat([torch.from_numpy(base), mean], dim=1)).numpy()
    decoded = np.stack([unshuffled(picture) for picture in decoded])
    close(decoded.transpose(1, 0, 2, 3).reshape(len(zf), -1), read, tolerance=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("code", ["unit variance", "residual", "base added", "zero sum"])
def test_section_10_the_other_codes(code: str) -> None:
    vae, held = tiny.tiny_sd3_pipeline().vae, code != "unit variance"
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=8, linear_blocks=True, base_in_detail=held)
    autoencoder = autoencoder.double().eval()
    pictures = torch.from_numpy(np.tanh(normal(6, 3, 32, 32)))
    fit_closed_form(autoencoder, pictures, seed=1, code=code)
    base = autoencoder.encode_base(pictures).numpy()
    full = np.stack([unshuffled(picture) for picture in autoencoder.encode_pretrained(pictures).numpy()])
    zb, zf = (array.transpose(1, 0, 2, 3).reshape(array.shape[1], -1) for array in (base, full))
    ones = np.vstack([zb, np.ones(zb.shape[1])])
    residual = zf - np.linalg.lstsq(ones.T, zf.T, rcond=None)[0].T @ ones
    values, vectors = np.linalg.eigh(decoder_metric(autoencoder, pictures[:24], 1).numpy())
    root = vectors * np.sqrt(values) @ vectors.T
    components = np.linalg.eigh(root @ residual @ residual.T @ root).eigenvectors[:, ::-1].T @ root
    found = autoencoder.encode_detail(pictures)[0].numpy().transpose(1, 0, 2, 3).reshape(8, -1)
    shared = np.repeat(zb, 2, axis=0)
    if code == "zero sum":  # D - C = 4 components; what is added to the base sums to zero in each group of two
        added, expected = found - shared, components[:4] @ residual
        close(added[0::2] + added[1::2], np.zeros((4, zb.shape[1])), tolerance=1e-6)
        kept = np.sqrt(2) * added[0::2]
    else:
        kept = found - shared if code == "base added" else found
        expected = components[:8] @ (residual if held else zf)
    expected = expected - expected.mean(axis=1, keepdims=True)
    expected = expected / expected.std(axis=1, keepdims=True)
    signs = np.sign((kept * expected).sum(axis=1, keepdims=True))  # of an eigenvector, free
    scale = np.sqrt(2) if code == "zero sum" else 1.0  # mean variance 1 over the D channels
    close(kept, scale * signs * expected, tolerance=1e-5)


@torch.no_grad()
def test_section_1_4_latent_statistics_and_units(fitted: tuple[AutoencoderDA, torch.Tensor]) -> None:
    autoencoder, pictures = fitted
    raw = autoencoder.encode_detail(pictures)[0].numpy()
    autoencoder.calibrate(pictures.split(2))
    mean, deviation = raw.mean(axis=(0, 2, 3)), raw.std(axis=(0, 2, 3))
    close(autoencoder.detail_mean, mean, tolerance=1e-6)
    close(autoencoder.detail_std, deviation, tolerance=1e-6)
    config = autoencoder.config
    stored = autoencoder.encode(pictures).latent_dist.mode().numpy()
    units = (stored - config.shift_factor) * config.scaling_factor  # what a stock pipeline does
    expected = (raw - mean[:, None, None]) / deviation[:, None, None]
    close(units[:, config.base_channels :], expected, tolerance=1e-5)


def test_noise_on_latents_has_the_stated_deviation() -> None:
    base, detail = normal(2, 3, 4, 4), 5 * normal(2, 6, 4, 4)
    random = sample_generators(0, "latent noise", range(2))
    found = add_latent_noise(torch.from_numpy(base), torch.from_numpy(detail), 0.3, random)
    random = sample_generators(0, "latent noise", range(2))
    level = 0.3 * np.abs(randn((2, 1, 1, 1), random).numpy())
    for half, noisy in zip((base, detail), found, strict=True):
        noise = randn(half.shape, random).numpy()
        deviation = half.std(axis=(0, 2, 3), ddof=1, keepdims=True)
        close(noisy, half + level * noise * deviation, tolerance=1e-5)


# ---------------------------------------------------------------------------------------------------- the metrics


def test_psnr_is_ten_logarithms_of_the_squared_peak() -> None:
    image, other = np.tanh(normal(2, 3, 12, 12)), np.tanh(normal(2, 3, 12, 12))
    expected = [10 * math.log10(2**2 / ((a - b) ** 2).mean()) for a, b in zip(image, other, strict=True)]
    close(psnr(torch.from_numpy(image), torch.from_numpy(other)), np.array(expected), tolerance=1e-5)


def test_ssim_is_that_of_wang_et_al() -> None:
    image, other = np.tanh(normal(3, 24, 24)), np.tanh(normal(3, 24, 24))
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2

    def smooth(channel: np.ndarray) -> np.ndarray:
        padded = np.pad(channel, 5, mode="reflect")
        return np.array([[(window * padded[y : y + 11, x : x + 11]).sum() for x in range(24)] for y in range(24)])

    maps = []
    for a, b in zip(image + 1, other + 1, strict=True):  # intensities in [0, 2]
        mean_a, mean_b = smooth(a), smooth(b)
        var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        maps.append(luminance * (2 * (smooth(a * b) - mean_a * mean_b) + c2) / (var_a + var_b + c2))
    close(ssim(torch.from_numpy(image)[None], torch.from_numpy(other)[None])[0], np.mean(maps), tolerance=1e-4)


def test_kid_is_the_unbiased_squared_distance_of_a_cubic_kernel() -> None:
    a, b = normal(5, 6), normal(7, 6) + 0.3
    within_a, within_b, across = ((x @ y.T / 6 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    expected = (within_a.sum() - np.trace(within_a)) / 20 + (within_b.sum() - np.trace(within_b)) / 42
    close(kid(torch.from_numpy(a), torch.from_numpy(b)), expected - 2 * across.mean())
