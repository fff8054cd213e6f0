"""Stable Diffusion 3 and 3.5: three text encoders, latents in patches of 2, timestep = 1000 sigma."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from davae.errors import SettingsError
from davae.widen import LatentPorts

PORTS = LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")
"""What the reference trains with LoRA: the image stream's attention, MLP output and modulation; no text stream."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or the pipeline's default if it is None.

    Raises:
        SettingsError: a pipeline of another family than Stable Diffusion 3, or a size that it cannot make.
    """
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        raise SettingsError(
            f"a {type(pipeline).__name__} was given; allowed is StableDiffusion3Pipeline: "
            "davae upgrades others, too, but neither trains them nor samples from them yet"
        )
    config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
    unit = factor * config.patch_size
    side, largest = config.sample_size * factor if size is None else size, config.pos_embed_max_size * unit
    if side not in range(unit, largest + 1, unit):
        raise SettingsError(
            f"size={side}: allowed are multiples of {unit}, downsample factor x patch size, up to {largest}"
        )
    return side


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
