"""The latents that stage 2 trains on: encoded once and kept on disk, or encoded anew at every step."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from davae.data.cache import Entry, TensorCache
from davae.data.sources import PictureSet
from davae.models.autoencoder_da import AutoencoderDA
from davae.run.ranks import Ranks
from davae.seeds import rand, randn, sample_generators
from davae.training.caching import SHARD_BYTES, fill_cache
from davae.training.fingerprints import digest_model

BLOCK = 16
"""Images that are encoded together."""

ReadLatents = Callable[[Sequence[int], int], Tensor]
"""(indices of images, number of the batch in the run) -> latents [B, C + D, h, w] in the transformer's units."""


@torch.no_grad()
def expect_noise(autoencoder: AutoencoderDA, noise: float) -> None:
    """Add the noise's variance to the detail latents' in place, std^2 + noise^2, so that noisy ones have variance 1.

    Decoding undoes it. The reference measures its statistics on noisy latents.
    """
    if noise:
        autoencoder.detail_std.copy_((autoencoder.detail_std.double().square() + noise**2).sqrt())


@torch.no_grad()
def encode_latents(
    autoencoder: AutoencoderDA, image: Float[Tensor, "b 3 height width"]
) -> Float[Tensor, "b latent h w"]:
    """The posterior's mode in the transformer's units, on the autoencoder's device."""
    return autoencoder.standardise(autoencoder.encode(image.to(autoencoder.device)).latent_dist.mode())


def cache_latents(
    autoencoder: AutoencoderDA,
    pictures: PictureSet,
    folder: Path,
    *,
    detail_noise: float = 0.0,
    seed: int = 0,
    ranks: Ranks | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ReadLatents:
    """Encode what the cache in `folder` lacks, and return a function that reads latents from it.

    An entry's key is the image's encoded bytes and crop; a cache belongs to one autoencoder, to the last bit of its
    weights. Noise of standard deviation `detail_noise`, before standardisation, is added to what is read.
    """
    cache = TensorCache(folder, "latents", {"autoencoder": digest_model(autoencoder)})
    keys = list(map(pictures.fingerprint, range(len(pictures))))
    autoencoder.eval()

    def encode_block(indices: list[int]) -> list[Entry]:
        # A block may hold several sizes; images of one size are encoded together.
        entries: dict[int, Entry] = {}
        for chosen in pictures.batches(indices, BLOCK):
            latents = encode_latents(autoencoder, pictures.batch(chosen)).cpu()
            for index, own in zip(chosen, latents, strict=True):
                entries[index] = {"latents": own}
        return [entries[index] for index in indices]

    fill_cache(cache, keys, encode_block, block=BLOCK, unit="pictures", ranks=ranks or Ranks(), shard_bytes=shard_bytes)
    add_noise = fix_detail_noise(autoencoder, detail_noise, seed)

    def read(indices: Sequence[int], _batch: int = 0) -> Tensor:
        return add_noise(torch.stack([cache[keys[index]]["latents"] for index in indices]), indices)

    return read


def encode_online(
    autoencoder: AutoencoderDA,
    pictures: PictureSet,
    *,
    flips: bool,
    detail_noise: float,
    seed: int,
    ranks: Ranks | None = None,
) -> ReadLatents:
    """A function that encodes latents when they are asked for, of images half of which are mirrored with `flips`."""
    autoencoder.eval()
    ranks = ranks or Ranks()
    add_noise = fix_detail_noise(autoencoder, detail_noise, seed)

    def read(indices: Sequence[int], batch: int) -> Tensor:
        image = pictures.batch(indices)
        if flips:
            # Drawn anew for every sample of the run, the same for any number of ranks.
            samples = ranks.sample_numbers(batch, len(indices))
            mirrored = rand(sample_generators(seed, "flips", samples)) < 0.5
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        return add_noise(encode_latents(autoencoder, image).cpu(), indices)

    return read


def fix_detail_noise(autoencoder: AutoencoderDA, noise: float, seed: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """A function that adds to the detail latents the noise that each image keeps in all epochs, by its index."""
    base_channels = autoencoder.config.base_channels
    std = autoencoder.detail_std.detach().cpu().view(-1, 1, 1)

    def add(latents: Tensor, indices: Sequence[int]) -> Tensor:
        if not noise:
            return latents
        # The latents are standardised, so the noise is, too.
        base, detail = latents[:, :base_channels], latents[:, base_channels:]
        drawn = randn(detail.shape, sample_generators(seed, "noise on detail latents", indices))
        return torch.cat([base, detail + noise * drawn / std], dim=1)

    return add
