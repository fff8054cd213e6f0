"""Stock pipelines that take an image: inpainting, and images as conditions, on upgraded tiny models."""

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import tiny_pipelines
from davae.backbones.packing import unpack
from tiny_upgrades import upgrade_tiny

C = tiny_pipelines.CHANNELS
SIDE = 64
INPAINTING = {
    "flux": ("FluxInpaintPipeline", {}),
    "flux2": ("Flux2KleinInpaintPipeline", {"guidance_scale": 1.0}),
    "qwen-image": ("QwenImageInpaintPipeline", {"true_cfg_scale": 1.0}),
    "z-image": ("ZImageInpaintPipeline", {"guidance_scale": 0.0}),
}
"""Pipelines that keep what the mask does not cover, and how to call them without guidance."""
CONDITIONED = {
    "flux": ("FluxKontextPipeline", {"_auto_resize": False, "max_area": SIDE**2}),
    "flux2": ("Flux2KleinPipeline", {}),
}
"""Pipelines that show the transformer the latents of an image beside those that it makes."""


def build_pipeline(kind: str, upgraded: DiffusionPipeline) -> DiffusionPipeline:
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    return tiny_pipelines.quiet(getattr(diffusers, kind)(**upgraded.components))


def smooth(seed: int) -> Tensor:
    """An image in [0, 1], [1, 3, 64, 64]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0, 1)


def call(pipeline: DiffusionPipeline, **settings) -> Tensor:
    """Four steps from seed 0."""
    generator = torch.Generator().manual_seed(0)
    settings |= {"height": SIDE, "width": SIDE, "num_inference_steps": 4, "max_sequence_length": 32}
    return pipeline(prompt="red apple", generator=generator, **settings).images


@torch.no_grad()
@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_keeps_the_latents_of_what_is_not_masked(name: str) -> None:
    upgraded, (kind, guidance) = upgrade_tiny(tiny_pipelines.PIPELINES[name]()), INPAINTING[name]
    pipeline = build_pipeline(kind, upgraded)
    image, mask = smooth(1), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    arguments = {"image": image, "mask_image": mask, "strength": 1.0, **guidance}

    latents = call(pipeline, output_type="latent", **arguments)
    latents = unpack(latents, 8, 8) if latents.ndim == 3 else latents
    if name == "flux2":  # its pipelines give them as the autoencoder takes them
        latents = upgraded.vae.standardise(latents)
    encoded = upgraded.vae.standardise(upgraded.vae.encode(image * 2 - 1).latent_dist.mode())

    difference = (latents - encoded).abs()
    unmasked, masked = difference[..., :4], difference[..., 4:]
    assert unmasked[:, :C].max() < 1e-3
    assert unmasked[:, C:].mean() < 0.1 * masked[:, C:].mean()  # drawn from the posterior
    assert masked.mean() > 0.1
    assert call(pipeline, output_type="pt", **arguments).shape == image.shape


@torch.no_grad()
@pytest.mark.parametrize("name", CONDITIONED)
def test_an_image_as_condition_changes_the_result(name: str) -> None:
    kind, settings = CONDITIONED[name]
    pipeline = build_pipeline(kind, upgrade_tiny(tiny_pipelines.PIPELINES[name]()))
    results = []
    for seed in (1, 1, 2):
        pixels = smooth(seed)[0].mul(255).byte().permute(1, 2, 0).numpy()
        results.append(call(pipeline, image=Image.fromarray(pixels), output_type="pt", **settings))

    one, again, other = results
    assert one.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_stable_diffusion_3_inpainting_refuses_other_channels() -> None:
    """It wants 16 or 33 input channels, whatever the VAE; docs/backbones.md says so."""
    pipeline = build_pipeline("StableDiffusion3InpaintPipeline", upgrade_tiny(tiny_pipelines.sd3()))
    with pytest.raises(ValueError, match="16 input channels or 33 input channels, not 32"):
        call(pipeline, image=smooth(1), mask_image=torch.ones(1, 1, SIDE, SIDE))
