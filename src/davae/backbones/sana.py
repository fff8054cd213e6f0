"""SANA: one language model with an instruction before the prompt, patches of 1, timestep = 1000 sigma."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, SanaPipeline, SanaTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.sizes import UNBINNED, side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("patch_embed.proj", "d c p q", "proj_out", "(p q c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear attention and cross-attention; the MLP is made of convolutions."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or sample size x downsample factor.

    Raises:
        SettingsError: another pipeline than SanaPipeline, or a size that is no multiple of a token's, nor of 32.
    """
    config, factor = pipeline.transformer.config, getattr(pipeline, "vae_scale_factor", 1)
    unit = max(config.patch_size * factor, 32)  # the stock pipeline wants multiples of 32, whatever its VAE
    return side_of(pipeline, size, kinds=(SanaPipeline,), default=config.sample_size * factor, unit=unit)


def instruction() -> list[str]:
    """The stock pipeline's default text before a prompt that makes the language model enhance it."""
    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def condition(pipeline: SanaPipeline, prompts: Sequence[str], *, max_sequence_length: int = 300) -> dict[str, Tensor]:
    """Encode prompts as the stock pipeline does: after its instruction, but the empty one, which is alone.

    Returns:
        `encoder_hidden_states` [B, tokens, width] and `encoder_attention_mask` [B, tokens].
    """
    settings = {"max_sequence_length": max_sequence_length, "complex_human_instruction": instruction()}
    # The second pair is of no prompt, as guidance is against; what is given as the first has no say in it.
    embeds, masks, none, no_mask = pipeline.encode_prompt([prompt or " " for prompt in prompts], **settings)
    given = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)[:, None]
    embeds, masks = torch.where(given[..., None], embeds, none), torch.where(given, masks, no_mask)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": masks}


def velocity(
    transformer: SanaTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at `latents` = (1 - sigma) latents + sigma noise."""
    timestep = 1000 * sigma * transformer.config.timestep_scale
    return transformer(latents, timestep=timestep, **condition, return_dict=False)[0]


def call(pipeline: SanaPipeline, prompts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """As of `calling.call`; the pipeline then leaves the size as it is."""
    return {**calling.call(pipeline, prompts, **settings), "use_resolution_binning": False}


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=call, advice=UNBINNED
)
