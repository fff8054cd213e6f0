"""Qwen-Image: one language model with a template, latents packed 2x2 by the pipeline, timestep = sigma."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Pipeline, Sigma
from davae.backbones.packing import call_packed, pack_noise


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> Condition:
    """`encoder_hidden_states` [B, max_sequence_length, width], zero behind the prompt, and their mask."""
    embeds, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    missing = max_sequence_length - embeds.shape[1]
    return {
        "encoder_hidden_states": F.pad(embeds, (0, 0, 0, missing)),
        "encoder_hidden_states_mask": F.pad(mask, (0, missing)),
    }


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # Each image is one frame of so many tokens.
    height, width = latents.shape[-2:]
    shapes = [[(1, height // 2, width // 2)]] * len(latents)
    return call_packed(transformer, latents, sigma, img_shapes=shapes, **condition)


def adjust_call(call: dict[str, Any]) -> dict[str, Any]:
    """Guidance of 1 or less means none; other guidance is against the empty prompt."""
    scale = call.pop("guidance_scale")  # the pipeline's own argument of that name is an input of distilled models
    negative = [""] * len(call["prompt"]) if scale > 1 else None
    return {**pack_noise(call), "negative_prompt": negative, "true_cfg_scale": scale}


BACKBONE = Backbone(
    LatentPorts("img_in", "d (c p q)", "proj_out", "(c p q) d", packed=2),
    condition,
    velocity,
    # Attention, MLP output and modulation of the image stream.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.2", "img_mod.1"),
    pipelines=("QwenImagePipeline",),
    adjust_call=adjust_call,
)
