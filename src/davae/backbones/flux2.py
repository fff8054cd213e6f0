"""FLUX.2: layers of a language model, latents packed 2x2 and normalised there, timestep = sigma."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.packing import grid, pack, unpack
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("x_embedder", "d (c p q)", "proj_out", "(c p q) d", packed=2)

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.linear_out", "to_qkv_mlp_proj")
"""The image stream's attention and MLP output, and the joint input of the single-stream blocks; modulation is shared.

Their output `attn.to_out` is called as the other blocks' list of layers is, which LoRA cannot be put on.
"""

GUIDANCE = 4.0
"""The guidance that a distilled model (FLUX.2-dev) is told in training: the stock pipeline's default."""

STEPS = 50
"""Of sampling, for the shift, which depends on them: the stock pipelines' default."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or the stock pipelines' default, 128 x downsample factor.

    Raises:
        SettingsError: another pipeline than Flux2Pipeline or Flux2KleinPipeline, or a size that is no multiple of a
            token's.
    """
    factor, kinds = getattr(pipeline, "vae_scale_factor", 1), (Flux2Pipeline, Flux2KleinPipeline)
    return side_of(pipeline, size, kinds=kinds, default=128 * factor, unit=2 * factor)


def shift(scheduler: Any, tokens: int) -> float:
    """exp(mu) of the pipelines' own formula for a picture of so many tokens, sampled in `STEPS` steps."""
    return math.exp(compute_empirical_mu(image_seq_len=tokens, num_steps=STEPS))


def condition(
    pipeline: Flux2Pipeline | Flux2KleinPipeline, prompts: Sequence[str], *, max_sequence_length: int = 512
) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own language model: `encoder_hidden_states` [B, max_sequence_length, width].

    The transformer sees what stands behind a prompt, too: sample with the length that was trained.
    """
    embeds, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
    return {"encoder_hidden_states": embeds}


def velocity(
    transformer: Flux2Transformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at `latents` = (1 - sigma) latents + sigma noise."""
    height, width = latents.shape[-2:]
    places = torch.arange(condition["encoder_hidden_states"].shape[1], device=latents.device)
    packed = transformer(
        hidden_states=pack(latents),
        timestep=sigma,
        guidance=torch.full_like(sigma, GUIDANCE) if transformer.config.guidance_embeds else None,
        txt_ids=F.pad(places[:, None], (3, 0)),  # time, row, column, place in the text
        img_ids=F.pad(grid(height // 2, width // 2, latents.device), (1, 1)),
        **condition,
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def call(
    pipeline: Flux2Pipeline | Flux2KleinPipeline,
    prompts: Sequence[str],
    *,
    noise: Float[Tensor, "b latent h w"],
    **settings: Any,
) -> dict[str, Any]:
    """As of `calling.call`; `guidance_scale` is what a distilled model is told, no second pass."""
    return calling.call(pipeline, prompts, noise=F.pixel_unshuffle(noise, 2), **settings)


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, shift=shift, call=call
)
