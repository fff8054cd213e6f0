"""Qwen-Image: one language model with a template, latents packed 2x2 by the pipeline, timestep = sigma."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.packing import pack, unpack
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("img_in", "d (c p q)", "proj_out", "(c p q) d", packed=2)

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.2", "img_mod.1")
"""The image stream's attention, MLP output and modulation, as for Stable Diffusion 3."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or the stock pipeline's default, 128 x downsample factor.

    Raises:
        SettingsError: another pipeline than QwenImagePipeline, or a size that is no multiple of a token's.
    """
    factor = getattr(pipeline, "vae_scale_factor", 1)
    return side_of(pipeline, size, kinds=(QwenImagePipeline,), default=128 * factor, unit=2 * factor)


def condition(
    pipeline: QwenImagePipeline, prompts: Sequence[str], *, max_sequence_length: int = 512
) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own language model.

    Returns:
        `encoder_hidden_states` [B, max_sequence_length, width], zero behind the prompt, and
        `encoder_hidden_states_mask` [B, max_sequence_length].
    """
    embeds, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    lacking = max_sequence_length - embeds.shape[1]
    return {
        "encoder_hidden_states": F.pad(embeds, (0, 0, 0, lacking)),
        "encoder_hidden_states_mask": F.pad(mask, (0, lacking)),
    }


def velocity(
    transformer: QwenImageTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at `latents` = (1 - sigma) latents + sigma noise."""
    height, width = latents.shape[-2:]
    packed = transformer(
        hidden_states=pack(latents),
        timestep=sigma,
        img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
        **condition,
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def call(
    pipeline: QwenImagePipeline,
    prompts: Sequence[str],
    *,
    noise: Float[Tensor, "b latent h w"],
    guidance_scale: float,
    **settings: Any,
) -> dict[str, Any]:
    """As of `calling.call`; guidance of 1 or less is none, and others are against no text."""
    arguments = calling.call(pipeline, prompts, noise=pack(noise), guidance_scale=guidance_scale, **settings)
    del arguments["guidance_scale"]  # a distilled model's, which is another
    negative = [""] * len(prompts) if guidance_scale > 1 else None
    return {**arguments, "negative_prompt": negative, "true_cfg_scale": guidance_scale}


BACKBONE = Backbone(PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=call)
