"""Z-Image: one language model, pictures in lists of videos of one frame, time and sign the other way round."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ZImagePipeline, ZImageTransformer2DModel
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from davae.backbones import calling
from davae.backbones.family import Backbone
from davae.backbones.sizes import side_of
from davae.method.widen import LatentPorts

PORTS = LatentPorts("all_x_embedder.2-1", "d (p q c)", "all_final_layer.2-1.linear", "(p q c) d", patch=2)

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w2")

ADVICE = "call it with height and width: its default is 1024 px, whatever its VAE"


def picture_side(pipeline: DiffusionPipeline, size: int | None) -> int:
    """`size` in pixels, or 128 x downsample factor: 1024 px for the base, as its pipeline has it, twice for an upgrade.

    Raises:
        SettingsError: another pipeline than ZImagePipeline, or a size that is no multiple of a token's.
    """
    factor = getattr(pipeline, "vae_scale_factor", 1)
    return side_of(pipeline, size, kinds=(ZImagePipeline,), default=128 * factor, unit=2 * factor)


def condition(pipeline: ZImagePipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> dict[str, Tensor]:
    """Encode prompts with the pipeline's own language model.

    Returns:
        `caption` [B, max_sequence_length, width], zero behind the prompt, and `caption_tokens` [B], how many are its.
    """
    found, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    lengths = torch.tensor([len(each) for each in found], device=found[0].device)
    longest = found[0].new_zeros(max_sequence_length, found[0].shape[1])
    caption = pad_sequence([longest, *found], batch_first=True)[1:]
    return {"caption": caption, "caption_tokens": lengths}


def velocity(
    transformer: ZImageTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at (1 - sigma) latents + sigma noise; its t is 1 - sigma, its sign the other."""
    lengths = condition["caption_tokens"].tolist()
    captions = [caption[:length] for caption, length in zip(condition["caption"], lengths, strict=True)]
    pictures = list(latents.unsqueeze(2).unbind(dim=0))
    return -torch.stack(transformer(pictures, 1 - sigma, captions, return_dict=False)[0]).squeeze(2)


def call(
    pipeline: ZImagePipeline,
    prompts: Sequence[str],
    *,
    noise: Float[Tensor, "b latent h w"],
    guidance_scale: float,
    **settings: Any,
) -> dict[str, Any]:
    """As of `calling.call`; the pipeline's guidance counts from 0, and here 1 or less is none, as elsewhere."""
    counted = max(guidance_scale - 1, 0.0)
    return calling.call(pipeline, prompts, noise=noise.float(), guidance_scale=counted, **settings)


BACKBONE = Backbone(
    PORTS, condition, velocity, lora_targets=LORA_TARGETS, picture_side=picture_side, call=call, advice=ADVICE
)
