"""Base autoencoders: what AutoencoderDA must know of each class, and what stock pipelines read of its place.

Imports torch and diffusers only, so that it can lie beside weights, with `davae.models.autoencoder_da`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_dc import Encoder as EncoderDC
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageDecoder3d, QwenImageEncoder3d
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderTiny, EncoderTiny
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

BASE_CLASSES: dict[str, type[ModelMixin]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
    "AutoencoderKLQwenImage": AutoencoderKLQwenImage,
    "AutoencoderKLFlux2": AutoencoderKLFlux2,
}
OWN_CLASSES = ("AutoencoderTAEF2", "AutoencoderDA")
"""The base classes outside diffusers: one in `davae.models.autoencoder_taef2`, and what an upgraded pipeline has."""
LINEAR_ONLY = ("AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderDA")
"""Their layers next to the latents have shortcuts or a time axis, or are two, and cannot be dropped."""


def base_class(name: str) -> type[ModelMixin]:
    """The class of a base autoencoder by its name.

    Raises:
        ValueError: no base autoencoder is called so; the message names those that are.
    """
    if name in OWN_CLASSES:  # of davae: here, for one of them imports this file
        from davae.models.autoencoder_da import AutoencoderDA
        from davae.models.autoencoder_taef2 import AutoencoderTAEF2

        return AutoencoderDA if name == "AutoencoderDA" else AutoencoderTAEF2
    if name not in BASE_CLASSES:
        allowed = ", ".join((*BASE_CLASSES, *OWN_CLASSES))
        raise ValueError(f"a base autoencoder of class {name} is not supported; allowed are {allowed}.")
    return BASE_CLASSES[name]


@dataclass(frozen=True)
class BaseFacts:
    """What every base autoencoder has, though each class's config calls it otherwise."""

    latent_channels: int
    """C."""
    stages: tuple[int, ...]
    """Channels of the encoder's stages; one less than these halve the picture."""
    scaling_factor: float
    """1 where the config has none."""
    shift_factor: float
    """0 where the config has none."""


def base_facts(config: Mapping[str, Any]) -> BaseFacts:
    """The facts of a base autoencoder's config, or of an AutoencoderDA's."""
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if stages is None:
        stages = [config["base_dim"] * multiple for multiple in config["dim_mult"]]
    return BaseFacts(
        latent_channels=config["latent_channels"] if "latent_channels" in config else config["z_dim"],
        stages=tuple(stages),
        scaling_factor=config.get("scaling_factor") or 1.0,
        shift_factor=config.get("shift_factor") or 0.0,
    )


def downsample_factor(config: Mapping[str, Any]) -> int:
    """Side of a picture / side of its latents, of a base autoencoder's config or an AutoencoderDA's."""
    return 2 ** (len(base_facts(config).stages) - 1)


def contract(config: Mapping[str, Any], *, latent_channels: int, stages: Sequence[int]) -> dict[str, Any]:
    """What the stock pipelines of a base autoencoder read of its config, for an AutoencoderDA in its place.

    SANA's count the encoder's stages under another name; Qwen-Image's want statistics of each latent channel, which
    are 0 and 1 here, for AutoencoderDA standardises by itself; FLUX.2's want a batch normalisation of 2x2 patches.
    """
    given = {name for name, value in config.items() if value is not None}  # an AutoencoderDA's config has all names
    if "encoder_block_out_channels" in given and ("block_out_channels" not in given or "resolution_factor" in given):
        return {"encoder_block_out_channels": tuple(stages)}
    if "z_dim" in given:
        return {
            "z_dim": latent_channels,
            "latents_mean": [0.0] * latent_channels,
            "latents_std": [1.0] * latent_channels,
        }
    if "batch_norm_eps" in given:
        return {"batch_norm_eps": config["batch_norm_eps"]}
    return {}


def drop_latent_layers(encoder: nn.Module, decoder: nn.Module) -> tuple[int, int]:
    """Take away the encoder's last and the decoder's first layer; channels before the one and behind the other."""
    if isinstance(encoder, EncoderTiny):
        last, first = encoder.layers[-1], decoder.layers[0]
        encoder.layers[-1] = nn.Identity()
        decoder.layers[0] = nn.Identity()  # type: ignore[assignment]
    else:
        last, first = encoder.conv_out, decoder.conv_in
        encoder.conv_out, decoder.conv_in = nn.Identity(), nn.Identity()
    return last.in_channels, first.out_channels


def features(encoder: nn.Module, sample: Tensor) -> Tensor:
    """What the encoder's last layer returns, or what it is given where that layer was dropped."""
    # AutoencoderTiny's networks see pictures in [0, 1]; calling its layers leaves that to us.
    return encoder.layers(sample.add(1).div(2)) if isinstance(encoder, EncoderTiny) else encoder(sample)


def encode_mode(encoder: nn.Module, quant_conv: nn.Module | None, sample: Tensor) -> Tensor:
    """The mode of the posterior, in the autoencoder's own scale: [B, 3, H, W] -> [B, C, h, w]."""
    if isinstance(encoder, AutoencoderMixin):  # the encoding half of an AutoencoderDA: the upgrade of an upgrade
        return encoder.encode(sample).latent_dist.mode()
    if isinstance(encoder, QwenImageEncoder3d):  # of videos: a picture is one frame
        assert quant_conv is not None
        return quant_conv(encoder(sample.unsqueeze(2))).squeeze(2).chunk(2, dim=1)[0]
    hidden = features(encoder, sample)
    if isinstance(encoder, EncoderTiny | EncoderDC):
        return hidden
    return (hidden if quant_conv is None else quant_conv(hidden)).chunk(2, dim=1)[0]


def decode_pixels(decoder: nn.Module, post_quant_conv: nn.Module | None, hidden: Tensor) -> Tensor:
    """The decoder behind its convolution of the latents, if there is one: [B, C, h, w] -> [B, 3, H, W], about [-1, 1].

    Tiny's clamp of its latents is left to the caller.
    """
    if isinstance(decoder, AutoencoderMixin):  # the decoding half of an AutoencoderDA
        return decoder.decode(hidden).sample
    if isinstance(decoder, QwenImageDecoder3d):
        frame = hidden.unsqueeze(2)
        return decoder(frame if post_quant_conv is None else post_quant_conv(frame)).squeeze(2)
    if post_quant_conv is not None:
        hidden = post_quant_conv(hidden)
    return decoder.layers(hidden).mul(2).sub(1) if isinstance(decoder, DecoderTiny) else decoder(hidden)


def decode_base(vae: ModelMixin, latents: Tensor) -> Tensor:
    """What a base autoencoder's own `decode` makes of latents [B, C, h, w] in its own scale: [B, 3, H, W]."""
    if isinstance(vae, AutoencoderKLQwenImage):
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)
    return vae.decode(latents, return_dict=False)[0]


def refuse_newer(kind: type[ModelMixin], config: Mapping[str, Any]) -> None:
    """Check that a class knows all settings of a config: what it ignored might be what the weights were made for.

    Raises:
        ValueError: it does not.
    """
    known = inspect.signature(kind.__init__).parameters
    if foreign := sorted(name for name in config if not name.startswith("_") and name not in known):
        raise ValueError(
            f"this {kind.__name__} was saved by a newer davae: its config has {', '.join(foreign)}, which this version "
            "does not know. Update davae (of a portable folder: take the code beside its weights)"
        )
