"""Krea 2: layers of a language model, stacked; latents packed 2x2 by the pipeline, timestep = sigma."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from davae.backbones.backbone import (
    Backbone,
    Condition,
    LatentPorts,
    Latents,
    Model,
    Pipeline,
    Sigma,
    compute_shift,
    guide_from_zero,
)
from davae.backbones.packing import call_packed, pack_noise, token_grid


def shift(pipeline: Pipeline, tokens: int) -> float:
    """The scheduler's shift; distilled models have one for any number of tokens."""
    return math.exp(1.15) if pipeline.config.is_distilled else compute_shift(pipeline, tokens)


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> Condition:
    """`encoder_hidden_states` [B, tokens, layers x width] and `encoder_attention_mask` [B, tokens]."""
    embeds, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
    return {"encoder_hidden_states": embeds.flatten(2), "encoder_attention_mask": mask}


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    embeds = condition["encoder_hidden_states"].unflatten(2, (transformer.config.num_text_layers, -1))
    # Text tokens are at the origin, and come first.
    places = torch.cat([torch.zeros(embeds.shape[1], 2, device=latents.device), token_grid(latents)])
    texts = {"encoder_hidden_states": embeds, "encoder_attention_mask": condition["encoder_attention_mask"].bool()}
    return call_packed(transformer, latents, sigma, position_ids=F.pad(places, (1, 0)), **texts)


BACKBONE = Backbone(
    LatentPorts("img_in", "d (c p q)", "final_layer.linear", "(c p q) d", packed=2),
    condition,
    velocity,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.down"),
    shift=shift,
    pipelines=("Krea2Pipeline",),
    adjust_call=lambda call: guide_from_zero(pack_noise(call)),
    condition_shapes=lambda model, tokens: {
        "encoder_hidden_states": (tokens, model.config.num_text_layers * model.config.text_hidden_dim),
        "encoder_attention_mask": (tokens,),
    },
    text_settings=("text_encoder_select_layers",),
    advice="call it with height and width: its default is 1024 px, whatever its VAE",
)
