"""Upgrade a pipeline: python examples/upgrade_pipeline.py BASE OUT.

BASE is a pipeline's folder or its name on the Hub. The detail half is untrained: what OUT makes is a coarse version of
the base's picture, at twice the side length, until both stages of training have run.
"""

import sys

from diffusers import DiffusionPipeline

from davae import AutoencoderDA, upgrade


def main(base: str, out: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(base)
    autoencoder = AutoencoderDA.from_base(pipeline.vae, detail_channels=pipeline.vae.config.latent_channels)
    upgraded = upgrade(pipeline, autoencoder)
    upgraded.save_pretrained(out)
    print(f"{type(upgraded).__name__}: default size {upgraded.default_sample_size * upgraded.vae_scale_factor} px")


if __name__ == "__main__":
    main(*sys.argv[1:])
