"""2x2 space-to-channel, which some pipelines do before the transformer sees the latents."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from davae.backbones.backbone import Latents, Model, Sigma


def pack(latents: Latents) -> Float[Tensor, "b tokens features"]:
    """[B, C, h, w] -> [B, h/2 w/2, 4 C], channels outermost: base channels stay in front of detail channels."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Float[Tensor, "b tokens features"], height: int, width: int) -> Latents:
    """The inverse of `pack`, to latents of `height` x `width` positions."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, w=width // 2, p=2, q=2)


def token_grid(latents: Latents) -> Float[Tensor, "tokens 2"]:
    """Row and column of each token that `pack` makes of the latents, row by row."""
    height, width = latents.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([rows, columns], dim=-1).flatten(0, 1).to(latents.device, torch.float32)


def call_packed(transformer: Model, latents: Latents, sigma: Sigma, **arguments: Any) -> Latents:
    """Call a transformer with packed latents, and unpack what it returns."""
    height, width = latents.shape[-2:]
    tokens = transformer(hidden_states=pack(latents), timestep=sigma, **arguments, return_dict=False)[0]
    return unpack(tokens, height, width)


def pack_noise(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a stock pipeline's call, with packed noise."""
    return {**call, "latents": pack(call["latents"])}
