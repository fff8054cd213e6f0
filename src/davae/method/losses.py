"""The losses of stage 1, except the perceptual one (see perceptual.py), and the weights that balance them.

Each computes in float32 at least: a lower precision is widened on entry, so that a loss under autocast is never summed
in bfloat16; float64 stays.
"""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError
from davae.models.precision import at_least_float32

Images = Float[Tensor, "b 3 h w"]
"""In [-1, 1]."""
Logits = Float[Tensor, "b 1 h w"]
"""Of the discriminator."""
Moments = Float[Tensor, "b c h w"]
"""Means or log-variances of a posterior."""
Scalar = Float[Tensor, ""]


def channel_group_mean(
    detail: Float[Tensor, "b detail h w"], base_channels: int
) -> Float[Tensor, "b {base_channels} h w"]:
    """The mean of each group of r = D/C consecutive channels (Eq. 3): output i averages channels i*r to i*r + r - 1.

    Raises:
        SettingsError: D, the channels of `detail`, is no multiple of C, `base_channels`.
    """
    channels = detail.shape[1]
    if base_channels < 1 or channels < base_channels or channels % base_channels:
        raise SettingsError(
            f"detail_channels={channels} cannot be averaged onto base_channels={base_channels}: "
            f"detail_channels must be a multiple of the base's, such as {base_channels} or {2 * base_channels}"
        )
    return reduce(detail, "b (base ratio) h w -> b base h w", "mean", base=base_channels)


def detail_alignment_loss(detail: Float[Tensor, "b detail h w"], base: Float[Tensor, "b base h w"]) -> Scalar:
    """Mean squared error between the channel group mean of the detail latents and the base latents (Eq. 3-4).

    Args:
        detail: a sample of the detail posterior; it alone gets a gradient.
        base: base latents in the model's own units, (mean - shift_factor) * scaling_factor.

    Raises:
        SettingsError: D is no multiple of C.
    """
    group_mean = channel_group_mean(at_least_float32(detail), base.shape[1])
    return (group_mean - at_least_float32(base).detach()).square().mean()


def kl_loss_mean(mean: Moments, logvar: Moments) -> Scalar:
    """KL to N(0, I) as the ImageNet set-up weighs it: the mean of mean^2 + var - 1 - logvar, without 1/2."""
    return _twice_kl(mean, logvar).mean()


def kl_loss_sum(mean: Moments, logvar: Moments) -> Scalar:
    """KL to N(0, I) as the SD3 set-up weighs it: the divergence in nats of one image, averaged over the batch."""
    return 0.5 * _twice_kl(mean, logvar).sum((1, 2, 3)).mean()


def _twice_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    return mean.square() + logvar.exp() - 1 - logvar


def reconstruction_l1(reconstruction: Images, image: Images) -> Scalar:
    """Mean absolute difference."""
    return (at_least_float32(reconstruction) - at_least_float32(image)).abs().mean()


def gradient_l1(reconstruction: Images, image: Images) -> Scalar:
    """Mean absolute difference of finite differences, the two directions added; blind to a constant."""
    difference = at_least_float32(reconstruction) - at_least_float32(image)
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def hinge_discriminator_loss(real_logits: Logits, fake_logits: Logits) -> Scalar:
    """1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake)): the discriminator minimises it (Lim and Ye, 1705.02894).

    The logits of reconstructions must not get a gradient: detach what the discriminator sees.
    """
    real, fake = at_least_float32(real_logits), at_least_float32(fake_logits)
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def hinge_generator_loss(fake_logits: Logits) -> Scalar:
    """-mean of the discriminator's logits of reconstructions: L_adv, which the joint decoder minimises."""
    return -at_least_float32(fake_logits).mean()


def adaptive_weight(
    reference_gradient: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"], maximum: float
) -> Scalar:
    """clamp(|g_ref| / (|g| + 1e-4), 0, maximum), detached: the weight that gives a loss the gradient norm of another.

    VQGAN's rule (arXiv 2012.09841, Eq. 7), for two losses (docs/method.md 2.3). g_ref is the gradient of the
    reconstruction loss at the same parameter.
    """
    # 1e-4 keeps the weight finite where the loss has no gradient.
    reference = torch.linalg.vector_norm(at_least_float32(reference_gradient.detach()))
    own = torch.linalg.vector_norm(at_least_float32(gradient.detach()))
    return (reference / (own + 1e-4)).clamp(0, maximum)
