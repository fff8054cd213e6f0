"""Lumina2: one language model with a system prompt. Time and sign run the other way."""

from collections.abc import Sequence
from typing import Any

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Pipeline, Sigma


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 256) -> Condition:
    """`encoder_hidden_states` [B, max_sequence_length, width] and `encoder_attention_mask` [B, max_sequence_length]."""
    # As in the stock pipeline, a prompt follows the system prompt, and the empty prompt stands alone.
    texts = [f"{pipeline.system_prompt} <Prompt Start> {prompt}" if prompt else "" for prompt in prompts]
    # `encode_prompt` puts the system prompt before a prompt, but not before a negative one: all are given as negative.
    _, _, embeds, mask = pipeline.encode_prompt(
        [""] * len(texts), negative_prompt=texts, max_sequence_length=max_sequence_length
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    return -transformer(latents, timestep=1 - sigma, **condition, return_dict=False)[0]


def adjust_call(call: dict[str, Any]) -> dict[str, Any]:
    """Height and width as the pipeline counts them: with a downsample factor of 8, whatever its VAE's is."""
    height, width = call["latents"].shape[-2:]
    return {**call, "height": 8 * height, "width": 8 * width}


BACKBONE = Backbone(
    LatentPorts("x_embedder", "d (p q c)", "norm_out.linear_2", "(p q c) d"),
    condition,
    velocity,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_2", "norm1.linear"),
    pipelines=("Lumina2Pipeline",),
    adjust_call=adjust_call,
    text_settings=("system_prompt",),
    advice="divide the side that you want by the resolution factor: Lumina2Pipeline counts with a factor of 8",
)
