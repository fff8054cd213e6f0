"""The work of training and sampling, counted on the meta device: FLOPs, and activations for the backward pass.

A meta tensor has a shape and no values, so a pass through a model of any size takes seconds and no memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from davae.backbones import BACKBONES, backbone_of
from davae.cost.geometry import META, Geometry
from davae.errors import SettingsError
from davae.method.perceptual import LPIPS, alex_stages, vgg_stages
from davae.method.stage_one_loss import stage_one_loss
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import base_facts, decode_latents
from davae.training.stage_one import base_reconstruction
from davae.training.stage_one_recipe import AutoencoderRecipe, loss_settings
from davae.training.stage_two import Objective
from davae.training.stage_two_recipe import FinetuneRecipe, flow_settings

# The functions whose inputs autocast brings to the precision of their weights.
LAYERS = (torch.conv2d, F.linear)
# Names of integers in a condition.
INTEGERS = ("class_labels", "attention_mask", "encoder_attention_mask")


@dataclass
class Work:
    """Counts of some work: matrix products, convolutions and attention; and what the backward pass needs."""

    flops: int = 0  # a multiplication and its addition count as two
    kept_bytes: int = 0  # all tensors that autograd keeps, each storage once, without weights


@contextmanager
def counting(*models: nn.Module) -> Iterator[Work]:
    """Count what runs inside. The parameters and buffers of `models` are not activations."""
    mapping = {torch.ops.aten.convolution_backward: _count_convolution_backward}
    with keeping(*models) as work, FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield work
    work.flops = counter.get_total_flops()


@contextmanager
def keeping(*models: nn.Module) -> Iterator[Work]:
    """Count only the bytes that autograd keeps of what runs inside; several times as fast as FLOPs, too."""
    work = Work()
    # By storage, because layers may see views of a tensor. The tensors are held, so that no address is used again.
    storages: dict[int, Tensor] = {}
    for model in models:
        for weight in (*model.parameters(), *model.buffers()):
            storages[weight.untyped_storage()._cdata] = weight

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = tensor
            work.kept_bytes += storage.nbytes()
        return tensor

    # Everything that autograd saves for the backward pass goes through `keep`.
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _AsOnAGpu(), hooks:
        yield work


class _AsOnAGpu(TorchFunctionMode):
    """Behave like autocast and fused kernels on a GPU, for models in bfloat16 on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Flash attention is one kernel, which keeps no matrix of scores.
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            inputs = (named["query"], named["key"], named["value"])
            return torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[0]

        # A layer casts its input to the precision of its weights.
        if func in LAYERS:
            layer_input, weight, *others = args
            return func(layer_input.to(weight.dtype), weight, *others, **kwargs)
        return func(*args, **kwargs)


def _count_convolution_backward(
    grad: Sequence[int], image: Sequence[int], weight: Sequence[int], *others: Any, **_out: Any
) -> int:
    """Each gradient costs as much as the forward pass; torch's own count forgets the groups of a convolution."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = others
    return conv_flop_count(list(image), list(weight), list(grad), transposed=transposed) * (wanted[0] + wanted[1])


def count_parameters(*modules: nn.Module | None, trained: bool = False) -> int:
    """The number of parameters of all modules, or of those that are trained."""
    count = 0
    for module in modules:
        if module is not None:
            count += sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
    return count


def to_half(module: nn.Module) -> nn.Module:
    """The module in bfloat16, in place: the precision of a network under autocast."""
    return nn.Module.to(module, dtype=torch.bfloat16)  # diffusers' own `to` warns without a reason


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device=META)


def count_decode_flops(vae: ModelMixin, side: int) -> int:
    """FLOPs of decoding one image from latents of this side, counted on a copy of the autoencoder."""
    with META:
        copy: Any = to_half(type(vae).from_config(vae.config))
    with torch.no_grad(), counting() as work:
        decode_latents(copy, meta(1, base_facts(vae.config).latent_channels, side, side))
    return work.flops


def count_stage_one(
    autoencoder: AutoencoderDA, discriminator: nn.Module | None, geometry: Geometry, recipe: AutoencoderRecipe
) -> Work:
    """One crop through stage 1's loss, with the backward passes of both optimisers."""
    with META:
        lpips = LPIPS(vgg_stages() if recipe.loss.lpips_weights else alex_stages(), None)
    models: list[nn.Module] = [autoencoder, lpips, geometry.vae]
    if discriminator is not None:
        models.append(discriminator)
    for model in models:
        to_half(model)

    # One crop, as in `davae.training.stage_one`.
    image = meta(1, 3, recipe.crop, recipe.crop)
    with counting(*models) as work:
        target = image
        if recipe.target == "base reconstruction":
            target = base_reconstruction(autoencoder, geometry.vae, image)
        settings = loss_settings(recipe)
        loss = stage_one_loss(autoencoder, image, lpips, settings, target=target, discriminator=discriminator)
        loss.total.backward()
        if discriminator is not None:
            loss.discriminator.backward()
    return work


def count_stage_two(transformer: ModelMixin, autoencoder: AutoencoderDA, recipe: FinetuneRecipe) -> Work:
    """One image through the widened transformer and stage 2's loss, with the backward pass."""
    with counting(to_half(transformer)) as work:
        _stage_two_loss(transformer, autoencoder, recipe).backward()
    return work


def count_stage_two_kept_bytes(transformer: ModelMixin, autoencoder: AutoencoderDA, recipe: FinetuneRecipe) -> int:
    """The `kept_bytes` of `count_stage_two`: the backward pass keeps nothing, so it is left out."""
    with keeping(to_half(transformer)) as work:
        _stage_two_loss(transformer, autoencoder, recipe)
    return work.kept_bytes


def _stage_two_loss(transformer: ModelMixin, autoencoder: AutoencoderDA, recipe: FinetuneRecipe) -> Tensor:
    """Stage 2's loss of one sample, as in `davae.training.stage_two`."""
    config, backbone = autoencoder.config, backbone_of(transformer)
    side = recipe.size // autoencoder.downsample_factor
    latents = meta(1, config.latent_channels, side, side)
    noise = torch.empty_like(latents)

    # Shift and noise schedule change no shape.
    alphas = None if backbone.noise is None else torch.linspace(0.999, 0.001, 1000)
    objective = Objective(backbone, config.base_channels, settings=flow_settings(recipe), alphas=alphas)
    time = meta(1) if alphas is None else meta(1, dtype=torch.long)

    condition = make_condition(transformer, recipe.prompt_tokens)
    prediction = objective.predict(transformer, latents, noise, time, condition)
    return objective.loss(prediction, latents, noise, time, detail_weight=1.0)[0]


def count_transformer_flops(transformer: ModelMixin, shape: Sequence[int], condition: dict[str, Tensor]) -> int:
    """FLOPs of one image's pass through a transformer without weights, on latents of a shape [channels, h, w]."""
    with torch.no_grad(), counting(to_half(transformer)) as work:
        backbone_of(transformer).predict(transformer, meta(1, *shape), meta(1), condition)
    return work.flops


def make_condition(transformer: ModelMixin, prompt_tokens: int, clip_tokens: int | None = None) -> dict[str, Tensor]:
    """One caption or class as the transformer is told it, without values; `clip_tokens` as published if None."""
    backbone = backbone_of(transformer)
    if backbone.condition_shapes is None:
        known = [name for name, row in BACKBONES.items() if row.condition_shapes is not None]
        raise SettingsError(
            f"the budget of a {type(transformer).__name__} cannot be counted: davae does not know the shapes of its "
            f"captions. Allowed are {', '.join(known)}"
        )

    clip = backbone.clip_tokens if clip_tokens is None else clip_tokens
    condition = {}
    for name, shape in backbone.condition_shapes(transformer, clip + prompt_tokens).items():
        condition[name] = meta(1, *shape, dtype=torch.long if name in INTEGERS else torch.bfloat16)
    return condition
