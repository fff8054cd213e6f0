"""Autoencoders as tokenizers of images: different ones behind one interface, so that they are measured alike."""

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
from davae.models.base_autoencoders import base_facts, decode_latents, downsample_factor, encode_image
from davae.pipelines.autoencoders import load_base_vae
from davae.seeds import generator


@dataclass(frozen=True)
class Tokenizer:
    """Images [B, 3, H, W] in [-1, 1] -> latents [B, channels, H / factor, W / factor] -> images, about [-1, 1]."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    factor: int
    channels: int

    def __call__(self, image: Tensor) -> Tensor:
        """The reconstruction of images, through their latents."""
        return self.decode(self.encode(image))

    def count_tokens(self, size: int, patch: int) -> int | None:
        """Tokens of a square image of `size` px; None where the patch does not divide the latents."""
        side, rest = divmod(size, self.factor * patch)
        return None if rest else side**2

    def count_cost(self, *, size: int, patch: int, equal_tokens: int | None) -> dict[str, Any]:
        """Latents and tokens at `size` px and a transformer's `patch`, as JSON values; "brief" is fXcYpZ.

        "patch_at_equal_tokens" is the patch that gives `equal_tokens`, if there is one: the paper's Table 2 compares
        tokenizers at such patches, f8c4p4 beside f32c128p1.
        """
        equal_patch = None
        if equal_tokens is not None:
            patches = range(1, size // self.factor + 1)
            equal_patch = next((p for p in patches if self.count_tokens(size, p) == equal_tokens), None)

        return {
            "brief": f"f{self.factor}c{self.channels}p{patch}",
            "downsample_factor": self.factor,
            "channels": self.channels,
            "numbers_per_picture": self.channels * (size // self.factor) ** 2,
            "numbers_per_pixel": self.channels / self.factor**2,
            "tokens": self.count_tokens(size, patch),
            "patch_at_equal_tokens": equal_patch,
        }


def make_tokenizer(autoencoder: ModelMixin) -> Tokenizer:
    """Any autoencoder of `BASE_AUTOENCODERS` on the image as it is, with the posterior's mode if it has a posterior."""
    return Tokenizer(
        encode=lambda image: encode_image(autoencoder, image),
        # Not the model's own forward: AutoencoderTiny's rounds the latents to bytes in between.
        decode=lambda latents: decode_latents(autoencoder, latents),
        factor=downsample_factor(autoencoder.config),
        channels=base_facts(autoencoder.config).latent_channels,
    )


def enlarge_base(vae: ModelMixin, autoencoder: AutoencoderDA) -> Tokenizer:
    """The base on the image at 1/s of its size, enlarged with bicubic: the same tokens without davae."""
    base, factor = make_tokenizer(vae), autoencoder.config.resolution_factor

    def decode(latents: Tensor) -> Tensor:
        image = base.decode(latents).float().clamp(-1, 1)
        return F.interpolate(image, scale_factor=factor, mode="bicubic")

    return Tokenizer(
        encode=lambda image: base.encode(autoencoder.base_picture(image)),
        decode=decode,
        factor=base.factor * factor,
        channels=base.channels,
    )


def unshuffle_base(vae: ModelMixin, *, factor: int = 2) -> Tokenizer:
    """The base at full size with its latents unshuffled: s x s positions become channels, s = `factor`.

    [B, C, H / f, W / f] -> [B, s^2 C, H / sf, W / sf] and back: the reconstructions of the base at full size, at the
    tokens of 1/s of it, for s^2 times the channels.
    """
    base = make_tokenizer(vae)
    return Tokenizer(
        encode=lambda image: F.pixel_unshuffle(base.encode(image), factor),
        decode=lambda latents: base.decode(F.pixel_shuffle(latents, factor)),
        factor=factor * base.factor,
        channels=factor**2 * base.channels,
    )


def zero_detail(autoencoder: AutoencoderDA) -> Tokenizer:
    """The AutoencoderDA with zeros for its detail latents, before standardisation, as detail dropout decodes."""
    zero = (-autoencoder.detail_mean / autoencoder.detail_std).view(1, -1, 1, 1)
    return _replace_detail(autoencoder, lambda detail: zero.to(detail).expand_as(detail))


def randomise_detail(autoencoder: AutoencoderDA, *, seed: int = 0) -> Tokenizer:
    """The AutoencoderDA with Gaussian noise for its detail latents, with each channel's own mean and deviation.

    Every batch of one shape gets the same noise.
    """

    def draw(detail: Tensor) -> Tensor:
        return torch.randn(detail.shape, generator=generator(seed, "randomised detail")).to(detail)

    return _replace_detail(autoencoder, draw)


def _replace_detail(autoencoder: AutoencoderDA, replacement: Callable[[Tensor], Tensor]) -> Tokenizer:
    """The AutoencoderDA that decodes `replacement`(detail latents, in units) in place of its detail latents."""
    if not autoencoder.config.base_channels:
        raise SettingsError("all latents of this autoencoder are new: without them nothing is left to decode")
    tokenizer = make_tokenizer(autoencoder)

    def decode(latents: Tensor) -> Tensor:
        base, detail = autoencoder.split(autoencoder.to_units(latents))
        units = torch.cat([base, replacement(detail)], dim=1)
        return tokenizer.decode(autoencoder.from_units(units))

    return replace(tokenizer, decode=decode)


def load_tokenizer(folder: Path, *, device: str = "cpu") -> Tokenizer:
    """The tokenizer of an autoencoder's folder, or of the VAE in a pipeline's folder.

    Raises:
        CheckpointError: the folder is missing, damaged, or holds no diffusers model.
        SettingsError: it holds a class that davae does not know.
    """
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise CheckpointError(f"{folder} is no autoencoder: it has no config.json; give a save_pretrained folder")
    return make_tokenizer(load_base_vae(str(folder), device=device))


def name_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by name: the last two parts of the path, or more where two folders would have the same name.

    Raises:
        SettingsError: a folder was given twice.
    """
    # Equal paths would never get different names.
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise SettingsError(f"{', '.join(map(str, folders))}: a folder was given twice; give each once")

    depth = 2
    named: dict[str, Path] = {}
    while len(named) < len(folders):
        named = {"/".join(path.parts[-depth:]): folder for path, folder in zip(paths, folders, strict=True)}
        depth += 1
    return named
