"""Base autoencoders: one row of a table for each class that AutoencoderDA can upgrade.

Another class needs a row of `BASE_AUTOENCODERS`, and nothing else: no other file asks which class a base has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, tanh

Config = Mapping[str, Any]
Model = Any  # a ModelMixin of diffusers, which is imported when a class is loaded: facts of configs do not need it


def _load_autoencoder_da() -> type[Model]:
    from davae.models.autoencoder_da import AutoencoderDA  # here, because that file imports this one

    return AutoencoderDA


def _load_autoencoder_taef2() -> type[Model]:
    from davae.models.autoencoder_taef2 import AutoencoderTAEF2

    return AutoencoderTAEF2


def _encode_mode(encoder: Any, quant_conv: Any, image: Tensor) -> Tensor:
    moments = encoder(image) if quant_conv is None else quant_conv(encoder(image))
    return moments.chunk(2, dim=1)[0]


def _decode(decoder: Any, post_quant_conv: Any, hidden: Tensor) -> Tensor:
    return decoder(hidden if post_quant_conv is None else post_quant_conv(hidden))


def _run_layers(network: Any, x: Tensor) -> Tensor:
    if network.gradient_checkpointing and torch.is_grad_enabled():
        return network._gradient_checkpointing_func(network.layers, x)
    return network.layers(x)


def _drop_convolutions(encoder: Any, decoder: Any) -> tuple[int, int]:
    channels = encoder.conv_out.in_channels, decoder.conv_in.out_channels
    encoder.conv_out, decoder.conv_in = nn.Identity(), nn.Identity()
    return channels


def _drop_tiny_convolutions(encoder: Any, decoder: Any) -> tuple[int, int]:
    channels = encoder.layers[-1].in_channels, decoder.layers[0].out_channels
    encoder.layers[-1], decoder.layers[0] = nn.Identity(), nn.Identity()
    return channels


@dataclass(frozen=True)
class BaseAutoencoder:
    """One class of base autoencoder; the defaults are AutoencoderKL's."""

    load_class: Callable[[], type[Model]]
    frames: bool = False
    """Whether its own `encode` and `decode` take videos: an image is then a video of one frame."""
    nested: bool = False
    """Whether it is an AutoencoderDA, which decodes tiles on its own."""
    run_encoder: Callable[[Any, Tensor], Tensor] = lambda encoder, image: encoder(image)
    """Encoder and image -> output of its last layer."""
    encode: Callable[[Any, Any, Tensor], Tensor] = _encode_mode
    """Encoder, `quant_conv` and image [B, 3, H, W] -> the posterior's mode in the autoencoder's scale, [B, C, h, w]."""
    decode: Callable[[Any, Any, Tensor], Tensor] = _decode
    """Decoder, `post_quant_conv` and latents [B, C, h, w] -> image [B, 3, H, W], about [-1, 1]."""
    saturate: Callable[[Tensor], Tensor] = lambda latents: latents
    """What its own `decode` does to latents first."""
    drop_latent_layers: Callable[[Any, Any], tuple[int, int]] | None = _drop_convolutions
    """Takes away the encoder's last and the decoder's first layer -> channels before the one and behind the other. None
    where these layers have shortcuts or a time axis, or are two: then only linear blocks are possible."""
    contract: Callable[[Config, int, Sequence[int]], dict[str, Any]] = lambda config, channels, stages: {}
    """The base's config, latent channels, stages -> settings that its stock pipelines read of an AutoencoderDA."""


_TINY = BaseAutoencoder(
    lambda: import_module("diffusers").AutoencoderTiny,
    # The layers take and give images in [0, 1].
    run_encoder=lambda encoder, image: _run_layers(encoder, (image + 1) / 2),
    encode=lambda encoder, _, image: _run_layers(encoder, (image + 1) / 2),
    decode=lambda decoder, _, hidden: _run_layers(decoder, hidden) * 2 - 1,
    saturate=lambda latents: tanh(latents / 3) * 3,
    drop_latent_layers=_drop_tiny_convolutions,
)
BASE_AUTOENCODERS = {
    "AutoencoderKL": BaseAutoencoder(lambda: import_module("diffusers").AutoencoderKL),
    "AutoencoderTiny": _TINY,
    "AutoencoderDC": BaseAutoencoder(
        lambda: import_module("diffusers").AutoencoderDC,
        encode=lambda encoder, _, image: encoder(image),
        drop_latent_layers=None,
        # SANA's pipelines count the encoder's stages under another name.
        contract=lambda config, channels, stages: {"encoder_block_out_channels": tuple(stages)},
    ),
    "AutoencoderKLQwenImage": BaseAutoencoder(
        lambda: import_module("diffusers").AutoencoderKLQwenImage,
        frames=True,
        encode=lambda encoder, conv, image: _encode_mode(encoder, conv, image.unsqueeze(2)).squeeze(2),
        decode=lambda decoder, conv, hidden: _decode(decoder, conv, hidden.unsqueeze(2)).squeeze(2),
        drop_latent_layers=None,
        # Qwen-Image's pipelines standardise each latent channel; AutoencoderDA has done so already.
        contract=lambda config, channels, stages: {
            "z_dim": channels,
            "latents_mean": [0.0] * channels,
            "latents_std": [1.0] * channels,
        },
    ),
    "AutoencoderKLFlux2": BaseAutoencoder(
        lambda: import_module("diffusers").AutoencoderKLFlux2,
        # FLUX.2's pipelines read a batch normalisation of 2x2 patches of latents.
        contract=lambda config, channels, stages: {"batch_norm_eps": config["batch_norm_eps"]},
    ),
    "AutoencoderTAEF2": replace(_TINY, load_class=_load_autoencoder_taef2),
    "AutoencoderDA": BaseAutoencoder(
        _load_autoencoder_da,
        nested=True,
        encode=lambda encoder, _, image: encoder.encode(image).latent_dist.mode(),
        decode=lambda decoder, _, hidden: decoder.decode(hidden).sample,
        drop_latent_layers=None,
        # The pipeline is the first base's.
        contract=lambda config, channels, stages: find_base(config["base_config"]["_class_name"]).contract(
            config, channels, stages
        ),
    ),
}
"""By the name of the class, which is `_class_name` in its config."""


def find_base(name: str) -> BaseAutoencoder:
    """The row of a class of autoencoder."""
    if name not in BASE_AUTOENCODERS:
        allowed = ", ".join(BASE_AUTOENCODERS)
        raise ValueError(f"a base autoencoder of class {name} is not supported; allowed are {allowed}.")
    return BASE_AUTOENCODERS[name]


def encode_image(vae: Model, image: Tensor) -> Tensor:
    """An autoencoder's own `encode`, with the mode where it has a posterior: [B, 3, H, W] -> [B, C, h, w]."""
    frames = find_base(type(vae).__name__).frames
    (latents,) = vae.encode(image.unsqueeze(2) if frames else image, return_dict=False)
    latents = latents if isinstance(latents, Tensor) else latents.mode()  # of a posterior
    return latents.squeeze(2) if frames else latents


def decode_latents(vae: Model, latents: Tensor) -> Tensor:
    """An autoencoder's own `decode` of latents in its own scale: [B, C, h, w] -> [B, 3, H, W]."""
    frames = find_base(type(vae).__name__).frames
    (image,) = vae.decode(latents.unsqueeze(2) if frames else latents, return_dict=False)[:1]
    return image.squeeze(2) if frames else image


class BaseFacts(NamedTuple):
    """What every base autoencoder has, though configs call it differently."""

    latent_channels: int
    stages: tuple[int, ...]
    """Channels of the encoder's stages; all but the last one halve the image."""
    scaling_factor: float
    shift_factor: float


def base_facts(config: Config) -> BaseFacts:
    """The facts of a base autoencoder's config, or of an AutoencoderDA's; factor 1 and shift 0 where it has none."""
    # AutoencoderDC and AutoencoderTiny name the encoder's stages, AutoencoderKLQwenImage gives multiples.
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if stages is None:
        stages = [config["base_dim"] * multiple for multiple in config["dim_mult"]]

    return BaseFacts(
        latent_channels=config["latent_channels"] if "latent_channels" in config else config["z_dim"],
        stages=tuple(stages),
        scaling_factor=config.get("scaling_factor") or 1.0,
        shift_factor=config.get("shift_factor") or 0.0,
    )


def downsample_factor(config: Config) -> int:
    """Side of an image / side of its latents, of a base autoencoder's config or an AutoencoderDA's."""
    return 2 ** (len(base_facts(config).stages) - 1)
