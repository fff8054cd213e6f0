"""How much noise on their latents the decoders forgive: KID of noisy reconstructions against their originals.

    python recipes/small_pair/measure_robustness.py src/davae/assets/upgrade --count 160

prints KID x 1000 (EfficientNet-Lite0); noise is in units, where every latent channel has deviation 1. A transformer's
latents are never exact, so this bounds the quality of generated images.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from davae import assets, demo
from davae.data.pictures import to_bytes
from davae.data.sources import open_pictures
from davae.evaluation.generation import extract_features
from davae.method.metrics import kid
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.seeds import generator


@torch.no_grad()
def main(
    autoencoder: Path,
    base: Annotated[str, typer.Option(help="The base pipeline.")] = str(assets.base_pipeline()),
    count: Annotated[int, typer.Option(help="Pictures, evenly spread over the set.")] = 160,
) -> None:
    """Measure both decoders."""
    vae = load_base_vae(base)
    ours = load_autoencoder(autoencoder, base=vae)
    channels = ours.config.base_channels
    pictures = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    batches = [pictures.batch(indices.tolist()) for indices in torch.arange(len(pictures)).split(16)]
    real = extract_features([picture for batch in batches for picture in to_bytes(batch)], side=demo.SIZE)
    clean = torch.cat([ours.to_units(ours.encode(batch).latent_dist.mode()) for batch in batches])
    noise = torch.randn(clean.shape, generator=generator(0, "robustness"))

    def distance(base_noise: float, detail_noise: float, *, joint: bool) -> float:
        sizes = torch.tensor([channels, clean.shape[1] - channels])
        level = torch.tensor([base_noise, detail_noise]).repeat_interleave(sizes).view(1, -1, 1, 1)
        latents = ours.from_units(clean + level * noise)
        made: list[Tensor] = []
        for batch in latents.split(16):
            decoded = ours.decode(batch).sample if joint else vae.decode(batch[:, :channels]).sample
            made += list(to_bytes(decoded)) if joint else [demo.enlarge(picture) for picture in to_bytes(decoded)]
        return 1000 * kid(extract_features(made, side=demo.SIZE), real)

    for level in (0.0, 0.15, 0.3):
        typer.echo(f"base + bicubic, base noise {level:4.2f}: {distance(level, 0, joint=False):7.2f}")
    for base_noise, detail_noise in ((0.0, 0.0), (0.15, 0.0), (0.0, 0.15), (0.0, 0.3), (0.3, 0.3)):
        found = distance(base_noise, detail_noise, joint=True)
        typer.echo(f"joint decoder, base noise {base_noise:4.2f}, detail noise {detail_noise:4.2f}: {found:7.2f}")


if __name__ == "__main__":
    typer.run(main)
