"""2x2 space-to-channel, which some pipelines do before the transformer sees the latents."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def pack(latents: Float[Tensor, "b latent h w"]) -> Float[Tensor, "b tokens features"]:
    """[B, C, h, w] -> [B, h/2 w/2, 4 C], channels outermost: base channels stay in front of detail channels."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(
    tokens: Float[Tensor, "b tokens features"], height: int, width: int
) -> Float[Tensor, "b latent height width"]:
    """The inverse of `pack`, to latents of `height` x `width` positions."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, w=width // 2, p=2, q=2)


def grid(height: int, width: int, device: torch.device) -> Float[Tensor, "tokens 2"]:
    """Row and column of each of `height` x `width` tokens, row by row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], dim=-1).flatten(0, 1).to(device, torch.float32)
