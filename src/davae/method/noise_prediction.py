"""Diffusion that predicts noise and its own variance, with a scheduled loss: DiT and PixArt are trained so.

A noisy latent is x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, a the schedule's cumulative product, t = 0 .. T - 1.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from davae.method.flow import Latents, LossAndLogs, flow_matching_losses

Alphas = Float[Tensor, " steps"]
"""Cumulative products a of a schedule of T numbers, falling from nearly 1 to nearly 0."""
Timestep = Int[Tensor, " b"]
"""Step of each sample, 0 to T - 1; T is 1000 in published models."""


def add_noise(latents: Latents, noise: Latents, alphas: Alphas, timestep: Timestep) -> Latents:
    """x_t of each sample."""
    alpha = _at(alphas, timestep, latents)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def noise_loss(
    prediction: Latents,
    variance: Latents | None,
    noise: Latents,
    alphas: Alphas,
    timestep: Timestep,
    *,
    base_channels: int,
    detail_weight: float,
) -> LossAndLogs:
    """Stage 2's loss of one batch for a model that predicts noise: Eq. 13 of the noise, plus the variance's bound.

    Args:
        prediction: of the noise, at `add_noise(latents, noise, alphas, timestep)`.
        variance: the transformer's second prediction, in about [-1, 1]; None if it has none.
        noise: what was added to the latents.
        alphas: the noise schedule.
        timestep: t of each sample.
        base_channels: C.
        detail_weight: weight of the detail channels (Eq. 12).

    Returns:
        The loss with its graph, and its parts for a log, as of `flow_loss`; `variance_loss` if that is predicted.
    """
    loss, logs = flow_matching_losses(prediction, noise, base_channels=base_channels, detail_weight=detail_weight)
    if variance is None:
        return loss, logs

    bound = variance_loss(
        variance, prediction, noise, alphas, timestep, base_channels=base_channels, detail_weight=detail_weight
    )
    return loss + bound, {**logs, "variance_loss": bound.detach()}


def variance_loss(
    variance: Latents,
    prediction: Latents,
    noise: Latents,
    alphas: Alphas,
    timestep: Timestep,
    *,
    base_channels: int,
    detail_weight: float,
) -> Float[Tensor, ""]:
    """The variational bound's term of step t, in bits, weighted over channels as Eq. 13: it trains the variance alone.

    It is the divergence of the model's Gaussian of x_{t-1} from the true posterior's (arXiv 2102.09672, Eq. 4 and 15;
    docs/method.md 2.9). The log-variance is v log beta_t + (1 - v) log of the posterior's variance, with v =
    (`variance` + 1) / 2; the mean is the predicted noise's, detached. At t = 0 the posterior variance is that of t = 1.
    """
    # The schedule: beta_t and the variance of the true posterior, zero at t = 0.
    alphas = alphas.double()
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    beta = 1 - alphas / before
    posterior = beta * (1 - before) / (1 - alphas)
    posterior[0] = posterior[1]

    # The model's log-variance lies between the two.
    low, high = _at(posterior.log(), timestep, variance), _at(beta.log(), timestep, variance)
    part = (variance.float() + 1) / 2
    log_variance = part * high + (1 - part) * low

    # Both means are the same function of x_t and the noise, so they differ by the noise's error times this.
    scale = _at(beta / ((1 - alphas) * (alphas / before)).sqrt(), timestep, variance)
    difference = scale * (prediction.detach().float() - noise.float())
    divergence = (log_variance - low + (low - log_variance).exp() - 1 + difference.square() * (-log_variance).exp()) / 2

    # In bits, weighted as in Eq. 13.
    weights = torch.ones(divergence.shape[1], device=divergence.device)
    weights[base_channels:] = detail_weight
    bits = divergence / math.log(2)
    return (bits * weights.view(1, -1, 1, 1)).sum() / (weights.sum() * bits[:, 0].numel())


def _at(values: Alphas, timestep: Timestep, like: Tensor) -> Float[Tensor, "b 1 1 1"]:
    """The schedule's values at each sample's step, in float32."""
    return values.to(like.device)[timestep].to(torch.float32)[:, None, None, None]
