import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from davae.method.noise_prediction import add_noise, noise_loss, variance_loss

SCHEDULER = DDPMScheduler(num_train_timesteps=20, beta_start=1e-3, beta_end=0.2, variance_type="fixed_small")
ALPHAS = SCHEDULER.alphas_cumprod
CHANNELS = {"base_channels": 2, "detail_weight": 0.25}


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_noise_is_added_as_the_scheduler_adds_it():
    clean, noise, time = numbers(0), numbers(1), torch.tensor([0, 7, 19])
    torch.testing.assert_close(add_noise(clean, noise, ALPHAS, time), SCHEDULER.add_noise(clean, noise, time))


def test_the_noises_loss_is_the_weighted_mean_over_channels():
    predicted, noise = numbers(0), numbers(1)
    errors = (predicted - noise).square()
    expected = (errors[:, :2].sum() + 0.25 * errors[:, 2:].sum()) / (3 * 16 * (2 + 0.25 * 4))
    loss, logs = noise_loss(predicted, None, noise, ALPHAS, torch.tensor([0, 7, 19]), **CHANNELS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["base_loss"], errors[:, :2].mean())
    torch.testing.assert_close(logs["detail_loss"], errors[:, 2:].mean())
    assert logs["detail_weight"] == 0.25
    assert "variance_loss" not in logs


def test_a_predicted_variance_adds_its_bound_to_the_loss():
    predicted, variance, noise, time = numbers(0), numbers(2).tanh(), numbers(1), torch.tensor([0, 7, 19])
    bound = variance_loss(variance, predicted, noise, ALPHAS, time, **CHANNELS)
    without, _ = noise_loss(predicted, None, noise, ALPHAS, time, **CHANNELS)
    loss, logs = noise_loss(predicted, variance, noise, ALPHAS, time, **CHANNELS)
    torch.testing.assert_close(loss, without + bound)
    torch.testing.assert_close(logs["variance_loss"], bound)


@pytest.mark.parametrize("step", [1, 6, 19])
def test_the_variances_loss_is_the_divergence_of_two_gaussians(step):
    """Against torch's own divergence, with the posterior's mean and variance out of the two formulas of DDPM."""
    clean, noise, predicted, variance = (numbers(seed) for seed in range(4))
    variance = variance.tanh()
    time = torch.full((3,), step)
    alphas = ALPHAS.double()
    now, before = alphas[step], alphas[step - 1]
    beta = 1 - now / before
    noisy = now.sqrt() * clean.double() + (1 - now).sqrt() * noise.double()

    def mean(error: torch.Tensor) -> torch.Tensor:
        picture = (noisy - (1 - now).sqrt() * error.double()) / now.sqrt()
        return (before.sqrt() * beta * picture + (now / before).sqrt() * (1 - before) * noisy) / (1 - now)

    posterior = beta * (1 - before) / (1 - now)
    part = (variance.double() + 1) / 2
    deviation = ((part * beta.log() + (1 - part) * posterior.log()) / 2).exp()
    bits = kl_divergence(Normal(mean(noise), posterior.sqrt()), Normal(mean(predicted), deviation)) / torch.log(
        torch.tensor(2.0)
    )
    expected = (bits[:, :2].sum() + 0.25 * bits[:, 2:].sum()) / (3 * 16 * (2 + 0.25 * 4))
    ours = variance_loss(variance, predicted, noise, ALPHAS, time, **CHANNELS)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_variances_loss_trains_the_variance_alone():
    noise, predicted, variance = (numbers(seed).requires_grad_() for seed in range(3))
    time = torch.tensor([0, 5, 19])
    variance_loss(variance, predicted, noise, ALPHAS, time, **CHANNELS).backward()
    assert predicted.grad is None
    assert variance.grad.abs().max() > 0


def test_the_true_noise_and_the_posteriors_variance_have_no_divergence():
    """v = -1 is the posterior's variance; at the first step, too, where it would be zero."""
    noise = numbers(1)
    lowest = torch.full_like(noise, -1.0)
    for step in (0, 1, 19):
        time = torch.full((3,), step)
        assert variance_loss(lowest, noise, noise, ALPHAS, time, **CHANNELS).abs() < 1e-6
        assert variance_loss(-lowest, noise, noise, ALPHAS, time, **CHANNELS) > 1e-4
