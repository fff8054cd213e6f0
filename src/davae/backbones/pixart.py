"""PixArt-alpha and -Sigma: one T5, convolutional patches, noise and its variance are predicted, timestep 0 to 999.

PixArt-alpha for 1024 px is told the size of the picture in pixels, and so is its upgrade: of twice the size. It starts
as the base only as far as that matters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from jaxtyping import Float, Int
from torch import Tensor

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.sizes import UNBINNED, side_of
from davae.backbones.variance import split_variance
from davae.method.widen import LatentPorts

PORTS = LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q k c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")
"""Both attentions and the MLP's output; the modulation is one layer for all blocks, and stays."""


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or sample size x downsample factor.

    Raises:
        SettingsError: another pipeline than PixArt's two, or a size that is no multiple of a token's.
    """
    config, factor = pipeline.transformer.config, getattr(pipeline, "vae_scale_factor", 1)
    kinds = (PixArtSigmaPipeline, PixArtAlphaPipeline)
    return side_of(pipeline, size, kinds=kinds, default=config.sample_size * factor, unit=config.patch_size * factor)


def condition(
    pipeline: PixArtSigmaPipeline | PixArtAlphaPipeline, prompts: Sequence[str], *, max_sequence_length: int = 300
) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own T5, without the cleaning that wants further packages.

    Returns:
        `encoder_hidden_states` [B, tokens, width] and `encoder_attention_mask` [B, tokens]; and `downsample_factor`
        [B], where the transformer is told the size of the picture (PixArt-alpha at 1024 px).
    """
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        clean_caption=False,
        max_sequence_length=max_sequence_length,
    )
    found = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    if pipeline.transformer.use_additional_conditions:
        found["downsample_factor"] = torch.full((len(embeds),), float(pipeline.vae_scale_factor), device=embeds.device)
    return found


def noise(
    transformer: PixArtTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    timestep: Int[Tensor, " b"],
    condition: dict[str, Tensor],
) -> tuple[Float[Tensor, "b latent h w"], Float[Tensor, "b latent h w"] | None]:
    """Predict the noise in latents at `timestep`, and its variance where that is learned."""
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    factor = condition.get("downsample_factor")
    if factor is not None:
        sides = torch.tensor(latents.shape[-2:], device=factor.device) * factor[:, None]
        added = {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
    output = transformer(
        latents,
        encoder_hidden_states=condition["encoder_hidden_states"],
        encoder_attention_mask=condition["encoder_attention_mask"],
        timestep=timestep,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return split_variance(output, latents.shape[1])


def call(
    pipeline: PixArtSigmaPipeline | PixArtAlphaPipeline, prompts: Sequence[str], **settings: Any
) -> dict[str, Any]:
    """As of `calling.call`; the pipeline then leaves the size and the captions as they are."""
    arguments = calling.call(pipeline, prompts, **settings)
    return {**arguments, "clean_caption": False, "use_resolution_binning": False}


BACKBONE = Backbone(
    PORTS,
    condition,
    noise=noise,
    lora_targets=LORA_TARGETS,
    picture_side=picture_side,
    call=call,
    advice=UNBINNED,
)
