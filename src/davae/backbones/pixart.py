"""PixArt-alpha and -Sigma: one T5, convolutional patches, noise and its variance are predicted, timestep 0 to 999.

PixArt-alpha for 1024 px is told the image's size, which doubles with an upgrade, so the start is not quite the base's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from davae.backbones.backbone import (
    UNBINNED,
    Backbone,
    Condition,
    LatentPorts,
    Latents,
    Model,
    Pipeline,
    Timestep,
    split_variance,
)


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 300) -> Condition:
    """`encoder_hidden_states` [B, tokens, width] and `encoder_attention_mask` [B, tokens].

    Where the transformer is told the image's size (PixArt-alpha at 1024 px), also `downsample_factor` [B]. Captions are
    not cleaned, which would need further packages.
    """
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, clean_caption=False, max_sequence_length=max_sequence_length
    )
    texts = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    if pipeline.transformer.use_additional_conditions:
        texts["downsample_factor"] = torch.full((len(embeds),), float(pipeline.vae_scale_factor), device=embeds.device)
    return texts


def condition_shapes(transformer: Model, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one row of `condition`."""
    width = transformer.config.caption_channels
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (tokens, width), "encoder_attention_mask": (tokens,)}
    return {**shapes, "downsample_factor": ()} if transformer.use_additional_conditions else shapes


def noise(
    transformer: Model, latents: Latents, timestep: Timestep, condition: Condition
) -> tuple[Latents, Latents | None]:
    # PixArt-alpha is told height and width in pixels, and their ratio.
    texts = dict(condition)
    factor = texts.pop("downsample_factor", None)
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if factor is not None:
        sides = torch.tensor(latents.shape[-2:], device=factor.device) * factor[:, None]
        sizes = {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}

    output = transformer(latents, timestep=timestep, added_cond_kwargs=sizes, **texts, return_dict=False)[0]
    return split_variance(output, latents.shape[1])


BACKBONE = Backbone(
    LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q k c) d"),
    condition,
    noise=noise,
    # Both attentions and the MLP's output; the modulation is one layer for all blocks, and stays.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"),
    pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    adjust_call=lambda call: {**call, "clean_caption": False, "use_resolution_binning": False},
    condition_shapes=condition_shapes,
    padded_text=True,
    advice=UNBINNED,
)
