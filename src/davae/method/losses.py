"""The losses of stage 1, except the perceptual one (see perceptual.py), and the weights that balance them.

Each computes in float32 or better.

A precision below float32 is widened on entry, so a loss under autocast is never summed in bfloat16; float64 stays.
"""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError


def channel_group_mean(
    detail: Float[Tensor, "b detail h w"], base_channels: int
) -> Float[Tensor, "b {base_channels} h w"]:
    """The mean of each group of r = D/C consecutive channels: output channel i averages channels i*r to i*r + r - 1.

    Args:
        detail: detail latents, D channels.
        base_channels: C, the number of groups.

    Raises:
        SettingsError: D is no multiple of C.
    """
    channels = detail.shape[1]
    if base_channels < 1 or channels < base_channels or channels % base_channels:
        raise SettingsError(
            f"detail_channels={channels} cannot be averaged onto base_channels={base_channels}: "
            f"detail_channels must be a multiple of the base's, such as {base_channels} or {2 * base_channels}"
        )
    return reduce(detail, "b (base ratio) h w -> b base h w", "mean", base=base_channels)


def detail_alignment_loss(
    detail: Float[Tensor, "b detail h w"], base: Float[Tensor, "b base h w"]
) -> Float[Tensor, ""]:
    """Mean squared error between the channel group mean of the detail latents and the base latents (Eq. 3-4).

    Args:
        detail: a sample of the detail posterior; it alone gets a gradient.
        base: base latents in the model's own units, (mean - shift_factor) * scaling_factor.

    Raises:
        SettingsError: D is no multiple of C.
    """
    return (channel_group_mean(_widened(detail), base.shape[1]) - _widened(base).detach()).square().mean()


def kl_loss_mean(mean: Float[Tensor, "b c h w"], logvar: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """KL to N(0, I) as the ImageNet set-up weighs it: mean over all elements of mean^2 + var - 1 - logvar, without 1/2.

    Args:
        mean: means of the detail posterior.
        logvar: its log-variances.
    """
    return _twice_kl(mean, logvar).mean()


def kl_loss_sum(mean: Float[Tensor, "b c h w"], logvar: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """KL to N(0, I) as the SD3 set-up weighs it: the divergence in nats of one picture, averaged over the batch.

    Args:
        mean: means of the detail posterior.
        logvar: its log-variances.
    """
    return 0.5 * _twice_kl(mean, logvar).sum((1, 2, 3)).mean()


def reconstruction_l1(reconstruction: Float[Tensor, "b 3 h w"], image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of pictures in [-1, 1]."""
    return (_widened(reconstruction) - _widened(image)).abs().mean()


def gradient_l1(reconstruction: Float[Tensor, "b 3 h w"], image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of the pictures' finite differences, the two directions added; blind to a constant.

    Args:
        reconstruction: pictures in [-1, 1], at least 2 px on each side.
        image: the originals.
    """
    difference = _widened(reconstruction) - _widened(image)
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def hinge_discriminator_loss(
    real_logits: Float[Tensor, "b 1 h w"], fake_logits: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake)): what the discriminator lowers (Lim and Ye, 1705.02894).

    Args:
        real_logits: the discriminator's logits of real pictures.
        fake_logits: of reconstructions, which must not get a gradient: detach them.
    """
    return 0.5 * ((1 - _widened(real_logits)).relu().mean() + (1 + _widened(fake_logits)).relu().mean())


def hinge_generator_loss(fake_logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """-mean of the discriminator's logits of reconstructions: L_adv, what the joint decoder lowers."""
    return -_widened(fake_logits).mean()


def adaptive_weight(
    reference_gradient: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"], maximum: float
) -> Float[Tensor, ""]:
    """clamp(|g_ref| / (|g| + 1e-4), 0, maximum), detached: the weight that gives a loss the gradient norm of another.

    VQGAN's rule (arXiv 2012.09841, Eq. 7), in both of the places where the reference has it (docs/method.md 2.3):

    - the adversarial loss: gradients at the weight of the decoder's last convolution, maximum 1e4;
    - the alignment loss: gradients at the weight of the 3x3 convolution in the detail encoder's last block, not at the
      1x1 shortcut beside it, maximum 1e8. With the closed-form start that convolution is zero at first; its gradient
      is not, since that depends on what the convolution reads, not on what it holds.

    Args:
        reference_gradient: of the reconstruction loss, L1 and LPIPS (and the gradient loss, if it has a weight).
        gradient: of the loss to be weighted, at the same parameter.
        maximum: the largest weight.
    """
    norms = [torch.linalg.vector_norm(_widened(g.detach())) for g in (reference_gradient, gradient)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, maximum)


def _twice_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    mean, logvar = _widened(mean), _widened(logvar)
    return mean.square() + logvar.exp() - 1 - logvar


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
