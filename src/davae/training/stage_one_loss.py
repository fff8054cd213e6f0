"""The loss of stage 1: one batch through the autoencoder, and what its total is made of."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from davae.method.losses import (
    adaptive_weight,
    detail_alignment_loss,
    gradient_l1,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss_mean,
    kl_loss_sum,
    reconstruction_l1,
)
from davae.method.perceptual import LPIPS, patchwise_lpips
from davae.models.autoencoder_da import AutoencoderDA
from davae.run import faults
from davae.run.ranks import Ranks
from davae.seeds import rand, randn, sample_generators
from davae.training.companion import Companion
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.state import TrainingState

KL_LOSSES = {"mean": kl_loss_mean, "sum": kl_loss_sum}
LARGEST_FACTOR = {"alignment": 1e8, "adversarial": 1e4}
"""Of the adaptive weights, as in the reference code (METHOD sections 3 and 4)."""


class StageOneLoss(NamedTuple):
    """The loss of the autoencoder, what of it is logged, and the discriminator's, 0 without it."""

    total: Tensor
    logs: dict[str, Tensor]
    discriminator: Tensor


def stage_one_loss(
    autoencoder: AutoencoderDA,
    image: Tensor,
    lpips: LPIPS,
    recipe: AutoencoderRecipe,
    state: TrainingState,
    *,
    target: Tensor | None = None,
    opponent: Companion | None = None,
) -> StageOneLoss:
    """L = L_rec + lambda_align L_align of one batch [B, 3, H, W] in [-1, 1] (METHOD section 4), or of a rank's part.

    Args:
        autoencoder: what is trained.
        image: what is encoded.
        lpips: the network of the perceptual loss.
        recipe: weights, noise and dropout.
        state: gives the step and the precision.
        target: what the reconstruction is compared with; `image` itself if None.
        opponent: the discriminator, if it plays in this step.
    """
    weights, target = recipe.loss, image if target is None else target
    samples = state.ranks.sample_numbers(state.batch, len(image))
    posterior, latent, dropout = (
        sample_generators(recipe.seed, name, samples) for name in ("posterior", "latent noise", "detail dropout")
    )
    with state.autocast():
        base = autoencoder.encode_base(image)
        mean, log_variance = autoencoder.encode_detail(image, base)
        noise = randn(mean.shape, posterior).to(mean)
        detail = faults.at("encode", mean + (0.5 * log_variance).exp() * noise)
        noisy_base, noisy = with_latent_noise(base, detail, recipe.latent_noise, latent, state.ranks)
        inverted = recipe.inverted_dropout
        dropped = with_detail_dropout(noisy, recipe.detail_dropout, dropout, inverted=inverted)
        reconstruction = faults.at("forward", autoencoder.reconstruct(noisy_base, dropped))
        perceptual = perceptual_loss(lpips, reconstruction, target, weights)
        played = {} if opponent is None else adversarial_losses(opponent.model, reconstruction, target)
    discriminator = played.pop("discriminator", image.new_zeros(()))
    parts = {
        "l1": reconstruction_l1(reconstruction, target),
        "gradient": gradient_l1(reconstruction, target),
        "lpips": perceptual,
        "kl": KL_LOSSES[weights.kl_reduction](mean, log_variance),
        "alignment": detail_alignment_loss(detail, base) if base.shape[1] else image.new_zeros(()),
        **played,
    }
    adaptive = adaptive_factors(parts, weights, compared_at(autoencoder), state.ranks)
    ramp = adversarial_ramp(state.step, start=weights.adversarial_start, ramp_steps=weights.adversarial_ramp_steps)
    factors = {**adaptive, "adversarial": ramp * adaptive.get("adversarial", 1.0)}
    logs = {**parts, **{f"{name}_factor": factor for name, factor in adaptive.items()}}
    logs |= {} if opponent is None else {"discriminator": discriminator}
    return StageOneLoss(weighted_sum(parts, weights, factors), logs, discriminator)


def with_latent_noise(
    base: Tensor, detail: Tensor, scale: float, random: Sequence[torch.Generator], ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Both halves [B, C or D, h, w] with noise of |N(0, 1)| x `scale` of their channels' deviations over the batch.

    The batch is that of all ranks, and B a rank's part of it; each sample has its own generator.
    """
    if not scale:
        return base, detail
    level = scale * randn((len(base), 1, 1, 1), random).abs()
    noisy = []
    for half in (base, detail):
        if not half.shape[1]:  # all latents are new: there is no base half
            noisy.append(half)
            continue
        noise = level * randn(half.shape, random)
        # A deviation that the detail encoder got gradients through could shrink away the noise.
        deviation = ranks.gather(half.detach().float()).std(dim=(0, 2, 3), keepdim=True)
        noisy.append(half + noise.to(half) * deviation.to(half))
    return noisy[0], noisy[1]


def with_detail_dropout(
    detail: Tensor, probability: float, random: Sequence[torch.Generator], *, inverted: bool
) -> Tensor:
    """Detail latents [B, D, h, w], those of a whole picture zero with `probability` (METHOD section 2.2).

    Args:
        detail: detail latents before standardisation.
        probability: for each picture by itself.
        random: of each picture's choice.
        inverted: multiply the others by 1 / (1 - `probability`), so that the mean over choices is `detail`. The
            reference does; but undropped latents, as at inference, are then smaller than those seen in training.
    """
    if not probability:
        return detail
    kept = (rand(random) >= probability).to(detail)[:, None, None, None]
    return detail * (kept / (1 - probability) if inverted else kept)


def perceptual_loss(lpips: LPIPS, reconstruction: Tensor, target: Tensor, weights: LossWeights) -> Tensor:
    """LPIPS averaged over a batch [B, 3, H, W] in [-1, 1], by patches where `weights` say so; 0 without its weight."""
    if not weights.lpips:
        return target.new_zeros(())
    if weights.lpips_patch is None:
        return lpips(reconstruction, target).mean()
    stride = weights.lpips_stride or max(1, weights.lpips_patch // 2)
    return patchwise_lpips(lpips, reconstruction, target, patch=weights.lpips_patch, stride=stride).mean()


def adversarial_ramp(step: int, *, start: int, ramp_steps: int) -> float:
    """0 before step `start`, then linearly up to 1 over `ramp_steps` steps: (step - start + 1) / ramp_steps."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / max(1, ramp_steps))


def adversarial_losses(discriminator: nn.Module, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The hinge losses of one batch [B, 3, H, W] in [-1, 1]: "adversarial" (the joint decoder's) and "discriminator".

    The first has a graph to the reconstruction but not to the discriminator's weights, the second only to these. As in
    the reference, the discriminator sees one batch at a time: each has its own BatchNorm statistics.
    """
    with _frozen(discriminator):
        generator_loss = hinge_generator_loss(discriminator(reconstruction))
    real_logits, fake_logits = discriminator(target), discriminator(reconstruction.detach())
    return {"adversarial": generator_loss, "discriminator": hinge_discriminator_loss(real_logits, fake_logits)}


def compared_at(autoencoder: AutoencoderDA) -> dict[str, Tensor]:
    """By the name of a loss whose weight is adaptive, the parameter at which gradients are compared."""
    return {
        "alignment": autoencoder.detail_downsample.conv.weight,
        "adversarial": last_convolution(autoencoder.joint_decoder),
    }


def last_convolution(decoder: nn.Module) -> Tensor:
    """The weight of a decoder's last convolution, in the order in which it was built: where pixels come from."""
    return [module.weight for module in decoder.modules() if isinstance(module, nn.Conv2d)][-1]


def weighted_sum(parts: Mapping[str, Tensor], weights: LossWeights, factors: Mapping[str, Tensor | float]) -> Tensor:
    """The sum of the losses, each times its weight in the recipe and its factor, if it has one."""
    return torch.stack([getattr(weights, name) * factors.get(name, 1.0) * part for name, part in parts.items()]).sum()


def adaptive_factors(
    parts: Mapping[str, Tensor], weights: LossWeights, places: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """Factors of the losses whose weights are adaptive: gradients of the reconstruction loss over those of the loss.

    The reconstruction loss is that of the pixels, with its weights: L1, LPIPS, and gradients; no KL.

    Args:
        parts: all losses by name, with their graphs, which are kept.
        weights: which factors are wanted, and the weights of the reconstruction loss.
        places: by the name of a loss, the parameter whose gradients are compared.
        ranks: the processes that share the batch; the gradients are their means.
    """
    wanted = {"alignment": weights.adaptive_alignment, "adversarial": weights.adaptive_adversarial}
    names = [name for name in parts if wanted.get(name) and getattr(weights, name)]
    reconstruction = {name: parts[name] for name in ("l1", "gradient", "lpips")}
    factors = {}
    for name in names:
        both = (weighted_sum(reconstruction, weights, {}), parts[name])
        reference, own = (torch.autograd.grad(loss, places[name], retain_graph=True)[0] for loss in both)
        ranks.average_((reference, own))
        factors[name] = adaptive_weight(reference, own, LARGEST_FACTOR[name])
    return factors


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
