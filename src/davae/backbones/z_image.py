"""Z-Image: one language model, images in lists of videos of one frame. Time and sign run the other way."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Pipeline, Sigma, guide_from_zero


def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int = 512) -> Condition:
    """`caption` [B, max_sequence_length, width], zero behind the prompt, and its length `caption_tokens` [B]."""
    embeds, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    lengths = torch.tensor([len(rows) for rows in embeds], device=embeds[0].device)
    padded = [F.pad(rows, (0, 0, 0, max_sequence_length - len(rows))) for rows in embeds]
    return {"caption": torch.stack(padded), "caption_tokens": lengths}


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    # The transformer takes captions without padding, and each image as a video of one frame.
    lengths = condition["caption_tokens"].tolist()
    captions = [caption[:length] for caption, length in zip(condition["caption"], lengths, strict=True)]
    frames = list(latents.unsqueeze(2).unbind(dim=0))
    return -torch.stack(transformer(frames, 1 - sigma, captions, return_dict=False)[0]).squeeze(2)


BACKBONE = Backbone(
    LatentPorts("all_x_embedder.2-1", "d (p q c)", "all_final_layer.2-1.linear", "(p q c) d", patch=2),
    condition,
    velocity,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w2"),
    pipelines=("ZImagePipeline",),
    adjust_call=lambda call: guide_from_zero({**call, "latents": call["latents"].float()}),
    advice="call it with height and width: its default is 1024 px, whatever its VAE",
)
