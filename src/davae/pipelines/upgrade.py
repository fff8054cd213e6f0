"""Upgrade: a base pipeline and an AutoencoderDA become a stock pipeline of s times the side length, at equal tokens."""

import inspect
import json
import logging
import math
from copy import copy

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from davae.backbones import backbone_of, check_parts
from davae.backbones import widen_transformer as widen_transformer  # its public home: davae.widen_transformer
from davae.errors import SettingsError
from davae.method.widen import lost_directions
from davae.models.autoencoder_da import DECODING, AutoencoderDA
from davae.models.base_autoencoders import base_class, base_facts, downsample_factor
from davae.pipelines.adapter import digest_tensors

logger = logging.getLogger(__name__)


def upgrade(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> DiffusionPipeline:
    """The same pipeline class with an AutoencoderDA for its VAE, and a widened transformer that starts as the base's.

    The default size grows by itself, since stock pipelines count the autoencoder's stages; the token count stays.
    `pipeline` may be an upgraded one, if `autoencoder` was made from its VAE: an upgrade of the upgrade.
    All other components, and all weights of the transformer but its two ports, are shared with `pipeline`, which is
    left as it is: if you go on needing the base, take a copy of it before you train, fuse a LoRA or change the dtype.
    `autoencoder` is moved to the dtype and device of the VAE whose place it takes.

    Raises:
        SettingsError: if the transformer's family is unknown, its stock pipeline cannot run upgraded, its weights are
            offloaded, or `autoencoder` was not made from this pipeline's VAE.
    """
    check_parts(pipeline)
    for part in (pipeline.transformer, pipeline.vae):
        if any(parameter.is_meta for parameter in part.parameters()):
            raise SettingsError(
                f"the {type(part).__name__}'s weights are offloaded, or on the device meta: upgrade first, and offload "
                "the upgraded pipeline"
            )
    backbone = backbone_of(pipeline.transformer)
    if backbone.refusal:
        raise SettingsError(
            f"{type(pipeline).__name__} cannot be upgraded: {backbone.refusal}. What is missing is a pipeline that "
            "asks its VAE; davae.widen_transformer widens the transformer for one of your own"
        )
    _check_autoencoder(pipeline, autoencoder)
    nn.Module.to(autoencoder, dtype=pipeline.vae.dtype, device=pipeline.vae.device)  # diffusers' `to` warns for nothing
    transformer = widen_transformer(
        pipeline.transformer,
        base_channels=autoencoder.config.base_channels,
        detail_channels=autoencoder.config.detail_channels,
    )
    upgraded = replace_parts(pipeline, vae=autoencoder, transformer=transformer)
    if lost := lost_directions(transformer, backbone.ports):
        logger.warning(
            "detail_channels=%d is too many for this %s: in %d directions of each token it can never tell the noise, "
            "which stays in every picture. Fewer detail channels have fewer of them (docs/method.md)",
            autoencoder.config.detail_channels, type(transformer).__name__, lost,
        )  # fmt: skip
    if backbone.advice:
        logger.warning("the upgraded %s: %s", type(pipeline).__name__, backbone.advice)
    return upgraded


def with_autoencoder(pipeline: DiffusionPipeline, autoencoder: AutoencoderDA) -> DiffusionPipeline:
    """An upgraded pipeline with another autoencoder of the same latents in the place of its own, all else shared.

    So a finished transformer gets a slim decoder, or a refined one. `autoencoder` is moved to the dtype and device of
    the one whose place it takes.

    Raises:
        SettingsError: `pipeline` is not upgraded, or the two autoencoders differ in more than their decoding half.
    """
    if not (isinstance(pipeline.vae, AutoencoderDA) and isinstance(autoencoder, AutoencoderDA)):
        kinds = " and ".join(type(vae).__name__ for vae in (pipeline.vae, autoencoder))
        raise SettingsError(f"both autoencoders must be AutoencoderDAs: the pipeline's and the new one are {kinds}")
    ours, theirs = (digest_encoding_half(vae) for vae in (autoencoder, pipeline.vae))
    if differing := sorted(name for name in ours if ours[name] != theirs[name]):
        raise SettingsError(
            f"the autoencoder differs from the pipeline's in {', '.join(differing)}: the transformer was not trained "
            "on its latents. Train the decoder alone, by decoder_only = true and the pipeline's autoencoder as a start"
        )
    nn.Module.to(autoencoder, dtype=pipeline.vae.dtype, device=pipeline.vae.device)
    return replace_parts(pipeline, vae=autoencoder)


def digest_encoding_half(autoencoder: AutoencoderDA) -> dict[str, str]:
    """What decides an autoencoder's latents: settings, and digests of weights and statistics."""
    settings = {
        name: json.dumps(value) for name, value in autoencoder.config.items() if not name.startswith(("_", "decoder_"))
    }
    kept = {name: tensor for name, tensor in autoencoder.state_dict().items() if not name.startswith(DECODING)}
    statistics = {name: kept.pop(name) for name in ("detail_mean", "detail_std")}
    return {
        **settings,
        "weights of the encoders": digest_tensors(kept),
        "latent statistics": digest_tensors(statistics),
    }


def replace_parts(pipeline: DiffusionPipeline, **parts: ModelMixin) -> DiffusionPipeline:
    """A new pipeline of the same class, settings and other components: stock ones count the VAE's stages when made."""
    settings = inspect.signature(type(pipeline).__init__).parameters.keys() & pipeline.config.keys()
    arguments = {name: pipeline.config[name] for name in settings} | pipeline.components
    made = type(pipeline)(**{**arguments, **parts})
    for name in backbone_of(pipeline.transformer).carried:
        setattr(made, name, copy(getattr(pipeline, name)))
    return made


def _check_autoencoder(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> None:
    vae = pipeline.vae
    try:
        base_class(type(vae).__name__)
    except ValueError as error:
        raise SettingsError(f"the pipeline's VAE: {error}") from error
    if not isinstance(autoencoder, AutoencoderDA):
        raise SettingsError(
            f"a {type(autoencoder).__name__} is no AutoencoderDA: make one with AutoencoderDA.from_base"
        )
    config = autoencoder.config
    if not config.base_channels:
        raise SettingsError(
            "all latents of this autoencoder are new (base_channels=0): a transformer knows none of them, so there is "
            "no warm start. Use one with a base half, or train a transformer on its latents from scratch"
        )
    facts, factor = base_facts(vae.config), downsample_factor(vae.config)
    for name, ours, theirs in (
        ("base_channels", config.base_channels, facts.latent_channels),
        ("scaling_factor", config.scaling_factor, facts.scaling_factor),
        ("shift_factor", config.shift_factor, facts.shift_factor),
        ("downsample factor / resolution factor", autoencoder.downsample_factor // config.resolution_factor, factor),
    ):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise SettingsError(
                f"the autoencoder is not of this pipeline: its {name} is {ours}, the pipeline's VAE has {theirs}. "
                "Make it with AutoencoderDA.from_base(pipeline.vae, ...)"
            )
    for name in ("latents_mean", "latents_std"):
        numbers, wanted = (found.get(name) for found in (config.base_config, vae.config))
        if (numbers is None) != (wanted is None) or not np.allclose(numbers or 0, wanted or 0, rtol=1e-4, atol=1e-6):
            raise SettingsError(
                f"the autoencoder's {name} of the base latents is {numbers}, and the pipeline's VAE has {wanted}: the "
                "transformer would see its latents at another scale. Make it with AutoencoderDA.from_base(pipeline.vae)"
            )
    patches = getattr(vae, "bn", None)
    for name in ("running_mean", "running_var") if patches is not None else ():
        ours = None if autoencoder.bn is None else getattr(autoencoder.bn, name)[: 4 * config.base_channels].cpu()
        theirs = getattr(patches, name).cpu()
        if ours is None or not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-2):
            raise SettingsError(
                f"the autoencoder's {name} of 2x2 patches of the base latents is not that of the pipeline's VAE: the "
                "transformer would see its latents at another scale. Make it with AutoencoderDA.from_base(pipeline.vae)"
            )
    check_base_encoder(autoencoder, vae)


def check_base_encoder(autoencoder: AutoencoderDA, vae: ModelMixin) -> None:
    """Refuse an autoencoder that was made from another VAE.

    Raises:
        SettingsError: its frozen encoder, or what follows that, is not `vae`'s.
    """
    for ours, name in ((autoencoder.base_encoder, "encoder"), (autoencoder.base_quant_conv, "quant_conv")):
        theirs = getattr(vae, name, None)
        digests = [None if module is None else digest_tensors(module.state_dict()) for module in (ours, theirs)]
        if digests[0] != digests[1]:
            raise SettingsError(
                f"the autoencoder's frozen base {name} is not this pipeline's "
                f"(SHA-256 {digests[0]} against {digests[1]}). "
                "Use the pipeline that it was made from, or train one on this pipeline's VAE"
            )
