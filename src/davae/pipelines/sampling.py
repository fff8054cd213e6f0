"""Images from prompts, by any pipeline that takes captions, with noise that base and upgraded pipelines share."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
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
    """Starting noise [B, channels, height, width] of latents, keyed by (seed, index), whose base half is the base's.

    So base and upgraded pictures of one index begin alike, and can be compared side by side; those of an upgrade of an
    upgrade, too.
    """
    upgrades: list[int] = []
    config = pipeline.vae.config
    while isinstance(config.get("base_config"), dict) and config["base_channels"]:
        upgrades.insert(0, config["detail_channels"])
        config = config["base_config"]
    channels = {"base noise": base_facts(config).latent_channels}
    channels |= {f"detail noise{f' {n}' if n > 1 else ''}": count for n, count in enumerate(upgrades, 1)}
    rows = []
    for index in indices:
        parts = [
            torch.randn(count, height, width, generator=generator(seed, purpose, index))
            for purpose, count in channels.items()
        ]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


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
    """One picture for each prompt.

    Args:
        pipeline: base or upgraded, with captions, of those that davae samples from (docs/backbones.md).
        prompts: B of them, in one batch.
        seed: of the noise, together with each picture's index.
        steps: of the sampler.
        guidance_scale: as the stock pipeline understands it; of classifier-free guidance, mostly, which 1 turns off.
        size: side in pixels, or width and height; the pipeline's default square if None.
        prompt_tokens: length that the longest text encoder pads or cuts to.
        first_index: index of the first prompt, for the noise.

    Raises:
        SettingsError: a pipeline that davae does not sample from, or a size that it cannot make.
    """
    backbone = backbone_of(pipeline.transformer)
    width, height = backbone.width_and_height(pipeline, size)
    indices = range(first_index, first_index + len(prompts))
    factor = downsample_factor(pipeline.vae.config)  # not every pipeline's own count is its VAE's
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
    pictures = pipeline(**arguments, num_inference_steps=steps, output_type="pt").images
    return to_bytes(pictures * 2 - 1)
