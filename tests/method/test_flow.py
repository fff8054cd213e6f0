import math

import numpy as np
import pytest
import torch

from davae.errors import SettingsError
from davae.method.flow import (
    cosine_loss,
    detail_weight,
    flow_loss,
    flow_matching_losses,
    interpolate,
    latents_prediction,
    min_snr_weight,
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
    total, logs = flow_matching_losses(velocity, target, base_channels=3, detail_weight=weight)
    assert torch.allclose(total, reference, rtol=1e-12, atol=0)
    assert torch.allclose(logs["base_loss"], (velocity - target)[:, :3].square().mean(), rtol=1e-12, atol=0)
    assert torch.allclose(logs["detail_loss"], (velocity - target)[:, 3:].square().mean(), rtol=1e-12, atol=0)


def test_the_loss_of_bfloat16_is_a_float32():
    velocity, target = pair(torch.bfloat16)
    total, _ = flow_matching_losses(velocity, target, base_channels=3, detail_weight=0.5)
    exact = flow_matching_losses(velocity.double(), target.double(), base_channels=3, detail_weight=0.5)[0]
    assert total.dtype == torch.float32
    assert torch.allclose(total.double(), exact, rtol=1e-5, atol=0)


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


# -------------------------------------------------------------------- against numpy in float64, from the formulas alone


def numpy_pair():
    """Latents z, noise e, a predicted velocity, each [4, 9, 5, 7] of which 3 channels are base, and four sigmas."""
    random = np.random.default_rng(7)
    return *random.standard_normal((3, 4, 9, 5, 7)), np.array([0.05, 0.3, 0.6, 0.95])


def scheduled(errors, weight):
    """Eq. 13: (sum_base + w sum_detail) / (|B| + w |R|), |B| and |R| the numbers of base and detail elements."""
    base, detail = errors[:, :3], errors[:, 3:]
    return (base.sum() + weight * detail.sum()) / (base.size + weight * detail.size)


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("step", [0, 1, 37, 99, 100, 1000])
def test_eq_12_in_numpy(step):
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.arange(100, dtype=np.float64) / 100)
    assert detail_weight(step, 100) == pytest.approx(ramp[step] if step < 100 else 1.0, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_eq_13_of_the_velocity_in_numpy(weight):
    clean, noise, velocity, sigma = numpy_pair()
    z, e, v, s = tensors(clean, noise, velocity, sigma)
    wide = sigma[:, None, None, None]
    assert np.allclose(interpolate(z, e, s), (1 - wide) * clean + wide * noise, rtol=1e-14, atol=0)
    errors = (velocity - (noise - clean)) ** 2
    total, logs = flow_matching_losses(v, velocity_target(z, e), base_channels=3, detail_weight=weight)
    assert total.item() == pytest.approx(scheduled(errors, weight), rel=1e-12)
    assert logs["base_loss"].item() == pytest.approx(errors[:, :3].mean(), rel=1e-12)
    assert logs["detail_loss"].item() == pytest.approx(errors[:, 3:].mean(), rel=1e-12)


@pytest.mark.parametrize("gamma", [None, 0.5, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_latents_objective_in_numpy(weight, gamma):
    """docs/method.md 2.6: x0^ = x_sigma - sigma v^, target z, errors times min((1 - sigma) / sigma, gamma)."""
    clean, noise, velocity, sigma = numpy_pair()
    z, e, v, s = tensors(clean, noise, velocity, sigma)
    wide = sigma[:, None, None, None]
    predicted = (1 - wide) * clean + wide * noise - wide * velocity
    ours = latents_prediction(interpolate(z, e, s), v, s)
    assert np.allclose(ours, predicted, rtol=1e-12, atol=1e-14)
    factor = np.ones(4) if gamma is None else np.minimum((1 - sigma) / sigma, gamma)
    errors = factor[:, None, None, None] * (predicted - clean) ** 2
    given = None if gamma is None else min_snr_weight(s, gamma)
    total, logs = flow_matching_losses(ours, z, base_channels=3, detail_weight=weight, sample_weight=given)
    assert total.item() == pytest.approx(scheduled(errors, weight), rel=1e-12)
    assert logs["base_loss"].item() == pytest.approx(errors[:, :3].mean(), rel=1e-12)
    assert logs["detail_loss"].item() == pytest.approx(errors[:, 3:].mean(), rel=1e-12)
    # The same as a weight of the velocity's error: sigma^2 min((1 - sigma) / sigma, gamma).
    of_velocity = (sigma**2 * factor)[:, None, None, None] * (velocity - (noise - clean)) ** 2
    assert total.item() == pytest.approx(scheduled(of_velocity, weight), rel=1e-12)


def test_min_snr_is_capped_where_there_is_little_noise():
    weights = min_snr_weight(torch.tensor([0.01, 1 / 6, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64), 5.0)
    assert np.allclose(weights, [5, 5, 3, 1, 1 / 9, 0], rtol=1e-12, atol=0)


def test_the_true_velocity_gives_the_latents_back():
    clean, noise, _, sigma = tensors(*numpy_pair())
    noisy = interpolate(clean, noise, sigma)
    assert torch.allclose(latents_prediction(noisy, velocity_target(clean, noise), sigma), clean, rtol=0, atol=1e-14)


def test_the_cosine_term_in_numpy():
    """docs/method.md 2.7: the mean over positions of 1 - cos over the channel axis, all channels."""
    clean, noise, velocity, _ = numpy_pair()
    target = noise - clean
    lengths = np.sqrt((velocity**2).sum(1)) * np.sqrt((target**2).sum(1))
    expected = (1 - (velocity * target).sum(1) / lengths).mean()
    v, t = tensors(velocity, target)
    assert cosine_loss(v, t).item() == pytest.approx(expected, rel=1e-12)
    assert cosine_loss(3 * t, t).item() == pytest.approx(0, abs=1e-12)  # lengths do not count
    assert cosine_loss(-t, t).item() == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cosine_weight", [0.0, 0.7])
@pytest.mark.parametrize(("data_objective", "min_snr"), [(False, None), (True, None), (True, 2.0)])
def test_the_loss_of_a_batch_in_numpy(data_objective, min_snr, cosine_weight, weight):
    """Eq. 13 of the objective, plus cosine_weight times the cosine term."""
    random = np.random.default_rng(3)
    latents, noise, velocity = random.standard_normal((3, 3, 12, 4, 4))
    sigma = np.array([0.1, 0.5, 0.9])
    settings = {"data_objective": data_objective, "min_snr": min_snr, "cosine_weight": cosine_weight}
    tensors = [torch.from_numpy(array) for array in (velocity, latents, noise, sigma)]
    loss, logs = flow_loss(*tensors, base_channels=4, detail_weight=weight, **settings)

    errors = (velocity - (noise - latents)) ** 2
    if data_objective:
        factor = sigma**2 * (1 if min_snr is None else np.minimum((1 - sigma) / sigma, min_snr))
        errors *= factor[:, None, None, None]
    base, detail = errors[:, :4], errors[:, 4:]
    expected = (base.sum() + weight * detail.sum()) / (base.size + weight * detail.size)

    if cosine_weight:
        target = noise - latents
        cosines = (velocity * target).sum(1) / np.linalg.norm(velocity, axis=1) / np.linalg.norm(target, axis=1)
        expected += cosine_weight * (1 - cosines).mean()
        assert logs["cosine_loss"].item() == pytest.approx((1 - cosines).mean(), rel=1e-10)

    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert logs["base_loss"].item() == pytest.approx(base.mean(), rel=1e-10)
    assert logs["detail_loss"].item() == pytest.approx(detail.mean(), rel=1e-10)
    assert ("cosine_loss" in logs) == (cosine_weight > 0)


def test_new_losses_of_bfloat16_are_float32():
    velocity, target = pair(torch.bfloat16)
    assert cosine_loss(velocity, target).dtype == torch.float32
    assert cosine_loss(velocity, target).item() == pytest.approx(
        cosine_loss(velocity.double(), target.double()).item(), rel=1e-5
    )
    sigma = torch.full((4,), 0.5)
    assert latents_prediction(target, velocity, sigma).dtype == torch.float32
    assert torch.equal(latents_prediction(target, velocity, sigma), target.float() - 0.5 * velocity.float())


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
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(SettingsError, match=f"gamma={gamma}"):
            min_snr_weight(torch.ones(1), gamma)
