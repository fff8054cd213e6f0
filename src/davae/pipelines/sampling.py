"""Images from prompts, from any pipeline that takes captions; base and upgraded pipelines can share their noise."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import UInt8
from torch import Tensor

from davae.backbones import backbone_of
from davae.backbones.sizes import Size
from davae.data.pictures import to_bytes
from davae.models.base_autoencoders import base_facts, downsample_factor
from davae.seeds import generator


def draw_shared_noise(
    pipeline: DiffusionPipeline, indices: Sequence[int], *, seed: int, height: int, width: int
) -> Tensor:
    """Draw starting noise [B, channels, height, width] for latents, keyed by (seed, index).

    The base half is the base pipeline's noise, also for an upgrade of an upgrade. So base and upgraded images of one
    index begin alike, and can be compared side by side.
    """
    # From the outermost autoencoder down to the base: each upgrade put its detail channels behind.
    detail_channels: list[int] = []
    config = pipeline.vae.config
    while isinstance(config.get("base_config"), dict) and config["base_channels"]:
        detail_channels.insert(0, config["detail_channels"])
        config = config["base_config"]

    channels = {"base noise": base_facts(config).latent_channels}
    for number, count in enumerate(detail_channels, 1):
        channels["detail noise" if number == 1 else f"detail noise {number}"] = count

    # Each half of each image has a generator of its own, so that neither depends on the other's size.
    images = []
    for index in indices:
        parts = []
        for purpose, count in channels.items():
            parts.append(torch.randn(count, height, width, generator=generator(seed, purpose, index)))
        images.append(torch.cat(parts))
    return torch.stack(images)


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = 28,
    guidance_scale: float = 4.0,
    size: Size | None = None,
    prompt_tokens: int = 256,
    first_index: int = 0,
) -> UInt8[Tensor, "b 3 height width"]:
    """Make one image for each prompt, all in one batch.

    The noise is keyed by `seed` and by each image's index, which counts from `first_index`. `guidance_scale` is an
    argument of the stock pipeline; in most, 1 turns classifier-free guidance off. `size` is a side in pixels, or width
    and height; the pipeline's default square if None. The longest text encoder pads or cuts to `prompt_tokens`.
    """
    backbone = backbone_of(pipeline.transformer)
    width, height = backbone.width_and_height(pipeline, size)
    factor = downsample_factor(pipeline.vae.config)  # some pipelines' own count differs from their VAE's
    indices = range(first_index, first_index + len(prompts))
    noise = draw_shared_noise(pipeline, indices, seed=seed, height=height // factor, width=width // factor)

    arguments = backbone.call_arguments(
        pipeline,
        prompts,
        noise=noise.to(pipeline.device, pipeline.transformer.dtype),
        height=height,
        width=width,
        guidance_scale=guidance_scale,
        prompt_tokens=prompt_tokens,
    )
    images = pipeline(**arguments, num_inference_steps=steps, output_type="pt").images
    return to_bytes(images * 2 - 1)


def to_vae_scale(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Latents of a transformer in its VAE's scale: / scaling_factor, then * std + mean if it has them, or + shift."""
    config = vae.config
    latents = latents / config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents + (config.shift_factor or 0.0)
    mean, std = (torch.tensor(list(values)).to(latents).view(1, -1, 1, 1) for values in (mean, std))
    return latents * std + mean
