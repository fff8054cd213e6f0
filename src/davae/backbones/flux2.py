"""FLUX.2: layers of a language model, latents packed 2x2 and normalised there, timestep = sigma."""

import math

import torch
import torch.nn.functional as F

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Pipeline, Sigma, encode_texts
from davae.backbones.packing import call_packed, token_grid

GUIDANCE = 4.0
"""The guidance that a distilled model (FLUX.2-dev) is told in training: the stock pipeline's default."""


def compute_shift(pipeline: Pipeline, tokens: int) -> float:
    """The pipelines' own formula, which depends on the sampling steps, too; 50 are their default."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return math.exp(compute_empirical_mu(image_seq_len=tokens, num_steps=50))


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # Ids are time, row, column, and place in the text.
    places = torch.arange(condition["encoder_hidden_states"].shape[1], device=latents.device)
    ids = {"txt_ids": F.pad(places[:, None], (3, 0)), "img_ids": F.pad(token_grid(latents), (1, 1))}
    guidance = torch.full_like(sigma, GUIDANCE) if transformer.config.guidance_embeds else None
    return call_packed(transformer, latents, sigma, guidance=guidance, **ids, **condition)


BACKBONE = Backbone(
    LatentPorts("x_embedder", "d (c p q)", "proj_out", "(c p q) d", packed=2),
    # The transformer sees the padding behind a prompt, too: sample with the length that was trained.
    encode_texts("encoder_hidden_states"),
    velocity,
    # Attention and MLP output of the image stream, and the joint input of the single-stream blocks; their output
    # `attn.to_out` is named like the other blocks' list of layers, which LoRA cannot be put on. Modulation is shared.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.linear_out", "to_qkv_mlp_proj"),
    shift=compute_shift,
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    # Noise as patches in channels, not yet as tokens.
    adjust_call=lambda call: {**call, "latents": F.pixel_unshuffle(call["latents"], 2)},
)
