"""LongCat-Image: FLUX.1's layout, one language model, image tokens placed behind 512 text tokens; timestep = sigma."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from davae.backbones import flux, ovis_image
from davae.backbones.backbone import Backbone, Condition, Latents, Model, Pipeline, Sigma
from davae.backbones.packing import call_packed, pack_noise, token_grid

TEXT_TOKENS = 512
"""The stock pipeline pads each prompt to so many tokens, and places the image's first token there."""


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> Condition:
    """`encoder_hidden_states` [B, 512, width], whatever `max_sequence_length` is; prompts are not rewritten."""
    embeds, _ = pipeline.encode_prompt(list(prompts))
    return {"encoder_hidden_states": embeds}


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # An image token's id is 1, row, column, counted from behind the text.
    text_ids = ovis_image.text_ids(condition)
    image_ids = F.pad(token_grid(latents) + TEXT_TOKENS, (1, 0), value=1.0)
    return call_packed(transformer, latents, sigma, txt_ids=text_ids, img_ids=image_ids, **condition)


def adjust_call(call: dict[str, Any]) -> dict[str, Any]:
    """Prompts as they are, of the one length that the pipeline has."""
    del call["max_sequence_length"]
    return {**pack_noise(call), "enable_prompt_rewrite": False}


BACKBONE = Backbone(
    flux.BACKBONE.ports,
    condition,
    velocity,
    lora_targets=flux.BACKBONE.lora_targets,
    pipelines=("LongCatImagePipeline",),
    adjust_call=adjust_call,
    condition_shapes=lambda model, _: {"encoder_hidden_states": (TEXT_TOKENS, model.config.joint_attention_dim)},
    advice="give it latents, davae.backbones.packing.pack(noise): it draws noise of 16 channels, whatever its VAE",
)
