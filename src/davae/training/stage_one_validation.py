"""What a run of stage 1 shows while it trains: metrics and reconstructions of whole held-out images."""

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from davae.data.pictures import to_bytes, write_png
from davae.data.sources import PictureSet
from davae.method.metrics import METRICS, compare_images
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.run import faults
from davae.run.ranks import Ranks
from davae.training.state import TrainingState


def evaluate_heldout(
    state: TrainingState, autoencoder: AutoencoderDA, heldout: PictureSet, lpips: LPIPS
) -> dict[str, float]:
    """Log the metrics, draw pictures/STEP.png, and return the metrics."""
    faults.at("eval")
    values = heldout_metrics(autoencoder, heldout, lpips, state.ranks)
    state.log(values)

    # All ranks draw, as sharded models need; rank 0 writes.
    path, picture = state.record.folder / "pictures" / f"{state.step:08d}.png", heldout_picture(autoencoder, heldout)
    state.ranks.on_first(lambda: write_png(path, picture))
    return values


@torch.no_grad()
def heldout_metrics(autoencoder: AutoencoderDA, heldout: PictureSet, lpips: LPIPS, ranks: Ranks) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of reconstructions of whole held-out images, averaged over them; the ranks share them."""

    def measure(indices: Tensor) -> Tensor:
        image = heldout.batch(indices.tolist()).to(autoencoder.device)
        reconstruction = autoencoder(image).sample.clamp(-1, 1)
        return compare_images(reconstruction, image, lpips)

    rows = ranks.map_chunks(torch.arange(len(heldout)).split(8), measure)
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return {f"heldout_{name}": value for name, value in zip(METRICS, means, strict=True)}


@torch.no_grad()
def heldout_picture(autoencoder: AutoencoderDA, heldout: PictureSet) -> UInt8[Tensor, "3 h w"]:
    """The first eight held-out images side by side, their reconstructions below them."""
    image = heldout.batch(range(min(8, len(heldout)))).to(autoencoder.device)
    rows = torch.stack([image, autoencoder(image).sample.float()])
    return to_bytes(rearrange(rows, "rows columns c h w -> c (rows h) (columns w)"))
