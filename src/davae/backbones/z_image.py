"""Z-Image: one language model, images in lists of videos of one frame. Time and sign run the other way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin

from davae.backbones.backbone import Backbone, Condition, Latents, Sigma, stock_arguments
from davae.method.widen import LatentPorts


def condition(pipeline: DiffusionPipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> Condition:
    """`caption` [B, max_sequence_length, width], zero behind the prompt, and its length `caption_tokens` [B]."""
    embeds, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    lengths = torch.tensor([len(rows) for rows in embeds], device=embeds[0].device)
    padded = [F.pad(rows, (0, 0, 0, max_sequence_length - len(rows))) for rows in embeds]
    return {"caption": torch.stack(padded), "caption_tokens": lengths}


def velocity(transformer: ModelMixin, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    """Predict noise - latents at (1 - sigma) latents + sigma noise; the model's t is 1 - sigma, its sign the other."""
    # The transformer takes captions without padding, and each image as a video of one frame.
    lengths = condition["caption_tokens"].tolist()
    captions = [caption[:length] for caption, length in zip(condition["caption"], lengths, strict=True)]
    frames = list(latents.unsqueeze(2).unbind(dim=0))
    return -torch.stack(transformer(frames, 1 - sigma, captions, return_dict=False)[0]).squeeze(2)


def call_arguments(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, noise: Latents, guidance_scale: float, **settings: Any
) -> dict[str, Any]:
    """The pipeline's guidance counts from 0; here 1 or less means none, as elsewhere."""
    counted = max(guidance_scale - 1, 0.0)
    return stock_arguments(pipeline, prompts, noise=noise.float(), guidance_scale=counted, **settings)


BACKBONE = Backbone(
    LatentPorts("all_x_embedder.2-1", "d (p q c)", "all_final_layer.2-1.linear", "(p q c) d", patch=2),
    condition,
    velocity,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w2"),
    pipelines=("ZImagePipeline",),
    call_arguments=call_arguments,
    advice="call it with height and width: its default is 1024 px, whatever its VAE",
)
