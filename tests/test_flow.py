import math

import pytest
import torch

from davae.errors import SettingsError
from davae.flow import (
    detail_weight,
    flow_matching_losses,
    interpolate,
    sample_timesteps,
    scheduled_flow_matching_loss,
    velocity_target,
)


def pair(dtype=torch.float64, base=3, detail=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, base + detail, 5, 7, generator=generator, dtype=dtype).unbind()


def test_the_path_ends_in_latents_and_noise_and_moves_by_the_target():
    latents, noise = pair()
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    path = interpolate(latents, noise, sigma)
    assert torch.equal(path[0], latents[0])
    assert torch.equal(path[3], noise[3])
    back = path - sigma[:, None, None, None] * velocity_target(latents, noise)
    assert torch.allclose(back, latents, rtol=0, atol=1e-12)


def test_weight_one_is_the_plain_mean():
    velocity, target = pair()
    loss = scheduled_flow_matching_loss(velocity, target, base_channels=3, detail_weight=1.0)
    assert torch.allclose(loss, (velocity - target).square().mean(), rtol=1e-12, atol=0)


def test_weight_zero_is_the_base_alone():
    velocity, target = pair()
    velocity.requires_grad_()
    loss = scheduled_flow_matching_loss(velocity, target, base_channels=3, detail_weight=0.0)
    assert torch.allclose(loss, (velocity - target)[:, :3].square().mean(), rtol=1e-12, atol=0)
    loss.backward()
    assert not velocity.grad[:, 3:].any()


@pytest.mark.parametrize("weight", [0.0, 0.1464466, 0.5, 1.0, 2.0])
def test_it_is_the_renormalised_mask_of_the_reference(weight):
    velocity, target = pair()
    mask = torch.ones(1, 9, 1, 1, dtype=torch.float64)
    mask[:, 3:] = weight
    reference = ((velocity - target).square() * mask * 9 / mask.sum()).mean()
    losses = flow_matching_losses(velocity, target, base_channels=3, detail_weight=weight)
    assert torch.allclose(losses.total, reference, rtol=1e-12, atol=0)
    assert torch.allclose(losses.base, (velocity - target)[:, :3].square().mean(), rtol=1e-12, atol=0)
    assert torch.allclose(losses.detail, (velocity - target)[:, 3:].square().mean(), rtol=1e-12, atol=0)


def test_the_loss_of_bfloat16_is_a_float32():
    velocity, target = pair(torch.bfloat16)
    losses = flow_matching_losses(velocity, target, base_channels=3, detail_weight=0.5)
    exact = flow_matching_losses(velocity.double(), target.double(), base_channels=3, detail_weight=0.5)
    assert losses.total.dtype == torch.float32
    assert torch.allclose(losses.total.double(), exact.total, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.0), (1000, 0.0061558), (5000, 0.1464466), (10000, 0.5), (15000, 0.8535534), (20000, 1.0)]
)
def test_the_ramp_has_the_values_of_the_paper(step, weight):
    assert math.isclose(detail_weight(step, 20000), weight, abs_tol=5e-8)


def test_no_ramp_is_weight_one():
    assert detail_weight(0, 0) == detail_weight(30000, 20000) == 1.0


def test_timesteps_are_logit_normal_and_shifted():
    generator = torch.Generator().manual_seed(0)
    sigma = sample_timesteps(20000, shift=3.0, generator=generator, mean=0.5, std=0.8)
    assert sigma.dtype == torch.float32
    t = (sigma / (3 - 2 * sigma)).double()  # the shift undone
    logit = torch.logit(t)
    assert abs(logit.mean() - 0.5) < 0.02
    assert abs(logit.std() - 0.8) < 0.02


def test_timesteps_are_reproducible_and_inside():
    one, two = (sample_timesteps(8, shift=4.0, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    extreme = sample_timesteps(1000, shift=1000.0, generator=torch.Generator().manual_seed(5), std=30.0)
    assert extreme.min() > 0
    assert extreme.max() < 1


def test_refusals_name_the_argument():
    velocity, target = pair()
    with pytest.raises(SettingsError, match="base_channels=9 must be between 1 and 8"):
        scheduled_flow_matching_loss(velocity, target, base_channels=9, detail_weight=1.0)
    with pytest.raises(SettingsError, match=r"detail_weight=-0\.1"):
        scheduled_flow_matching_loss(velocity, target, base_channels=3, detail_weight=-0.1)
    with pytest.raises(SettingsError, match="detail_weight=nan"):
        scheduled_flow_matching_loss(velocity, target, base_channels=3, detail_weight=math.nan)
    with pytest.raises(SettingsError, match="step=-1"):
        detail_weight(-1, 10)
    with pytest.raises(SettingsError, match=r"shift=0\.0"):
        sample_timesteps(1, shift=0.0, generator=torch.Generator())
