"""Rectified flow with a scheduled loss: sigma in [0, 1], 1 = noise; velocity = noise - latents (Sec. 3.3)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError


def interpolate(
    latents: Float[Tensor, "b latent h w"], noise: Float[Tensor, "b latent h w"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b latent h w"]:
    """The point (1 - sigma) latents + sigma noise of the straight path, one sigma in [0, 1] per sample."""
    sigma = sigma.to(latents.device, latents.dtype)[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity_target(
    latents: Float[Tensor, "b latent h w"], noise: Float[Tensor, "b latent h w"]
) -> Float[Tensor, "b latent h w"]:
    """The derivative of `interpolate` by sigma, noise - latents: what the transformer learns to predict."""
    return noise - latents


def sample_timesteps(
    batch: int, *, shift: float, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Float[Tensor, " b"]:
    """Draw sigmas for training: logit-normal t, then the scheduler's shift s, sigma = s t / (1 + (s - 1) t).

    Args:
        batch: how many.
        shift: the scheduler's static shift; 1 leaves t as it is.
        generator: where the numbers come from; its device is the result's.
        mean: of the normal before the sigmoid.
        std: of the normal before the sigmoid.

    Returns:
        float32 [batch], strictly between 0 and 1.

    Raises:
        SettingsError: if `shift` or `std` is not positive.
    """
    if shift <= 0 or std <= 0:
        raise SettingsError(f"shift={shift} and std={std} must both be positive")
    normal = torch.randn(batch, generator=generator, device=generator.device, dtype=torch.float64)
    t = torch.sigmoid(mean + std * normal)
    sigma = (shift * t / (1 + (shift - 1) * t)).float()
    smallest = torch.finfo(torch.float32).eps  # rounding to float32 may reach the ends; they carry no signal
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
    if step >= warmup_steps:
        return 1.0
    return (1 - math.cos(math.pi * step / warmup_steps)) / 2


class FlowMatchingLosses(NamedTuple):
    """The scheduled loss, and the plain mean squared errors of its two halves for the log."""

    total: Float[Tensor, ""]
    base: Float[Tensor, ""]
    detail: Float[Tensor, ""]


def flow_matching_losses(
    velocity: Float[Tensor, "b latent h w"],
    target: Float[Tensor, "b latent h w"],
    *,
    base_channels: int,
    detail_weight: float,
) -> FlowMatchingLosses:
    """The weighted mean (sum_base + w sum_detail) / ((C + w D) B H W) of the squared errors (Eq. 13), and its halves.

    Args:
        velocity: predicted, base channels first.
        target: `velocity_target`.
        base_channels: C, at least 1 and less than the number of channels.
        detail_weight: w, not negative; see the function of that name.

    Returns:
        Three scalars in float32 (float64 if an argument is), whatever autocast left; `base` and `detail` are detached.

    Raises:
        SettingsError: if the shapes differ or an argument is out of range.
    """
    channels = velocity.shape[1]
    if velocity.shape != target.shape:
        raise SettingsError(f"velocity {tuple(velocity.shape)} and target {tuple(target.shape)} must have one shape")
    if not 1 <= base_channels < channels:
        raise SettingsError(
            f"base_channels={base_channels} must be between 1 and {channels - 1}: there are {channels} channels"
        )
    if not (math.isfinite(detail_weight) and detail_weight >= 0):
        raise SettingsError(f"detail_weight={detail_weight} must be finite and not negative")
    dtype = torch.promote_types(torch.promote_types(velocity.dtype, target.dtype), torch.float32)
    errors = (velocity.to(dtype) - target.to(dtype)).square()
    base, detail = errors[:, :base_channels].mean(), errors[:, base_channels:].mean()
    share = detail_weight * (channels - base_channels)
    total = (base_channels * base + share * detail) / (base_channels + share)
    return FlowMatchingLosses(total, base.detach(), detail.detach())


def scheduled_flow_matching_loss(
    velocity: Float[Tensor, "b latent h w"],
    target: Float[Tensor, "b latent h w"],
    *,
    base_channels: int,
    detail_weight: float,
) -> Float[Tensor, ""]:
    """The total of `flow_matching_losses` alone."""
    return flow_matching_losses(velocity, target, base_channels=base_channels, detail_weight=detail_weight).total
