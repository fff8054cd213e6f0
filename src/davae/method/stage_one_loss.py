"""The loss of stage 1: one batch through the autoencoder, and the terms of its total (docs/method.md).

lpips = LPIPS.alex()
for image in images:
    stage_one_loss(autoencoder, image, lpips).total.backward()
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

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
from davae.method.perceptual import LPIPS, find_convolutions, patchwise_lpips
from davae.models.autoencoder_da import AutoencoderDA
from davae.seeds import rand, randn, sample_generators

KL_LOSSES = {"mean": kl_loss_mean, "sum": kl_loss_sum}
LARGEST_FACTOR = {"alignment": 1e8, "adversarial": 1e4}
"""Bounds of the adaptive factors, as in the reference code."""

Generators = Sequence[torch.Generator] | None
"""One random generator for each sample of a batch; None is torch's global generator."""


@dataclass(frozen=True)
class StageOneSettings:
    """Weights of the terms, and noise on what the joint decoder reads. The defaults are the paper's."""

    weights: Mapping[str, float] = field(
        default_factory=lambda: {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "alignment": 0.5}
    )
    """By the name of a term: l1, gradient, lpips, kl, alignment, adversarial. A term that is missing has weight 0."""
    adaptive: frozenset[str] = frozenset()
    """The terms with an adaptive factor: alignment, adversarial."""
    kl_reduction: Literal["mean", "sum"] = "mean"
    lpips_patch: int | None = None
    """Side of LPIPS's patches in pixels; None compares whole images."""
    lpips_stride: int | None = None
    """Pixels from one patch to the next; None is half a patch."""
    latent_noise: float = 0.0
    detail_dropout: float = 0.0
    inverted_dropout: bool = False


class StageOneLoss(NamedTuple):
    """The losses of one batch, scalars with graphs."""

    total: Tensor
    """What the autoencoder minimises."""
    logs: dict[str, Tensor]
    """All terms without their weights, and the adaptive factors."""
    discriminator: Tensor
    """What the discriminator minimises; 0 without a discriminator."""


def stage_one_loss(
    autoencoder: AutoencoderDA,
    image: Tensor,
    lpips: LPIPS,
    settings: StageOneSettings | None = None,
    *,
    target: Tensor | None = None,
    discriminator: nn.Module | None = None,
    ramp: float = 1.0,
    seed: int | None = None,
    samples: Sequence[int] = (),
    autocast: AbstractContextManager[Any] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda part: part,
    average_: Callable[[Iterable[Tensor]], None] = lambda gradients: None,
) -> StageOneLoss:
    """L = L_rec + lambda_align L_align of one batch of images [B, 3, H, W] in [-1, 1] (Sec. 3.1, Table S1).

    The reconstruction is compared with `target`, by default the images. A `discriminator` adds the adversarial term,
    times `ramp`. With a `seed`, random numbers depend only on it and on each sample's number in the run (`samples`).
    `autocast` is for the networks. Where processes share a batch, `gather` joins it and `average_` averages gradients.
    """
    settings, target = settings or StageOneSettings(), image if target is None else target
    random = partial(_make_generators, seed, samples)
    with autocast or nullcontext():
        # Encode: base latents from the small image, a sample of the detail posterior from the full one (Sec. 3.1).
        base = autoencoder.encode_base(image)
        mean, log_variance = autoencoder.encode_detail(image, base)
        detail = mean + (0.5 * log_variance).exp() * _draw_normal(mean.shape, random("posterior")).to(mean)

        # Decode both halves together. Noise and dropout prepare the decoder for what a transformer will give it.
        noisy_base, noisy_detail = add_latent_noise(base, detail, settings.latent_noise, random("latent noise"), gather)
        noisy_detail = drop_details(
            noisy_detail, settings.detail_dropout, random("detail dropout"), inverted=settings.inverted_dropout
        )
        reconstruction = autoencoder.reconstruct(noisy_base, noisy_detail)
        perceptual = perceptual_loss(lpips, reconstruction, target, settings)
        adversarial, discriminator_loss = None, image.new_zeros(())
        if discriminator is not None:
            adversarial, discriminator_loss = adversarial_losses(discriminator, reconstruction, target)

    terms = {
        # Reconstruction and KL (Table S1).
        "l1": reconstruction_l1(reconstruction, target),
        "gradient": gradient_l1(reconstruction, target),
        "lpips": perceptual,
        "kl": KL_LOSSES[settings.kl_reduction](mean, log_variance),
        # Alignment: the mean of each group of detail channels stays close to its base channel (Eq. 3-4).
        "alignment": detail_alignment_loss(detail, base) if base.shape[1] else image.new_zeros(()),
    }
    if adversarial is not None:
        terms["adversarial"] = adversarial

    # Adaptive weights: a term's gradient gets the norm of the reconstruction loss's (arXiv 2012.09841, Eq. 7).
    adaptive = adaptive_factors(terms, settings, compared_weights(autoencoder), average_)
    factors = {**adaptive, "adversarial": ramp * adaptive.get("adversarial", 1.0)}

    logs = {**terms, **{f"{name}_factor": factor for name, factor in adaptive.items()}}
    if discriminator is not None:
        logs["discriminator"] = discriminator_loss
    return StageOneLoss(weighted_sum(terms, settings.weights, factors), logs, discriminator_loss)


def _make_generators(seed: int | None, samples: Sequence[int], purpose: str) -> Generators:
    return None if seed is None else sample_generators(seed, purpose, samples)


def _draw_normal(shape: Sequence[int], generators: Generators) -> Tensor:
    return torch.randn(*shape) if generators is None else randn(shape, generators)


def add_latent_noise(
    base: Tensor,
    detail: Tensor,
    scale: float,
    generators: Generators,
    gather: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """Both halves [B, C or D, h, w] plus noise: |N(0, 1)| x `scale` x the channel's deviation over the whole batch.

    It makes the joint decoder forgive small errors of a transformer (RAE, arXiv 2510.11690; not in the paper).
    """
    if not scale:
        return base, detail
    level = scale * _draw_normal((len(base), 1, 1, 1), generators).abs()

    noisy = []
    for half in (base, detail):
        # There is no base half if all latents are new.
        if half.shape[1]:
            noise = level * _draw_normal(half.shape, generators)
            # Detached: otherwise the detail encoder could make the noise vanish by shrinking its deviation.
            deviation = gather(half.detach().float()).std(dim=(0, 2, 3), keepdim=True)
            half = half + noise.to(half) * deviation.to(half)
        noisy.append(half)
    return noisy[0], noisy[1]


def drop_details(detail: Tensor, probability: float, generators: Generators, *, inverted: bool) -> Tensor:
    """Detail latents [B, D, h, w] before standardisation, those of a whole image set to zero with `probability`.

    `inverted` divides the others by 1 - `probability`, as the reference code does, which keeps the mean over draws; but
    at inference the latents are then smaller than those seen in training.
    """
    if not probability:
        return detail
    uniform = torch.rand(len(detail)) if generators is None else rand(generators)
    mask = (uniform >= probability).to(detail)[:, None, None, None]
    return detail * (mask / (1 - probability) if inverted else mask)


def perceptual_loss(lpips: LPIPS, reconstruction: Tensor, target: Tensor, settings: StageOneSettings) -> Tensor:
    """The mean LPIPS of a batch [B, 3, H, W], by patches if the settings say so; 0 if it has no weight."""
    if not settings.weights.get("lpips"):
        return target.new_zeros(())
    if settings.lpips_patch is None:
        return lpips(reconstruction, target).mean()
    stride = settings.lpips_stride or max(1, settings.lpips_patch // 2)
    return patchwise_lpips(lpips, reconstruction, target, patch=settings.lpips_patch, stride=stride).mean()


def adversarial_losses(discriminator: nn.Module, reconstruction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The hinge losses of the joint decoder and of the discriminator (Table S1), on one batch [B, 3, H, W].

    The first has a graph to the reconstruction only, the second to the discriminator only. As in the reference code the
    discriminator sees one batch at a time, so that each has its own BatchNorm statistics.
    """
    discriminator.requires_grad_(False)
    generator_loss = hinge_generator_loss(discriminator(reconstruction))
    discriminator.requires_grad_(True)
    real_logits, fake_logits = discriminator(target), discriminator(reconstruction.detach())
    return generator_loss, hinge_discriminator_loss(real_logits, fake_logits)


def adversarial_ramp(step: int, *, start: int, ramp_steps: int) -> float:
    """0 before step `start`, then (step - start + 1) / ramp_steps, at most 1."""
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / max(1, ramp_steps))


def compared_weights(autoencoder: AutoencoderDA) -> dict[str, Tensor]:
    """The parameter at which an adaptive term's gradients are measured, by the name of the term."""
    return {
        "alignment": autoencoder.detail_downsample.get_parameter("conv.weight"),
        "adversarial": last_convolution(autoencoder.joint_decoder),
    }


def last_convolution(decoder: nn.Module) -> Tensor:
    """The weight of the convolution that makes pixels: the last one in the order in which they were built."""
    return find_convolutions(decoder)[-1].weight


def adaptive_factors(
    terms: Mapping[str, Tensor],
    settings: StageOneSettings,
    places: Mapping[str, Tensor],
    average_: Callable[[Iterable[Tensor]], None] = lambda gradients: None,
) -> dict[str, Tensor]:
    """The gradient norm of the reconstruction loss over that of each adaptive term, at the term's place.

    The reconstruction loss is L1, gradient L1 and LPIPS with their weights. All graphs are kept.
    """
    pixel_terms = {name: terms[name] for name in ("l1", "gradient", "lpips")}
    factors = {}
    for name in terms:
        if name not in settings.adaptive or not settings.weights.get(name):
            continue
        reconstruction = weighted_sum(pixel_terms, settings.weights, {})
        reference = torch.autograd.grad(reconstruction, places[name], retain_graph=True)[0]
        own = torch.autograd.grad(terms[name], places[name], retain_graph=True)[0]
        average_((reference, own))
        factors[name] = adaptive_weight(reference, own, LARGEST_FACTOR[name])
    return factors


def weighted_sum(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], factors: Mapping[str, Tensor | float]
) -> Tensor:
    """The sum of the terms, each times its weight and its factor if it has one."""
    weighted = [weights.get(name, 0.0) * factors.get(name, 1.0) * term for name, term in terms.items()]
    return torch.stack(weighted).sum()
