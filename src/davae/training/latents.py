"""The latents that stage 2 trains on: encoded once and kept on disk, or at every step anew."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from davae.data.cache import Entry, TensorCache
from davae.data.sources import PictureSet
from davae.models.autoencoder_da import AutoencoderDA
from davae.run.ranks import Ranks
from davae.seeds import rand, randn, sample_generators
from davae.training.caching import SHARD_BYTES, fill
from davae.training.fingerprints import model_digest

BLOCK = 16
"""Pictures that are encoded together."""


@torch.no_grad()
def expect_noise(autoencoder: AutoencoderDA, noise: float) -> None:
    """Make the detail latents' deviations those of latents with noise: std^2 becomes std^2 + noise^2, in place.

    So noisy detail latents have unit variance for the transformer, as the reference's, which measures them with the
    noise on them (METHOD 1.4). Decoding undoes it.
    """
    if noise:
        autoencoder.detail_std.copy_((autoencoder.detail_std.double().square() + noise**2).sqrt())


class Latents:
    """A set's latents in the transformer's units [C + D, h, w]: the posterior's mode, with noise if it is wanted."""

    def __init__(self, autoencoder: AutoencoderDA, *, detail_noise: float, seed: int) -> None:
        self._base_channels = autoencoder.config.base_channels
        self._noise, self._seed = detail_noise, seed
        self._std = autoencoder.detail_std.detach().cpu().view(-1, 1, 1)

    def noisy(self, latents: Float[Tensor, "b latent h w"], indices: Sequence[int]) -> Float[Tensor, "b latent h w"]:
        """With the noise on the detail latents that each picture has by its index, the same in every epoch."""
        if not self._noise:
            return latents
        base, detail = latents.split([self._base_channels, latents.shape[1] - self._base_channels], dim=1)
        noise = randn(detail.shape, sample_generators(self._seed, "noise on detail latents", indices))
        return torch.cat([base, detail + self._noise * noise / self._std], dim=1)


class CachedLatents(Latents):
    """Latents that lie in a cache, and are read when they are asked for; made by `cached_latents`."""

    def __init__(
        self, cache: TensorCache, keys: Sequence[str], autoencoder: AutoencoderDA, *, detail_noise: float, seed: int
    ) -> None:
        super().__init__(autoencoder, detail_noise=detail_noise, seed=seed)
        self._cache, self._keys = cache, keys

    def __len__(self) -> int:
        return len(self._keys)

    def batch(self, indices: Sequence[int], step: int = 0) -> Float[Tensor, "b latent h w"]:
        """Of these pictures, on the CPU; the same at every step."""
        return self.noisy(torch.stack([self._cache[self._keys[index]]["latents"] for index in indices]), indices)


class OnlineLatents(Latents):
    """Latents that are encoded when they are asked for, of pictures that may be mirrored.

    Args:
        autoencoder: on the device where it is to run.
        pictures: of the set.
        flips: mirror every other picture, left to right; which ones is drawn by their numbers in the run.
        detail_noise: as of `cached_latents`.
        seed: of the noise and of the flips.
        ranks: of the run; by default those of the environment.
    """

    def __init__(
        self,
        autoencoder: AutoencoderDA,
        pictures: PictureSet,
        *,
        flips: bool,
        detail_noise: float,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(autoencoder, detail_noise=detail_noise, seed=seed)
        self._autoencoder, self._pictures = autoencoder.eval(), pictures
        self._flips, self._ranks = flips, ranks or Ranks()

    def batch(self, indices: Sequence[int], step: int) -> Float[Tensor, "b latent h w"]:
        """Of this rank's pictures of batch number `step`, as it sees them, on the CPU."""
        image = self._pictures.batch(indices)
        if self._flips:
            samples = self._ranks.sample_numbers(step, len(indices))
            mirrored = rand(sample_generators(self._seed, "flips", samples)) < 0.5
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        return self.noisy(encode(self._autoencoder, image).cpu(), indices)


def cached_latents(
    autoencoder: AutoencoderDA,
    pictures: PictureSet,
    folder: Path,
    *,
    detail_noise: float = 0.0,
    seed: int = 0,
    ranks: Ranks | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CachedLatents:
    """The latents of all pictures, those that the cache in `folder` lacks encoded first.

    An entry is found by the picture's encoded bytes, by how the set crops and scales it, and by the autoencoder, to the
    last bit of its weights: another one is a miss. The noise is not in it.

    Args:
        autoencoder: on the device where it is to run.
        pictures: N of them.
        folder: of caches, made if it is not there.
        detail_noise: deviation of Gaussian noise on the detail latents, before standardisation; see `expect_noise`.
        seed: of the noise, which each picture has by its index, the same in every epoch.
        ranks: the processes that share the encoding; by default those of the environment.
        shard_bytes: size of the cache's files, about.
    """
    cache = TensorCache(folder, "latents", {"autoencoder": model_digest(autoencoder)})
    keys = [pictures.fingerprint(index) for index in range(len(pictures))]
    autoencoder.eval()

    def entries(indices: list[int]) -> list[Entry]:
        found: dict[int, Tensor] = {}
        for chosen in pictures.batches(indices, BLOCK):  # of one size each
            found |= dict(zip(chosen, encode(autoencoder, pictures.batch(chosen)).cpu(), strict=True))
        return [{"latents": found[index]} for index in indices]

    fill(cache, keys, entries, block=BLOCK, unit="pictures", ranks=ranks or Ranks(), shard_bytes=shard_bytes)
    return CachedLatents(cache, keys, autoencoder, detail_noise=detail_noise, seed=seed)


@torch.no_grad()
def encode(autoencoder: AutoencoderDA, image: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b latent h w"]:
    """Latents in the transformer's units, the posterior's mode, without noise, on the autoencoder's device."""
    return autoencoder.standardise(autoencoder.encode(image.to(autoencoder.device)).latent_dist.mode())
