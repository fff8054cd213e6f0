"""Stock pipelines that are given a picture: inpainting, and pictures as conditions, on upgraded tiny models."""

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import tiny_pipelines
from davae import AutoencoderDA, upgrade
from davae.backbones.packing import unpack

C = tiny_pipelines.CHANNELS
SIDE = 64
INPAINTING = {
    "flux": ("FluxInpaintPipeline", {}),
    "flux2": ("Flux2KleinInpaintPipeline", {"guidance_scale": 1.0}),
    "qwen_image": ("QwenImageInpaintPipeline", {"true_cfg_scale": 1.0}),
    "z_image": ("ZImageInpaintPipeline", {"guidance_scale": 0.0}),
}
"""Pipelines that keep what the mask does not cover, and how to call them without guidance."""
CONDITIONED = {
    "flux": ("FluxKontextPipeline", {"_auto_resize": False, "max_area": SIDE**2}),
    "flux2": ("Flux2KleinPipeline", {}),
}
"""Pipelines that show the transformer the latents of a picture beside those that it makes."""


def made_of(kind: str, parts: DiffusionPipeline) -> DiffusionPipeline:
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    return tiny_pipelines.quiet(getattr(diffusers, kind)(**parts.components))


def upgraded_of(name: str) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        base = getattr(tiny_pipelines, name)()
        torch.manual_seed(5)
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=C).eval()
        torch.nn.init.normal_(autoencoder.detail_downsample.shortcut.weight, std=0.3)
    return upgrade(base, autoencoder)


def smooth(seed: int) -> Tensor:
    """A picture in [0, 1], [1, 3, 64, 64]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=SIDE, mode="bicubic").clamp(0, 1)


def settings() -> dict:
    told = {"height": SIDE, "width": SIDE, "num_inference_steps": 4, "max_sequence_length": 32}
    return {**told, "generator": torch.Generator().manual_seed(0)}


def pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture[0].mul(255).byte().permute(1, 2, 0).numpy())


def grid(latents: Tensor) -> Tensor:
    return unpack(latents, 8, 8) if latents.ndim == 3 else latents


@torch.no_grad()
@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_keeps_the_latents_of_what_is_not_masked(name: str) -> None:
    upgraded, (kind, guidance) = upgraded_of(name), INPAINTING[name]
    pipeline = made_of(kind, upgraded)
    image, mask = smooth(1), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1
    arguments = {"image": image, "mask_image": mask, "strength": 1.0, **guidance}
    made = grid(pipeline("red apple", output_type="latent", **arguments, **settings()).images)
    encoded = upgraded.vae.standardise(upgraded.vae.encode(image * 2 - 1).latent_dist.mode())
    if name == "flux2":  # its pipelines give them as the autoencoder takes them
        made = upgraded.vae.standardise(made)
    kept = (made - encoded)[..., :4].abs()
    assert kept[:, :C].max() < 1e-3
    assert kept[:, C:].mean() < 0.1 * (made - encoded)[:, C:, :, 4:].abs().mean()  # drawn from the posterior
    assert (made - encoded)[..., 4:].abs().mean() > 0.1
    picture = pipeline("red apple", output_type="pt", **arguments, **settings()).images
    assert picture.shape == image.shape


@torch.no_grad()
@pytest.mark.parametrize("name", CONDITIONED)
def test_a_picture_as_condition_has_its_say(name: str) -> None:
    upgraded, (kind, told) = upgraded_of(name), CONDITIONED[name]
    pipeline = made_of(kind, upgraded)
    one, again, other = (
        pipeline(image=pil(picture), prompt="red apple", output_type="pt", **told, **settings()).images
        for picture in (smooth(1), smooth(1), smooth(2))
    )
    assert one.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_stable_diffusion_3_inpainting_refuses_other_channels() -> None:
    """Its check is of 16 or 33 input channels, whatever the VAE's; docs/backbones.md says so."""
    upgraded = upgraded_of("sd3")
    pipeline = made_of("StableDiffusion3InpaintPipeline", upgraded)
    with pytest.raises(ValueError, match="16 input channels or 33 input channels, not 32"):
        pipeline("red apple", image=smooth(1), mask_image=torch.ones(1, 1, SIDE, SIDE), **settings())
