"""Ovis-Image: FLUX.1's layout with one language model and places for the text; timestep = sigma."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from davae.backbones import flux
from davae.backbones.backbone import Backbone, Condition, Latents, Model, Sigma, encode_texts
from davae.backbones.packing import call_packed, pack_noise, token_grid


def text_ids(condition: Condition) -> Float[Tensor, "tokens 3"]:
    """Text token i is at row i and column i."""
    embeds = condition["encoder_hidden_states"]
    places = torch.arange(embeds.shape[1], device=embeds.device, dtype=torch.float32)
    return F.pad(torch.stack([places, places], dim=1), (1, 0))


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    image_ids = F.pad(token_grid(latents), (1, 0))
    return call_packed(transformer, latents, sigma, txt_ids=text_ids(condition), img_ids=image_ids, **condition)


BACKBONE = Backbone(
    flux.BACKBONE.ports,
    # The transformer sees the padding behind a prompt, too: sample with the length that was trained.
    encode_texts("encoder_hidden_states", do_classifier_free_guidance=False),
    velocity,
    lora_targets=flux.BACKBONE.lora_targets,
    pipelines=("OvisImagePipeline",),
    adjust_call=pack_noise,
    condition_shapes=lambda model, tokens: {"encoder_hidden_states": (tokens, model.config.joint_attention_dim)},
)
