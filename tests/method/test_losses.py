import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from davae.errors import SettingsError
from davae.method.losses import (
    adaptive_weight,
    channel_group_mean,
    detail_alignment_loss,
    gradient_l1,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss_mean,
    kl_loss_sum,
    reconstruction_l1,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_group_mean_averages_consecutive_channels(ratio):
    detail = normal(2, 4 * ratio, 3, 5)
    mean = channel_group_mean(detail, 4)
    for channel in range(4):
        group = detail[:, channel * ratio : (channel + 1) * ratio]
        torch.testing.assert_close(mean[:, channel], group.mean(1), atol=1e-15, rtol=0)


def test_group_mean_of_a_repeated_base_is_the_base():
    base = normal(2, 4, 3, 5)
    torch.testing.assert_close(channel_group_mean(base.repeat_interleave(4, dim=1), 4), base, atol=0, rtol=0)


@pytest.mark.parametrize(("detail_channels", "base_channels"), [(6, 4), (2, 4), (4, 0)])
def test_detail_channels_must_be_a_multiple(detail_channels, base_channels):
    with pytest.raises(SettingsError, match=f"detail_channels={detail_channels} .*must be a multiple"):
        channel_group_mean(normal(1, detail_channels, 2, 2), base_channels)


def test_alignment_is_the_squared_error_of_the_group_mean():
    detail, base = normal(2, 8, 3, 5), normal(2, 4, 3, 5, seed=1)
    expected = sum((detail[:, 2 * c : 2 * c + 2].mean(1) - base[:, c]).square().sum() for c in range(4)) / base.numel()
    torch.testing.assert_close(detail_alignment_loss(detail, base), expected, atol=1e-14, rtol=0)
    assert detail_alignment_loss(base.repeat_interleave(2, dim=1), base) == 0


def test_alignment_moves_the_detail_latents_only():
    detail, base = normal(2, 8, 3, 5).requires_grad_(), normal(2, 4, 3, 5, seed=1).requires_grad_()
    detail_alignment_loss(detail, base).backward()
    assert base.grad is None
    expected = (channel_group_mean(detail, 4) - base).detach().repeat_interleave(2, dim=1) / base.numel()
    torch.testing.assert_close(detail.grad, expected, atol=1e-15, rtol=0)


def test_both_kl_reductions_are_the_closed_form_divergence():
    mean, logvar = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1)
    divergence = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss_sum(mean, logvar), divergence.sum((1, 2, 3)).mean(), atol=1e-12, rtol=0)
    torch.testing.assert_close(kl_loss_mean(mean, logvar), 2 * divergence.mean(), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kl_loss", [kl_loss_mean, kl_loss_sum])
def test_kl_of_the_standard_normal_is_zero_and_minimal(kl_loss):
    mean = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    logvar = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = kl_loss(mean, logvar)
    loss.backward()
    assert loss == 0
    assert mean.grad.eq(0).all()
    assert logvar.grad.eq(0).all()


def test_reconstruction_l1_is_the_mean_absolute_difference():
    image = normal(2, 3, 4, 6)
    assert reconstruction_l1(image, image) == 0
    offset = torch.tensor(-0.25, dtype=torch.float64)
    torch.testing.assert_close(reconstruction_l1(image + offset, image), -offset, atol=1e-15, rtol=0)


def test_gradient_l1_ignores_a_constant_and_measures_a_ramp():
    image = normal(2, 3, 4, 6)
    ramp = 0.5 * torch.arange(4, dtype=torch.float64).view(4, 1) - 0.125 * torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(gradient_l1(image + 3, image).item(), 0.0, atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient_l1(image + ramp, image).item(), 0.625, atol=1e-14, rtol=0)


@pytest.mark.parametrize("loss", [kl_loss_mean, kl_loss_sum, reconstruction_l1, gradient_l1, detail_alignment_loss])
def test_half_precision_is_summed_in_float32(loss):
    first, second = normal(2, 3, 8, 8).bfloat16(), normal(2, 3, 8, 8, seed=1).bfloat16()
    value = loss(first, second)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, loss(first.double(), second.double()).float())


def test_hinge_losses_are_the_published_ones():
    """Lim and Ye, arXiv 1705.02894: 1/2 (E max(0, 1 - D(x)) + E max(0, 1 + D(y))), and -E D(y)."""
    real, fake = 2 * normal(2, 1, 5, 7), 2 * normal(2, 1, 5, 7, seed=1)
    r, f = real.numpy(), fake.numpy()
    expected = 0.5 * (np.where(r < 1, 1 - r, 0).mean() + np.where(f > -1, 1 + f, 0).mean())
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected, rel=1e-14)
    assert hinge_generator_loss(fake).item() == pytest.approx(-f.mean(), rel=1e-14)


def test_hinge_discriminator_loss_stops_at_the_margins():
    real, fake = torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), -1.5)
    real[..., 0, 0], fake[..., 0, 0] = 0.5, -0.5
    real.requires_grad_(), fake.requires_grad_()
    loss = hinge_discriminator_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(0.125)
    assert real.grad.flatten().tolist() == [-0.125, 0, 0, 0]
    assert fake.grad.flatten().tolist() == [0.125, 0, 0, 0]


def test_hinge_losses_of_half_precision_are_summed_in_float32():
    real, fake = normal(2, 1, 9, 9).bfloat16(), normal(2, 1, 9, 9, seed=1).bfloat16()
    for value, expected in (
        (hinge_discriminator_loss(real, fake), hinge_discriminator_loss(real.double(), fake.double())),
        (hinge_generator_loss(fake), hinge_generator_loss(fake.double())),
    ):
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, expected.float())


def test_adaptive_weight_is_the_clamped_ratio_of_norms():
    """docs/method.md 2.3: clamp(|g_ref| / (|g| + 1e-4), 0, maximum), detached."""
    reference, own = normal(3, 4, 2, 2).requires_grad_(), 0.01 * normal(3, 4, 2, 2, seed=1)
    ratio = np.sqrt((reference.detach().numpy() ** 2).sum()) / (np.sqrt((own.numpy() ** 2).sum()) + 1e-4)
    found = adaptive_weight(reference, own, 1e4)
    assert found.item() == pytest.approx(ratio, rel=1e-14)
    assert not found.requires_grad
    assert adaptive_weight(reference, own, 2.0) == 2.0 < ratio
    assert adaptive_weight(0 * reference, own, 1e4) == 0
    assert adaptive_weight(torch.ones(4), torch.zeros(4), 1e8).item() == pytest.approx(2e4, rel=1e-6)
    assert adaptive_weight(torch.ones(4).bfloat16(), torch.ones(4).bfloat16(), 1e8).dtype is torch.float32
