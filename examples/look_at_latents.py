"""Look at the two halves of the latents: python examples/look_at_latents.py AUTOENCODER PICTURE."""

import sys
from pathlib import Path

import torch

from davae import AutoencoderDA, channel_group_mean, detail_alignment_loss
from davae.data.pictures import read_picture


@torch.no_grad()
def main(folder: str, picture: str) -> None:
    autoencoder = AutoencoderDA.from_pretrained(folder)
    image = read_picture(Path(picture).read_bytes(), picture)[None] / 127.5 - 1
    factor = autoencoder.downsample_factor
    image = image[..., : image.shape[-2] // factor * factor, : image.shape[-1] // factor * factor]
    latents = autoencoder.to_units(autoencoder.encode(image).latent_dist.mode())
    base, detail = autoencoder.split(latents)
    means = channel_group_mean(detail, autoencoder.config.base_channels)
    print(f"picture {tuple(image.shape)}, base {tuple(base.shape)}, detail {tuple(detail.shape)}")
    print(f"deviation of base {base.std():.3f}, of detail {detail.std():.3f}, of its group means {means.std():.3f}")
    print(f"alignment loss {detail_alignment_loss(detail, base):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
