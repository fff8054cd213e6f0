"""Rectified flow with a scheduled loss: sigma in [0, 1], 1 = noise; velocity = noise - latents (Sec. 3.3)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError
from davae.models.precision import at_least_float32

Latents = Float[Tensor, "b latent h w"]
"""Latents in the transformer's units, all C + D channels, the base's first."""
Sigma = Float[Tensor, " b"]
"""Share of noise in each sample, in [0, 1]."""
LossAndLogs = tuple[Float[Tensor, ""], dict[str, Tensor | float]]
"""The loss of one batch with its graph, and its parts for a log."""


def interpolate(latents: Latents, noise: Latents, sigma: Sigma) -> Latents:
    """The point (1 - sigma) latents + sigma noise of the straight path, one sigma per sample."""
    sigma = sigma.to(latents.device, latents.dtype)[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Latents, noise: Latents) -> Latents:
    """The derivative of `interpolate` by sigma, noise - latents: the transformer learns to predict it."""
    return noise - latents


def sample_timesteps(
    batch: int, *, shift: float, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Sigma:
    """Draw sigmas for training: logit-normal t, then the scheduler's shift s, sigma = s t / (1 + (s - 1) t).

    `mean` and `std` belong to the normal before the sigmoid. float32 [batch], strictly between 0 and 1, on the
    generator's device.
    """
    if shift <= 0 or std <= 0:
        raise SettingsError(f"shift={shift} and std={std} must both be positive")

    # The shift moves times towards noise, as the scheduler does in sampling.
    normal = torch.randn(batch, generator=generator, device=generator.device, dtype=torch.float64)
    t = torch.sigmoid(mean + std * normal)
    sigma = (shift * t / (1 + (shift - 1) * t)).float()

    # Rounding to float32 may reach the ends, where there is nothing to learn.
    smallest = torch.finfo(torch.float32).eps
    return sigma.clamp(smallest, 1 - smallest)


def detail_weight(step: int, warmup_steps: int) -> float:
    """Cosine ramp from 0 to 1 over `warmup_steps` optimizer steps: the weight of the detail channels (Eq. 12).

    Args:
        step: optimizer steps already done, so that the first one has weight 0.
        warmup_steps: length of the ramp; 0 means weight 1 from the start.

    Raises:
        SettingsError: if either is negative.
    """
    if step < 0 or warmup_steps < 0:
        raise SettingsError(f"step={step} and warmup_steps={warmup_steps} must not be negative")
    if step >= warmup_steps:  # also without a ramp
        return 1.0
    return (1 - math.cos(math.pi * step / warmup_steps)) / 2


def flow_matching_losses(
    prediction: Latents,
    target: Latents,
    *,
    base_channels: int,
    detail_weight: float,
    sample_weight: Sigma | None = None,
) -> LossAndLogs:
    """The weighted mean (sum_base + w sum_detail) / ((C + w D) B H W) of the squared errors (Eq. 13).

    The prediction is of the velocity, or of the latents (`latents_prediction`); base channels first. `sample_weight`
    (`min_snr_weight`) is a factor of each sample's errors, in the total and in both halves; the denominator stays.
    Scalars in float32 or float64, whatever autocast left. The logs are the means of both halves, `base_loss` and
    `detail_loss`, and `detail_weight`.
    """
    channels = prediction.shape[1]
    if prediction.shape != target.shape:
        raise SettingsError(f"velocity {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    if not 1 <= base_channels < channels:
        raise SettingsError(
            f"base_channels={base_channels} must be between 1 and {channels - 1}: there are {channels} channels"
        )
    if not (math.isfinite(detail_weight) and detail_weight >= 0):
        raise SettingsError(f"detail_weight={detail_weight} must be finite and not negative")

    errors = (at_least_float32(prediction) - at_least_float32(target)).square()
    if sample_weight is not None:
        errors = errors * sample_weight.to(errors.dtype)[:, None, None, None]
    base, detail = errors[:, :base_channels].mean(), errors[:, base_channels:].mean()

    # C + w D channels count, w of each detail channel.
    share = detail_weight * (channels - base_channels)
    total = (base_channels * base + share * detail) / (base_channels + share)
    return total, {"base_loss": base.detach(), "detail_loss": detail.detach(), "detail_weight": detail_weight}


def latents_prediction(noisy: Latents, velocity: Latents, sigma: Sigma) -> Latents:
    """The clean latents that a velocity at `interpolate(latents, noise, sigma)` amounts to: noisy - sigma velocity.

    Its squared error is sigma^2 times the velocity's. In float32 (float64 if an argument is).
    """
    noisy, velocity = at_least_float32(noisy), at_least_float32(velocity)
    return noisy - sigma.to(velocity)[:, None, None, None] * velocity


def min_snr_weight(sigma: Sigma, gamma: float) -> Sigma:
    """Weight of each sample's error in the latents, min((1 - sigma) / sigma, gamma), as in the reference's SD3 code.

    (1 - sigma) / sigma is the ratio of signal to noise in amplitude; min-SNR (arXiv 2303.09556) has its square. For the
    velocity's error it is sigma^2 min((1 - sigma) / sigma, gamma).
    """
    if not gamma > 0:
        raise SettingsError(f"gamma={gamma} must be positive")
    return ((1 - sigma) / sigma).clamp_max(gamma)


def cosine_loss(velocity: Latents, target: Latents) -> Float[Tensor, ""]:
    """LightningDiT's second term: the mean over positions of 1 - cos(velocity, target), all channels as one vector.

    In [0, 2], without the detail channels' weight. A scalar in float32 (float64 if an argument is).
    """
    return (1 - torch.cosine_similarity(at_least_float32(velocity), at_least_float32(target), dim=1)).mean()


def flow_loss(
    velocity: Latents,
    latents: Latents,
    noise: Latents,
    sigma: Sigma,
    *,
    base_channels: int,
    detail_weight: float,
    data_objective: bool = False,
    min_snr: float | None = None,
    cosine_weight: float = 0.0,
) -> LossAndLogs:
    """Stage 2's loss of one batch for a flow model: Eq. 13, plus the cosine term if it has a weight.

        weight = detail_weight(step, 200)
        loss, logs = flow_loss(velocity, latents, noise, sigma, base_channels=16, detail_weight=weight)

    Args:
        velocity: the transformer's prediction at `interpolate(latents, noise, sigma)`.
        latents: the clean latents.
        noise: what they were mixed with.
        sigma: the noise level of each sample, in (0, 1).
        base_channels: C.
        detail_weight: weight of the detail channels (Eq. 12); see the function of that name.
        data_objective: measure the error of the latents that the velocity implies, instead of the velocity's.
        min_snr: gamma of `min_snr_weight`, for the data objective; None weights all samples alike.
        cosine_weight: weight of `cosine_loss`.

    Returns:
        The loss with its graph, and the logs of `flow_matching_losses`, with `cosine_loss` if it has a weight.
    """
    target = velocity_target(latents, noise)

    # The squared error of the velocity or, with the data objective, of the clean latents.
    prediction, truth, sample_weight = velocity, target, None
    if data_objective:
        prediction, truth = latents_prediction(interpolate(latents, noise, sigma), velocity, sigma), latents
        sample_weight = None if min_snr is None else min_snr_weight(sigma, min_snr)

    # The base channels count fully, the detail channels with their scheduled weight (Eq. 13).
    loss, logs = flow_matching_losses(
        prediction, truth, base_channels=base_channels, detail_weight=detail_weight, sample_weight=sample_weight
    )
    if not cosine_weight:
        return loss, logs

    cosine = cosine_loss(velocity, target)
    return loss + cosine_weight * cosine, {**logs, "cosine_loss": cosine.detach()}


def scheduled_flow_matching_loss(
    velocity: Latents, target: Latents, *, base_channels: int, detail_weight: float
) -> Float[Tensor, ""]:
    """The total of `flow_matching_losses` alone."""
    return flow_matching_losses(velocity, target, base_channels=base_channels, detail_weight=detail_weight)[0]
