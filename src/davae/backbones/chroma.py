"""Chroma: FLUX.1 without CLIP and guidance input; one T5 with a mask, latents packed 2x2, timestep = sigma."""

import torch
import torch.nn.functional as F

from davae.backbones import flux
from davae.backbones.backbone import Backbone, Condition, Latents, Model, Sigma, encode_texts
from davae.backbones.packing import call_packed, pack_noise, token_grid


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # The mask goes on over the image's tokens; their ids, and those of the text, are FLUX.1's.
    mask, grid = condition["attention_mask"], token_grid(latents)
    ids = {"txt_ids": torch.zeros(mask.shape[1], 3, device=latents.device), "img_ids": F.pad(grid, (1, 0))}
    whole_mask = F.pad(mask.to(latents.dtype), (0, len(grid)), value=1.0)
    return call_packed(transformer, latents, sigma, **ids, **{**condition, "attention_mask": whole_mask})


BACKBONE = Backbone(
    flux.BACKBONE.ports,
    # The mask, 0 or 1, is added to the attention's logits, so it does not hide the padding: sample with the length
    # that was trained.
    encode_texts("encoder_hidden_states", "", "attention_mask", do_classifier_free_guidance=False),
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
