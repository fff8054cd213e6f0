"""Pictures from prompts, out of a pipeline of any family that has captions, with noise that base and upgraded share."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from jaxtyping import UInt8
from torch import Tensor

from davae.autoencoder_bases import base_facts, downsample_factor
from davae.autoencoder_da import AutoencoderDA
from davae.backbones import backbone_of
from davae.data.png import to_bytes
from davae.seeds import generator


def shared_noise(pipeline: DiffusionPipeline, indices: Sequence[int], *, seed: int, side: int) -> Tensor:
    """Starting noise [B, channels, side, side], keyed by (seed, index): an upgraded pipeline's base half is the base's.

    So base and upgraded pictures of one index begin alike, and can be compared side by side.
    """
    vae = pipeline.vae
    total = base_facts(vae.config).latent_channels
    channels = vae.config.base_channels if isinstance(vae, AutoencoderDA) else total
    extra = total - channels
    rows = []
    for index in indices:
        base = torch.randn(channels, side, side, generator=generator(seed, "base noise", index))
        detail = torch.randn(extra, side, side, generator=generator(seed, "detail noise", index))
        rows.append(torch.cat([base, detail]))
    return torch.stack(rows)


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = 28,
    guidance_scale: float = 4.0,
    size: int | None = None,
    prompt_tokens: int = 256,
    first_index: int = 0,
) -> UInt8[Tensor, "b 3 size size"]:
    """One picture for each prompt.

    Args:
        pipeline: base or upgraded, of a family that has captions and that davae samples from (docs/backbones.md).
        prompts: B of them, in one batch.
        seed: of the noise, together with each picture's index.
        steps: of the sampler.
        guidance_scale: as the stock pipeline understands it; of classifier-free guidance, mostly, which 1 turns off.
        size: side in pixels; the pipeline's default if None.
        prompt_tokens: length that the longest text encoder pads or cuts to.
        first_index: index of the first prompt, for the noise.

    Raises:
        SettingsError: a pipeline of another family, or a size that it cannot make.
    """
    backbone = backbone_of(pipeline.transformer)
    side = backbone.picture_side(pipeline, size)
    indices = range(first_index, first_index + len(prompts))
    factor = downsample_factor(pipeline.vae.config)  # not every pipeline's own count is its VAE's
    noise = shared_noise(pipeline, indices, seed=seed, side=side // factor)
    arguments = backbone.call(
        pipeline,
        prompts,
        noise=noise.to(pipeline.device, pipeline.transformer.dtype),
        side=side,
        guidance_scale=guidance_scale,
        prompt_tokens=prompt_tokens,
    )
    pictures = pipeline(**arguments, num_inference_steps=steps, output_type="pt").images
    return to_bytes(pictures * 2 - 1)
