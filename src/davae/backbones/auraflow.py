"""AuraFlow: one T5 whose padding is zero, learned positions, timestep = sigma."""

from collections.abc import Sequence

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("pos_embed.proj", "d (c p q)", "proj_out", "(p q c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.out_projection", "norm1.linear")
"""The image stream's attention, MLP output and modulation, as for Stable Diffusion 3."""

ADVICE = "in half precision use bfloat16: in float16 its pipeline asks for a setting that only AutoencoderKL has"


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or sample size x downsample factor.

    Raises:
        SettingsError: another pipeline than AuraFlowPipeline, or a size that it cannot make.
    """
    config, factor = pipeline.transformer.config, getattr(pipeline, "vae_scale_factor", 1)
    unit = factor * config.patch_size
    return side_of(
        pipeline,
        size,
        kinds=(AuraFlowPipeline,),
        default=config.sample_size * factor,
        unit=unit,
        largest=int(config.pos_embed_max_size**0.5) * unit,
    )


def condition(
    pipeline: AuraFlowPipeline, prompts: Sequence[str], *, max_sequence_length: int = 256
) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own T5: `encoder_hidden_states` [B, max_sequence_length, width]."""
    embeds, _, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return {"encoder_hidden_states": embeds}


def velocity(
    transformer: AuraFlowTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at `latents` = (1 - sigma) latents + sigma noise."""
    return transformer(latents, timestep=sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=calling.call, advice=ADVICE
)
