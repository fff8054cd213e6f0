"""A joint decoder with widths and depths of its own, in the place of the base's: less work at the same latents.

Nearly all of a decoder's work is in its outer stages, at half and full resolution. Encoders, latents and their
statistics stay, so that a transformer that was trained on them goes on to fit.

Imports torch and diffusers only, so that this one file can lie beside weights.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import Decoder
from torch import nn


def slim_decoder(
    decoder: nn.Module,
    base_config: Mapping[str, Any],
    block_out_channels: Sequence[int] | None,
    layers_per_block: Sequence[int] | None,
) -> nn.Module:
    """A new decoder of AutoencoderKL's kind, its weights random; or `decoder` itself where both settings are None.

    Group norms have as many channels to a group as the base's, and the fewer groups. As many groups of fewer channels
    would be worse: a group of one is an instance norm, behind which no brightness is left.

    Args:
        decoder: the base's.
        base_config: of the base autoencoder, with all its settings.
        block_out_channels: channels of the stages, the outermost first, as in diffusers; None for the base's.
        layers_per_block: residual blocks of the stages less one, likewise; None for the base's.

    Raises:
        ValueError: the base has another decoder, or has not these stages.
    """
    if block_out_channels is None and layers_per_block is None:
        return decoder
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"decoder_block_out_channels, decoder_layers_per_block: a {type(decoder).__name__} has no such stages; "
            "allowed are the decoders of AutoencoderKL and AutoencoderKLFlux2. Of an upgrade of an upgrade, slim the "
            "first one"
        )
    widths, depths = stages_of(base_config, block_out_channels, layers_per_block)
    slim = Decoder(
        in_channels=base_config["latent_channels"],
        out_channels=base_config["out_channels"],
        up_block_types=tuple(base_config["up_block_types"]),
        block_out_channels=widths,
        layers_per_block=base_config["layers_per_block"],  # and cut below
        norm_num_groups=gcd(*widths),  # of any number; below, as many channels to a group as in the base
        act_fn=base_config["act_fn"],
        mid_block_add_attention=base_config["mid_block_add_attention"],
    )
    for block, depth in zip(slim.up_blocks, reversed(depths), strict=True):
        for name in ("resnets", "attentions"):
            if isinstance(layers := getattr(block, name, None), nn.ModuleList):
                setattr(block, name, layers[: depth + 1])
    for name, norm in slim.named_modules():
        if isinstance(norm, nn.GroupNorm):
            theirs = decoder.get_submodule(name)
            norm.num_groups = norm.num_channels * theirs.num_groups // theirs.num_channels
    return slim


def stages_of(
    base_config: Mapping[str, Any], block_out_channels: Sequence[int] | None, layers_per_block: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and depths of a slim decoder's stages, the base's own where None is given; arguments as `slim_decoder`'s.

    Raises:
        ValueError: the base has not these stages.
    """
    widest = base_config.get("decoder_block_out_channels") or base_config["block_out_channels"]  # FLUX.2's own setting
    groups, deepest = base_config["norm_num_groups"], base_config["layers_per_block"]
    widths, depths = tuple(block_out_channels or widest), tuple(layers_per_block or [deepest] * len(widest))
    units = [most // groups for most in widest]
    if len(widths) != len(widest) or any(
        not 0 < width <= most or width % unit for width, most, unit in zip(widths, widest, units, strict=True)
    ):
        raise ValueError(
            f"decoder_block_out_channels={list(widths)}: allowed are {len(widest)} widths, the outermost stage first, "
            f"up to the base's {list(widest)} and in multiples of {units}, the channels in a group of its norms"
        )
    if len(depths) != len(widest) or any(not 0 <= depth <= deepest for depth in depths):
        raise ValueError(
            f"decoder_layers_per_block={list(depths)}: allowed are {len(widest)} numbers from 0 to the base's "
            f"{deepest}, the outermost stage first; a stage has one residual block more than its number"
        )
    return widths, depths


@torch.no_grad()
def slimmed(
    autoencoder: ModelMixin,
    block_out_channels: Sequence[int] = (),
    layers_per_block: Sequence[int] = (),
) -> ModelMixin:
    """An AutoencoderDA of the same encoders, latents and statistics, its joint decoder narrower and not trained.

    What the two decoders have in the same shapes is copied: at the base's own widths and depths, all of it. The rest is
    random; `davae.method.slim_start` has a better start.

    Args:
        autoencoder: of an AutoencoderKL or AutoencoderKLFlux2, its joint decoder as the base's; left as it is.
        block_out_channels: channels of the decoder's stages, the outermost first: none above the base's, in multiples
            of the channels in a group of its norms; () for the base's.
        layers_per_block: residual blocks of each stage less one, none above the base's; () for the base's.

    Raises:
        ValueError: the base has another decoder, or has not these stages; or the joint decoder is slim already.
    """
    # `_use_default_values` names the arguments that were left out: `from_config` would ignore what is given for them.
    config = {name: value for name, value in autoencoder.config.items() if name != "_use_default_values"}
    own = ("decoder_block_out_channels", "decoder_layers_per_block")
    has = {name: list(config[name]) for name in own if config[name] is not None}
    if has:
        raise ValueError(f"the joint decoder is slim already, {has}: start from one with the full decoder")
    given = {name: value or None for name, value in zip(own, (block_out_channels, layers_per_block), strict=True)}
    slim = type(autoencoder).from_config({**config, **given})
    nn.Module.to(slim, dtype=autoencoder.dtype, device=autoencoder.device)
    here, weights = slim.state_dict(), autoencoder.state_dict()
    slim.load_state_dict({**here, **{n: w for n, w in weights.items() if n in here and w.shape == here[n].shape}})
    return slim.train(autoencoder.training)
