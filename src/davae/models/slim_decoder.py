"""A joint decoder with widths and depths of its own, in the place of the base's: less work at the same latents.

Nearly all of a decoder's work is in its outer stages, at half and full resolution. Encoders, latents and their
statistics stay, so a transformer that was trained on them still fits.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any

from diffusers.models.autoencoders.vae import Decoder
from torch import nn


def slim_decoder(
    decoder: nn.Module,
    base_config: Mapping[str, Any],
    block_out_channels: Sequence[int] | None,
    layers_per_block: Sequence[int] | None,
) -> nn.Module:
    """A new decoder of AutoencoderKL's kind with random weights; or `decoder` itself where both settings are None.

    A group of a norm keeps its number of channels. If the number of groups stayed, narrow layers would have groups of
    one channel, an instance norm, which removes all brightness.
    """
    if block_out_channels is None and layers_per_block is None:
        return decoder
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"decoder_block_out_channels, decoder_layers_per_block: a {type(decoder).__name__} has no such stages; "
            "allowed are the decoders of AutoencoderKL and AutoencoderKLFlux2. Slim the first upgrade, not a second one"
        )

    widths, depths = _choose_stages(base_config, block_out_channels, layers_per_block)
    slim = Decoder(
        in_channels=base_config["latent_channels"],
        out_channels=base_config["out_channels"],
        up_block_types=tuple(base_config["up_block_types"]),
        block_out_channels=widths,
        layers_per_block=base_config["layers_per_block"],
        norm_num_groups=gcd(*widths),
        act_fn=base_config["act_fn"],
        mid_block_add_attention=base_config["mid_block_add_attention"],
    )

    # diffusers' Decoder has one depth for all stages, and one number of groups for all norms.
    for block, depth in zip(slim.up_blocks, reversed(depths), strict=True):
        block.resnets = block.resnets[: depth + 1]
        if isinstance(getattr(block, "attentions", None), nn.ModuleList):
            block.attentions = block.attentions[: depth + 1]
    for name, norm in slim.named_modules():
        if isinstance(norm, nn.GroupNorm):
            base_norm = decoder.get_submodule(name)
            norm.num_groups = norm.num_channels * base_norm.num_groups // base_norm.num_channels
    return slim


def _choose_stages(
    base_config: Mapping[str, Any], block_out_channels: Sequence[int] | None, layers_per_block: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # The base's own where None is given; FLUX.2's decoder has widths of its own.
    widest = base_config.get("decoder_block_out_channels") or base_config["block_out_channels"]
    deepest = base_config["layers_per_block"]
    widths, depths = tuple(block_out_channels or widest), tuple(layers_per_block or [deepest] * len(widest))

    # Whole groups of the base's norms, and not more of them.
    units = [most // base_config["norm_num_groups"] for most in widest]
    if len(widths) != len(widest) or any(
        not 0 < width <= most or width % unit for width, most, unit in zip(widths, widest, units, strict=True)
    ):
        raise ValueError(
            f"decoder_block_out_channels={list(widths)}: allowed are {len(widest)} widths, the outermost stage first, "
            f"up to the base's {list(widest)} and in multiples of {units}, the channels in a group of its norms"
        )
    if len(depths) != len(widest) or not all(0 <= depth <= deepest for depth in depths):
        raise ValueError(
            f"decoder_layers_per_block={list(depths)}: allowed are {len(widest)} numbers from 0 to the base's "
            f"{deepest}, the outermost stage first; a stage has one residual block more than its number"
        )
    return widths, depths
