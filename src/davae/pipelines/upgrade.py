"""Upgrade: a base pipeline and an AutoencoderDA become a stock pipeline of s times the side length, at equal tokens."""

import copy
import inspect
import json
import logging
import math
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from davae.backbones import backbone_of, check_parts, widen_transformer
from davae.errors import SettingsError
from davae.method.widen import lost_directions
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import base_facts, downsample_factor
from davae.models.stock_names import DECODING_PARTS
from davae.pipelines.autoencoders import check_base_encoder, check_present, digest_tensors, load_base_class

logger = logging.getLogger(__name__)


def upgrade(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> DiffusionPipeline:
    """Make a pipeline of the same class with an AutoencoderDA and a widened transformer that starts as the base's.

    The default image size grows, because stock pipelines count the autoencoder's stages; the token count stays.
    `pipeline` may be an upgraded one, if `autoencoder` was made from its VAE. `pipeline` itself does not change, but
    the new one shares its other components and all weights of its transformer except the two ports: to go on using
    the base, copy it before you train, fuse a LoRA or change the dtype. `autoencoder` is moved to the dtype and device
    of the VAE that it replaces.

    Raises:
        SettingsError: the backbone is unknown, its stock pipeline cannot run upgraded, its weights are offloaded, or
            `autoencoder` was not made from this pipeline's VAE.
    """
    check_parts(pipeline)
    backbone = backbone_of(pipeline.transformer)
    for part in (pipeline.transformer, pipeline.vae):
        check_present(part, type(part).__name__, "upgrade first, then offload")
    if backbone.refusal:
        raise SettingsError(
            f"{type(pipeline).__name__} cannot be upgraded: {backbone.refusal}. davae.widen_transformer widens its "
            "transformer, for a pipeline of your own"
        )
    _check_autoencoder(pipeline, autoencoder)

    # The warm start: on the base's latents the widened transformer computes the same as the base.
    config = autoencoder.config
    transformer = getattr(pipeline.transformer, "_orig_mod", pipeline.transformer)  # torch.compile wraps a model
    transformer = widen_transformer(
        transformer, base_channels=config.base_channels, detail_channels=config.detail_channels
    )
    upgraded = replace_parts(pipeline, vae=autoencoder, transformer=transformer)

    lost = lost_directions(transformer, backbone.ports)
    if lost:
        logger.warning(
            "detail_channels=%d is too many for this %s: it cannot predict the noise in %d directions of each token: "
            "it stays in every image. Use fewer detail channels (docs/method.md)",
            config.detail_channels, type(transformer).__name__, lost,
        )  # fmt: skip
    if backbone.advice:
        logger.warning("the upgraded %s: %s", type(pipeline).__name__, backbone.advice)
    return upgraded


def with_autoencoder(pipeline: DiffusionPipeline, autoencoder: AutoencoderDA) -> DiffusionPipeline:
    """Make an upgraded pipeline with another autoencoder of the same latents, such as one with a slim decoder.

    Everything else is shared. `autoencoder` is moved to the dtype and device of the one that it replaces.

    Raises:
        SettingsError: `pipeline` is not upgraded, or the two autoencoders differ outside their decoders.
    """
    if not isinstance(pipeline.vae, AutoencoderDA) or not isinstance(autoencoder, AutoencoderDA):
        classes = f"{type(pipeline.vae).__name__} and {type(autoencoder).__name__}"
        raise SettingsError(f"both autoencoders must be AutoencoderDAs: the pipeline's and the new one are {classes}")

    theirs, ours = digest_encoding_half(pipeline.vae), digest_encoding_half(autoencoder)
    differences = [name for name in sorted(ours) if ours[name] != theirs[name]]
    if differences:
        raise SettingsError(
            f"the autoencoder differs from the pipeline's in {', '.join(differences)}: the transformer was not trained "
            "on its latents. Train only the decoder: decoder_only = true, starting from the pipeline's autoencoder"
        )
    return replace_parts(pipeline, vae=autoencoder)


def digest_encoding_half(autoencoder: AutoencoderDA) -> dict[str, str]:
    """The settings that decide an autoencoder's latents, and digests of the weights and statistics that do."""
    weights = {name: tensor for name, tensor in autoencoder.state_dict().items() if not name.startswith(DECODING_PARTS)}
    statistics = {"detail_mean": weights.pop("detail_mean"), "detail_std": weights.pop("detail_std")}
    digests = {"weights of the encoders": digest_tensors(weights), "latent statistics": digest_tensors(statistics)}
    for name, value in autoencoder.config.items():
        if not name.startswith(("_", "decoder_")):
            digests[name] = json.dumps(value)
    return digests


def replace_parts(pipeline: DiffusionPipeline, *, vae: ModelMixin, **parts: Any) -> DiffusionPipeline:
    """A new pipeline of the same class and settings: stock pipelines count the VAE's stages when they are made.

    `vae` is moved to the dtype and device of the one before it, if there was one.
    """
    if pipeline.vae is not None:
        nn.Module.to(vae, dtype=pipeline.vae.dtype, device=pipeline.vae.device)  # diffusers' own `to` would warn

    # Made anew, from the settings that its class takes.
    settings = inspect.signature(type(pipeline).__init__).parameters.keys() & pipeline.config.keys()
    arguments = {name: pipeline.config[name] for name in settings} | pipeline.components | parts | {"vae": vae}
    replaced = type(pipeline)(**arguments)
    if replaced.transformer is not None:
        for name in backbone_of(replaced.transformer).carried:
            setattr(replaced, name, copy.copy(getattr(pipeline, name)))
    return replaced


def _check_autoencoder(pipeline: DiffusionPipeline, autoencoder: ModelMixin) -> None:
    """Refuse an autoencoder that was not made from this pipeline's VAE."""
    vae = getattr(pipeline.vae, "_orig_mod", pipeline.vae)
    load_base_class(type(vae).__name__, "the pipeline's VAE")
    if not isinstance(autoencoder, AutoencoderDA):
        name = type(autoencoder).__name__
        raise SettingsError(f"a {name} is no AutoencoderDA: make one with AutoencoderDA.from_base")
    config = autoencoder.config
    if not config.base_channels:
        raise SettingsError(
            "all latents of this autoencoder are new (base_channels=0), so a pretrained transformer cannot start from "
            "them. Use an autoencoder with a base half, or train a transformer on its latents from scratch"
        )

    # Shape and scale of the base latents.
    facts = base_facts(vae.config)
    base_factor = autoencoder.downsample_factor // config.resolution_factor
    for name, ours, theirs in (
        ("base_channels", config.base_channels, facts.latent_channels),
        ("scaling_factor", config.scaling_factor, facts.scaling_factor),
        ("shift_factor", config.shift_factor, facts.shift_factor),
        ("downsample factor / resolution factor", base_factor, downsample_factor(vae.config)),
    ):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            raise _other_vae(name, f"{ours}, the pipeline's VAE has {theirs}")

    # Their statistics, of each channel and (FLUX.2) of 2x2 patches.
    for name in ("latents_mean", "latents_std"):
        ours, theirs = config.base_config.get(name), vae.config.get(name)
        if (ours is None) != (theirs is None) or not np.allclose(ours or 0, theirs or 0, rtol=1e-4, atol=1e-6):
            raise _other_vae(name, f"{ours}, the pipeline's VAE has {theirs}")
    patches = getattr(vae, "bn", None)
    if patches is not None:
        for name in ("running_mean", "running_var"):
            theirs = getattr(patches, name).float().cpu()
            ours = getattr(autoencoder.bn, name, theirs[:0])[: len(theirs)].float().cpu()
            if len(ours) != len(theirs) or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2):
                raise _other_vae(f"{name} of 2x2 patches", "another")
    check_base_encoder(autoencoder, vae)


def _other_vae(name: str, difference: str) -> SettingsError:
    return SettingsError(
        f"the autoencoder was not made from this pipeline's VAE: its {name} is {difference}. "
        "Make it with AutoencoderDA.from_base(pipeline.vae, ...)"
    )
