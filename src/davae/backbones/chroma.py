"""Chroma: FLUX.1 without CLIP and guidance input; one T5 with a mask, latents packed 2x2, timestep = sigma."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin

from davae.backbones import flux
from davae.backbones.backbone import Backbone, Condition, Latents, Sigma
from davae.backbones.packing import call_packed, pack_noise, token_grid


def condition(pipeline: DiffusionPipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> Condition:
    """`encoder_hidden_states` [B, max_sequence_length, width] and `attention_mask` [B, max_sequence_length]."""
    # The mask, 0 or 1, is added to the attention's logits, so it does not hide the padding: sample with the length
    # that was trained.
    embeds, _, mask, *_ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return {"encoder_hidden_states": embeds, "attention_mask": mask}


def velocity(transformer: ModelMixin, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # The mask goes on over the image's tokens; their ids, and those of the text, are FLUX.1's.
    embeds, mask = condition["encoder_hidden_states"], condition["attention_mask"]
    grid = token_grid(latents)
    return call_packed(
        transformer,
        latents,
        sigma,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
        img_ids=F.pad(grid, (1, 0)),
        encoder_hidden_states=embeds,
        attention_mask=F.pad(mask.to(latents.dtype), (0, len(grid)), value=1.0),
    )


BACKBONE = Backbone(
    flux.BACKBONE.ports,
    condition,
    velocity,
    # As for FLUX.1, but for the modulation, which one layer makes for all blocks.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_mlp"),
    pipelines=("ChromaPipeline",),
    adjust_call=pack_noise,
    condition_shapes=lambda model, tokens: {
        "encoder_hidden_states": (tokens, model.config.joint_attention_dim),
        "attention_mask": (tokens,),
    },
    padded_text=True,
)
