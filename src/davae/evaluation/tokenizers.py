"""Autoencoders as tokenizers of pictures: different ones behind one interface, so that they can be measured alike.

A `Tokenizer` is a way of reconstructing (`evaluation.reconstruction.Way`) that really goes through its latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import (
    BASE_AUTOENCODERS,
    base_facts,
    decode_latents,
    downsample_factor,
    encode_image,
)
from davae.pipelines.loading import LOADING_ERRORS, load_model
from davae.seeds import generator


@dataclass(frozen=True)
class Tokenizer:
    """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, channels, H / factor, W / factor] -> pictures, about [-1, 1]."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    factor: int
    """Downsample factor: side of the picture that is measured / side of the latents."""
    channels: int
    """Of the latents."""

    def __call__(self, image: Tensor) -> Tensor:
        """The reconstruction of pictures, through their latents."""
        return self.decode(self.encode(image))

    def brief(self, patch: int) -> str:
        """FXcYpZ: downsample factor, channels, and a transformer's patch size."""
        return f"f{self.factor}c{self.channels}p{patch}"

    def tokens(self, size: int, patch: int) -> int | None:
        """Tokens of a square picture of `size` px; None where the patch does not divide the latents."""
        side, rest = divmod(size, self.factor * patch)
        return None if rest else side**2


def base_at_full_size(vae: ModelMixin) -> Tokenizer:
    """The base autoencoder on the picture itself: the bound that s^2 times the tokens would buy."""
    return stock(vae)


def base_enlarged(vae: ModelMixin, autoencoder: AutoencoderDA) -> Tokenizer:
    """The base on the picture at 1/s of its size, enlarged with bicubic: what equal tokens give without davae."""
    small, factor = stock(vae), autoencoder.config.resolution_factor
    return Tokenizer(
        encode=lambda image: small.encode(autoencoder.base_picture(image)),
        decode=lambda latents: F.interpolate(
            small.decode(latents).float().clamp(-1, 1), scale_factor=factor, mode="bicubic"
        ),
        factor=small.factor * factor,
        channels=small.channels,
    )


def base_unshuffled(vae: ModelMixin, *, factor: int = 2) -> Tokenizer:
    """The base autoencoder's latents of the picture itself, s x s positions to channels ("simple" in METHOD 2.2).

    [B, C, H / f, W / f] -> [B, s^2 C, H / sf, W / sf] and back, s = `factor`: the pictures are those of the base at
    full size, at the tokens of 1/s of it; what it costs is channels.
    """
    full = stock(vae)
    return Tokenizer(
        encode=lambda image: F.pixel_unshuffle(full.encode(image), factor),
        decode=lambda latents: full.decode(F.pixel_shuffle(latents, factor)),
        factor=factor * full.factor,
        channels=factor**2 * full.channels,
    )


def upgraded(autoencoder: AutoencoderDA) -> Tokenizer:
    """The AutoencoderDA, with the mode of its posterior."""
    return stock(autoencoder)


def detail_zeroed(autoencoder: AutoencoderDA) -> Tokenizer:
    """The AutoencoderDA with zeros for its detail latents, before standardisation: what detail dropout decodes."""
    mean, deviation = (b.view(1, -1, 1, 1) for b in (autoencoder.detail_mean, autoencoder.detail_std))
    return _with_detail(autoencoder, lambda detail: (-mean / deviation).to(detail).expand_as(detail))


def detail_randomised(autoencoder: AutoencoderDA, *, seed: int = 0) -> Tokenizer:
    """The AutoencoderDA with Gaussian noise for its detail latents, of each channel's own mean and deviation.

    Every batch of one shape gets the same noise.
    """
    return _with_detail(
        autoencoder,
        lambda detail: torch.randn(detail.shape, generator=generator(seed, "randomised detail")).to(detail),
    )


def _with_detail(autoencoder: AutoencoderDA, replacement: Callable[[Tensor], Tensor]) -> Tokenizer:
    """The AutoencoderDA that decodes `replacement`(detail latents, in units) in the place of its detail latents."""
    if not autoencoder.config.base_channels:
        raise SettingsError("all latents of this autoencoder are new: without them nothing is left to decode")
    whole = stock(autoencoder)

    def decode(latents: Tensor) -> Tensor:
        base, detail = autoencoder.split(autoencoder.to_units(latents))
        return whole.decode(autoencoder.from_units(torch.cat([base, replacement(detail)], dim=1)))

    return replace(whole, decode=decode)


def stock(autoencoder: ModelMixin) -> Tokenizer:
    """Any autoencoder of `BASE_AUTOENCODERS` on the picture itself, with the mode of its posterior where it has one."""
    return Tokenizer(
        encode=lambda image: encode_image(autoencoder, image),
        # Not the model's own forward: AutoencoderTiny's rounds the latents to bytes in between.
        decode=lambda latents: decode_latents(autoencoder, latents),
        factor=downsample_factor(autoencoder.config),
        channels=base_facts(autoencoder.config).latent_channels,
    )


def load_tokenizer(folder: Path, *, device: str = "cpu") -> Tokenizer:
    """The tokenizer of an autoencoder's folder, or of a pipeline's, whose VAE is taken; its config says of which class.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds no diffusers model.
        SettingsError: it holds one of a class that is not in `BASE_AUTOENCODERS`.
    """
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no autoencoder: it has no config.json; give a save_pretrained folder")
    try:
        name = AutoencoderDA.load_config(folder).get("_class_name")
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {error}") from error
    if name not in BASE_AUTOENCODERS:
        raise SettingsError(f"{folder} holds a {name}; allowed are {', '.join(BASE_AUTOENCODERS)}")
    return stock(load_model(BASE_AUTOENCODERS[name].load_class(), folder, device=device))


def load_tokenizers(folders: Sequence[Path], *, device: str = "cpu") -> dict[str, Tokenizer]:
    """`load_tokenizer` of each folder, by `name_folders`."""
    return {name: load_tokenizer(folder, device=device) for name, folder in name_folders(folders).items()}


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by name: the last two parts of the path, or more where two folders would have the same name.

    Raises:
        SettingsError: a folder was given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(2, 1 + max(map(len, parts), default=0)):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    if folders:
        raise SettingsError(f"{', '.join(map(str, folders))}: a folder was given twice; give each once")
    return {}


def facts(tokenizer: Tokenizer, *, size: int, patch: int, tokens: int | None) -> dict[str, Any]:
    """What a tokenizer costs at `size` px, as JSON values.

    Args:
        tokenizer: the one asked about.
        size: side of the pictures in pixels.
        patch: a transformer's patch size.
        tokens: a number of tokens that the others have; "patch_at_equal_tokens" is the patch that gives as many, if
            there is one. The paper's Table 2 compares at such patches: f8c4p4 beside f32c128p1.
    """
    patches = range(1, size // tokenizer.factor + 1)
    equal = [p for p in patches if tokens is not None and tokenizer.tokens(size, p) == tokens]
    return {
        "brief": tokenizer.brief(patch),
        "downsample_factor": tokenizer.factor,
        "channels": tokenizer.channels,
        "numbers_per_picture": tokenizer.channels * (size // tokenizer.factor) ** 2,
        "numbers_per_pixel": tokenizer.channels / tokenizer.factor**2,
        "tokens": tokenizer.tokens(size, patch),
        "patch_at_equal_tokens": equal[0] if equal else None,
    }
