"""SANA: one language model with an instruction before the prompt, patches of 1, timestep = 1000 sigma."""

import inspect
from collections.abc import Sequence

import torch

from davae.backbones.backbone import UNBINNED, Backbone, Condition, LatentPorts, Latents, Model, Pipeline, Sigma


def read_instruction() -> list[str]:
    """The stock pipeline's default text before a prompt, which makes the language model enhance it."""
    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 300) -> Condition:
    """`encoder_hidden_states` [B, tokens, width] and `encoder_attention_mask` [B, tokens]."""
    # As in the stock pipeline, a prompt follows the instruction, and the empty prompt stands alone.
    embeds, masks, blank_embeds, blank_mask = pipeline.encode_prompt(
        [prompt or " " for prompt in prompts],
        max_sequence_length=max_sequence_length,
        complex_human_instruction=read_instruction(),
    )
    # The second pair is of the empty prompt, which guidance is against; it replaces the rows of empty prompts.
    has_text = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)[:, None]
    return {
        "encoder_hidden_states": torch.where(has_text[..., None], embeds, blank_embeds),
        "encoder_attention_mask": torch.where(has_text, masks, blank_mask),
    }


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    timestep = 1000 * sigma * transformer.config.timestep_scale
    return transformer(latents, timestep=timestep, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    LatentPorts("patch_embed.proj", "d c p q", "proj_out", "(p q c) d"),
    condition,
    velocity,
    # Linear attention and cross-attention; the MLP is made of convolutions.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    pipelines=("SanaPipeline",),
    adjust_call=lambda call: {**call, "use_resolution_binning": False},
    pixel_multiple=32,
    condition_shapes=lambda model, tokens: {
        "encoder_hidden_states": (tokens, model.config.caption_channels),
        "encoder_attention_mask": (tokens,),
    },
    advice=UNBINNED,
)
