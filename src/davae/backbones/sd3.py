"""Stable Diffusion 3 and 3.5: three text encoders, latents in patches of 2, timestep = 1000 sigma."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")
"""What the reference trains with LoRA: the image stream's attention, MLP output and modulation; no text stream."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or the pipeline's default if it is None.

    Raises:
        SettingsError: another pipeline than StableDiffusion3Pipeline, or a size that it cannot make.
    """
    config, factor = pipeline.transformer.config, getattr(pipeline, "vae_scale_factor", 1)
    unit = factor * config.patch_size
    return side_of(
        pipeline,
        size,
        kinds=(StableDiffusion3Pipeline,),
        default=config.sample_size * factor,
        unit=unit,
        largest=(config.get("pos_embed_max_size") or 0) * unit,
    )


def condition(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 256
) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own text encoders; differentiable, so wrap it where they are frozen.

    Args:
        pipeline: any Stable Diffusion 3 pipeline, base or upgraded.
        prompts: B of them; "" is the unconditional one.
        max_sequence_length: T5 tokens, at most 512 for the published models.

    Returns:
        `encoder_hidden_states` [B, 77 + T5 tokens, width] and `pooled_projections` [B, width], what `velocity` wants.
    """
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def velocity(
    transformer: SD3Transformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at `latents` = (1 - sigma) latents + sigma noise."""
    return transformer(hidden_states=latents, timestep=1000 * sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=calling.call, clip_tokens=77
)
