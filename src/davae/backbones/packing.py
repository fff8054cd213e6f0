"""2x2 space-to-channel, which some pipelines do before the transformer sees the latents."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from davae.backbones.backbone import Latents, Sigma, stock_arguments


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


def call_packed(transformer: ModelMixin, latents: Latents, sigma: Sigma, **arguments: Any) -> Latents:
    """Call a transformer with packed latents, and unpack what it returns."""
    height, width = latents.shape[-2:]
    tokens = transformer(hidden_states=pack(latents), timestep=sigma, **arguments, return_dict=False)[0]
    return unpack(tokens, height, width)


def packed_arguments(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, noise: Latents, **settings: Any
) -> dict[str, Any]:
    """`stock_arguments` of a pipeline that takes packed noise."""
    return stock_arguments(pipeline, prompts, noise=pack(noise), **settings)
