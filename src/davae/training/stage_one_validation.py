"""What a run of stage 1 shows while it trains: numbers and pictures of whole held-out pictures."""

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from davae.data.pictures import to_bytes
from davae.data.sources import PictureSet
from davae.method.metrics import METRICS, compare_images
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.run.ranks import Ranks


@torch.no_grad()
def heldout_metrics(autoencoder: AutoencoderDA, pictures: PictureSet, lpips: LPIPS, ranks: Ranks) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of reconstructions of whole held-out pictures, averaged over them; the ranks share them."""

    def measure(indices: Tensor) -> Tensor:
        image = pictures.batch(indices.tolist()).to(autoencoder.device)
        reconstruction = autoencoder(image).sample.clamp(-1, 1)
        return compare_images(reconstruction, image, lpips)

    rows = ranks.map_chunks(torch.arange(len(pictures)).split(8), measure)
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return {f"heldout_{name}": value for name, value in zip(METRICS, means, strict=True)}


@torch.no_grad()
def heldout_picture(autoencoder: AutoencoderDA, pictures: PictureSet) -> UInt8[Tensor, "3 h w"]:
    """The first eight held-out pictures side by side, their reconstructions below them."""
    image = pictures.batch(range(min(8, len(pictures)))).to(autoencoder.device)
    rows = torch.stack([image, autoencoder(image).sample.float()])
    return to_bytes(rearrange(rows, "rows columns c h w -> c (rows h) (columns w)"))
