"""What the work of training and of sampling costs: FLOPs and kept activations, counted on the meta device.

A meta tensor has a shape and no values, so passes through models of any size take seconds and no memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from davae.backbones import BACKBONES, Backbone
from davae.cost.geometry import META, Geometry
from davae.errors import SettingsError
from davae.method.losses import detail_alignment_loss, reconstruction_l1
from davae.method.perceptual import LPIPS, patch_starts
from davae.models.autoencoder_da import AutoencoderDA
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe

VGG_STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
"""Convolutions and their channels in the five stages of VGG16."""


class _FusedAttention(TorchFunctionMode):
    """Attention as one kernel, which the FLOP counter knows and which keeps no matrix of scores for the backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = (args + tuple((kwargs or {}).get(name) for name in ("query", "key", "value")))[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **(kwargs or {}))


@dataclass
class Work:
    """What was counted: of matrix products and convolutions (attention's, too) and of what the backward pass needs."""

    flops: int = 0
    """A multiplication and its addition are two."""
    kept_bytes: int = 0
    """All tensors that autograd keeps, weights left out, each storage once."""
    _storages: dict[int, Tensor] = field(default_factory=dict, repr=False)


@contextmanager
def counting(*weights: nn.Module) -> Iterator[Work]:
    """Count what runs inside; `weights` are the modules whose parameters and buffers are not activations."""
    work = Work()
    owned = {
        tensor.untyped_storage()._cdata for module in weights for tensor in (*module.parameters(), *module.buffers())
    }

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned and storage._cdata not in work._storages:
            work._storages[storage._cdata] = tensor  # held, so that its address is not used again
            work.kept_bytes += storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _FusedAttention(), FlopCounterMode(display=False) as counter, hooks:
        yield work
    work.flops = counter.get_total_flops()
    work._storages.clear()


def in_half(module: nn.Module) -> nn.Module:
    """The module in bfloat16, in place: what a network computes in under autocast."""
    return nn.Module.to(module, dtype=torch.bfloat16)  # diffusers' own `to` warns without a reason


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device=META)


def decode_flops(vae: ModelMixin, side: int) -> int:
    """Operations of decoding one picture, counted on a copy of an autoencoder on the meta device.

    Args:
        vae: of any device and dtype.
        side: of its latents.
    """
    with META:
        counted: Any = in_half(type(vae).from_config(vae.config))
    with torch.no_grad(), counting() as work:
        counted.decode(meta(1, vae.config.latent_channels, side, side))
    return work.flops


def stage_one_work(
    autoencoder: AutoencoderDA, discriminator: nn.Module | None, geometry: Geometry, recipe: AutoencoderRecipe
) -> Work:
    """What one crop costs: encoders, joint decoder, losses, and the backward passes of both optimisers."""
    perceptual = _perceptual_stages(recipe)
    modules = [m for m in (autoencoder, discriminator, perceptual, geometry.vae) if m is not None]
    for module in modules:
        in_half(module)
    image = meta(1, 3, recipe.crop, recipe.crop)
    with counting(*modules) as work:
        target = image
        if recipe.target == "base reconstruction":
            with torch.no_grad():
                target = geometry.vae(image).sample
        base = autoencoder.encode_base(image)
        mean, log_variance = autoencoder.encode_detail(image, base)
        detail = mean + (0.5 * log_variance).exp() * torch.empty_like(mean)
        picture = autoencoder.reconstruct(base, detail)
        reconstruction = reconstruction_l1(picture, target)
        if perceptual is not None:
            reconstruction = reconstruction + _perceptual(perceptual, picture, target, recipe)
        alignment = detail_alignment_loss(detail, base) if base.shape[1] else reconstruction.new_zeros(())
        adversarial = reconstruction.new_zeros(())
        if recipe.loss.adaptive_alignment and not recipe.decoder_only:
            _gradients((reconstruction, alignment), autoencoder.detail_downsample.conv.weight)
        if discriminator is not None:
            adversarial = discriminator(picture).float().mean()
            if recipe.loss.adaptive_adversarial:
                last = [p for p in autoencoder.joint_decoder.parameters() if p.ndim == 4][-1]
                _gradients((reconstruction, adversarial), last)
            for pictures in (target, picture.detach()):  # the discriminator's own step
                discriminator(pictures).float().mean().backward()
            discriminator.requires_grad_(False)  # the other step passes through it, and trains it not
        (reconstruction + alignment + adversarial).backward()
    return work


def _gradients(losses: Iterable[Tensor], weight: Tensor) -> None:
    """The additional backward passes of an adaptive weight: both losses to one layer (METHOD sections 3 and 4)."""
    for loss in losses:
        torch.autograd.grad(loss, weight, retain_graph=True)


def _perceptual_stages(recipe: AutoencoderRecipe) -> nn.ModuleList | None:
    """The convolutions of LPIPS's network: AlexNet's, or VGG16's, whose file of weights need not be there."""
    if not recipe.loss.lpips:
        return None
    if not recipe.loss.lpips_weights:
        return LPIPS.alex().stages.to(META)
    stages, width = nn.ModuleList(), 3
    with META:
        for depth, next_width in VGG_STAGES:
            layers: list[nn.Module] = [nn.MaxPool2d(2, 2)] if len(stages) else []
            for _ in range(depth):
                layers += [nn.Conv2d(width, next_width, 3, padding=1), nn.ReLU()]
                width = next_width
            stages.append(nn.Sequential(*layers))
    return stages.requires_grad_(False)


def _perceptual(stages: nn.ModuleList, picture: Tensor, target: Tensor, recipe: AutoencoderRecipe) -> Tensor:
    """Both pictures through the network, as one or in patches; what follows it has no products worth counting."""
    side, stride = recipe.loss.lpips_patch, recipe.loss.lpips_stride
    loss = picture.new_zeros(())
    for image in (picture, target):
        hidden = image
        if side is not None:
            starts = patch_starts(recipe.crop, side, stride or max(1, side // 2))
            corners = [(top, left) for top in starts for left in starts]
            hidden = torch.cat([image[..., y : y + side, x : x + side] for y, x in corners])
        for stage in stages:
            hidden = stage(hidden)
            loss = loss + hidden.mean()
    return loss


def transformer_work(
    transformer: ModelMixin, autoencoder: AutoencoderDA, recipe: FinetuneRecipe, backbone: Backbone, *, trained: bool
) -> Work:
    """One picture's pass through the widened transformer, forward only or with its backward pass."""
    in_half(transformer)
    side = recipe.size // autoencoder.downsample_factor
    latents = meta(1, autoencoder.config.latent_channels, side, side)
    condition = condition_of(transformer, backbone, recipe.prompt_tokens)
    with torch.set_grad_enabled(trained), counting(transformer) as work:
        prediction = backbone.predict(transformer, latents, meta(1), condition)
        if trained:
            prediction.float().square().mean().backward()
    return work


def condition_of(
    transformer: ModelMixin, backbone: Backbone, prompt_tokens: int, clip_tokens: int | None = None
) -> dict[str, Tensor]:
    """One caption or class as the transformer is told it, without values; `clip_tokens` as published if None.

    Raises:
        SettingsError: davae does not know the shapes.
    """
    if backbone.condition_shapes is None:
        known = [name for name, row in BACKBONES.items() if row.condition_shapes is not None]
        raise SettingsError(
            f"the budget of a {type(transformer).__name__} cannot be counted: davae does not know the shapes of its "
            f"captions. Allowed are {', '.join(known)}"
        )
    clip = backbone.clip_tokens if clip_tokens is None else clip_tokens
    whole = {"class_labels", "attention_mask", "encoder_attention_mask"}
    return {
        name: meta(1, *shape, dtype=torch.long if name in whole else torch.bfloat16)
        for name, shape in backbone.condition_shapes(transformer, clip + prompt_tokens).items()
    }
