"""FLUX.1: a T5 and a pooled CLIP, latents packed 2x2 by the pipeline, timestep = sigma, guidance as an input."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.packing import grid, pack, unpack
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("x_embedder", "d (c p q)", "proj_out", "(c p q) d", packed=2)

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear", "norm.linear", "proj_mlp")
"""As for Stable Diffusion 3, and the same of the single-stream blocks; their `proj_out` is called as a port is."""

GUIDANCE = 3.5
"""The guidance that a distilled model (FLUX.1-dev) is told in training: the stock pipeline's default."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or the stock pipeline's default, 128 x downsample factor.

    Raises:
        SettingsError: another pipeline than FluxPipeline, or a size that is no multiple of a token's.
    """
    factor = getattr(pipeline, "vae_scale_factor", 1)
    return side_of(pipeline, size, kinds=(FluxPipeline,), default=128 * factor, unit=2 * factor)


def condition(pipeline: FluxPipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own text encoders.

    Returns:
        `encoder_hidden_states` [B, T5 tokens, width] and `pooled_projections` [B, width].
    """
    embeds, pooled, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def velocity(
    transformer: FluxTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at `latents` = (1 - sigma) latents + sigma noise."""
    height, width = latents.shape[-2:]
    tokens = condition["encoder_hidden_states"].shape[1]
    guidance = torch.full_like(sigma, GUIDANCE) if transformer.config.guidance_embeds else None
    packed = transformer(
        hidden_states=pack(latents),
        timestep=sigma,
        guidance=guidance,
        txt_ids=torch.zeros(tokens, 3, device=latents.device),
        img_ids=F.pad(grid(height // 2, width // 2, latents.device), (1, 0)),
        **condition,
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def call(
    pipeline: FluxPipeline, prompts: Sequence[str], *, noise: Float[Tensor, "b latent h w"], **settings: Any
) -> dict[str, Any]:
    """As of `calling.call`; `guidance_scale` is what a distilled model is told, no second pass."""
    return calling.call(pipeline, prompts, noise=pack(noise), **settings)


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=call, guided_rows=1
)
