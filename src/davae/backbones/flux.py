"""FLUX.1: a T5 and a pooled CLIP, latents packed 2x2 by the pipeline, timestep = sigma, guidance as an input."""

import torch
import torch.nn.functional as F

from davae.backbones import sd3
from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Sigma, encode_texts
from davae.backbones.packing import call_packed, pack_noise, token_grid

GUIDANCE = 3.5
"""The guidance that a distilled model (FLUX.1-dev) is told in training: the stock pipeline's default."""


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # All text tokens are at the origin; an image token's id is 0, row, column.
    tokens = condition["encoder_hidden_states"].shape[1]
    ids = {"txt_ids": torch.zeros(tokens, 3, device=latents.device), "img_ids": F.pad(token_grid(latents), (1, 0))}
    guidance = torch.full_like(sigma, GUIDANCE) if transformer.config.guidance_embeds else None
    return call_packed(transformer, latents, sigma, guidance=guidance, **ids, **condition)


BACKBONE = Backbone(
    LatentPorts("x_embedder", "d (c p q)", "proj_out", "(c p q) d", packed=2),
    encode_texts("encoder_hidden_states", "pooled_projections"),
    velocity,
    # As for Stable Diffusion 3, and the same of the single-stream blocks; their `proj_out` is named like a port.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear", "norm.linear", "proj_mlp"),
    pipelines=("FluxPipeline",),
    adjust_call=pack_noise,
    guided_rows=1,
    condition_shapes=sd3.BACKBONE.condition_shapes,
    padded_text=True,
)
