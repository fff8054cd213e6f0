"""Small AutoencoderDAs on several bases, and images for them."""

import itertools

import torch
from diffusers import AutoencoderKL
from torch import Tensor

import tiny
from davae import AutoencoderDA


def quantised_kl() -> AutoencoderKL:
    """An `AutoencoderKL` of Stable Diffusion 1's kind: quant convolutions, attention in the middle, no shift factor."""
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 8), "norm_num_groups": 4, "scaling_factor": 0.18215, "shift_factor": None}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**settings, **types).eval()


BASES = {"kl": tiny.tiny_vae, "quantised kl": quantised_kl, "tiny": tiny.tiny_taesd, "taef2": tiny.tiny_taef2}
KINDS = list(itertools.product(BASES, (True, False)))
"""Every base with and without linear blocks."""


def images(count: int = 2, side: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, side, side, generator=generator) * 2 - 1).to(dtype)


def trained(base: str, linear_blocks: bool = True, **settings) -> AutoencoderDA:
    """As after training, in float64: nothing is zero any more."""
    detail_channels = 8 if linear_blocks else 4  # the paper's shortcut repeats channels a whole number of times
    autoencoder = AutoencoderDA.from_base(
        BASES[base]().double(), detail_channels=detail_channels, linear_blocks=linear_blocks, **settings
    )
    disturb_blocks(autoencoder)
    return autoencoder


@torch.no_grad()
def disturb_blocks(autoencoder: AutoencoderDA) -> None:
    """Add noise to the two new blocks."""
    generator = torch.Generator().manual_seed(1)
    for block in (autoencoder.detail_downsample, autoencoder.detail_upsample):
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
