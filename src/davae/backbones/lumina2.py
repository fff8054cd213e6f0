"""Lumina2: one language model with a system prompt, time and sign the other way round."""

from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline, Lumina2Pipeline, Lumina2Transformer2DModel
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts
from davae.models.base_autoencoders import downsample_factor

PORTS = LatentPorts("x_embedder", "d (p q c)", "norm_out.linear_2", "(p q c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_2", "norm1.linear")

COUNTED_FACTOR = 8
"""The downsample factor that the stock pipeline counts with, whatever its VAE's is."""

ADVICE = "divide the side that you want by the resolution factor: Lumina2Pipeline counts with a downsample factor of 8"


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or sample size x the VAE's own downsample factor.

    Raises:
        SettingsError: another pipeline than Lumina2Pipeline, or a size that is no multiple of a token's.
    """
    config = pipeline.transformer.config
    factor = downsample_factor(pipeline.vae.config)
    unit = config.patch_size * factor
    return side_of(pipeline, size, kinds=(Lumina2Pipeline,), default=config.sample_size * factor, unit=unit)


def condition(
    pipeline: Lumina2Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 256
) -> dict[str, Tensor]:
    """Encode prompts behind the pipeline's system prompt; the empty one alone, as guidance is against.

    Returns:
        `encoder_hidden_states` [B, max_sequence_length, width] and `encoder_attention_mask` [B, max_sequence_length].
    """
    behind = [f"{pipeline.system_prompt} <Prompt Start> {prompt}" if prompt else "" for prompt in prompts]
    # Only what guidance is against is encoded as it is, so all are given in its place.
    _, _, embeds, mask = pipeline.encode_prompt(
        [""] * len(behind), negative_prompt=behind, max_sequence_length=max_sequence_length
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def velocity(
    transformer: Lumina2Transformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at (1 - sigma) latents + sigma noise; its t is 1 - sigma, its sign the other."""
    return -transformer(latents, timestep=1 - sigma, **condition, return_dict=False)[0]


def call(
    pipeline: Lumina2Pipeline, prompts: Sequence[str], *, noise: Float[Tensor, "b latent h w"], **settings: Any
) -> dict[str, Any]:
    """As of `calling.call`, with sizes by the pipeline's own count."""
    counted = dict(zip(("height", "width"), (COUNTED_FACTOR * length for length in noise.shape[-2:]), strict=True))
    return calling.call(pipeline, prompts, noise=noise, **{**settings, **counted})


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=call, advice=ADVICE
)
