"""Tiny upgraded pipelines, and what tests do with them: encode, sample, record the calls of a method."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import tiny_pipelines
from davae.backbones import backbone_of
from davae.data.pictures import to_bytes
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.sampling import sample
from davae.pipelines.upgrade import upgrade

PROMPTS = ["red apple", "a pear"]
CLASSES = [1, 7]
TEXT_TOKENS = 32


def upgrade_tiny(base: DiffusionPipeline) -> DiffusionPipeline:
    """Upgrade a base by as many channels as it has; the detail encoder is made such that its latents vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=tiny_pipelines.CHANNELS).eval()
        torch.nn.init.normal_(autoencoder.detail_downsample.shortcut.weight, std=0.3)
    return tiny_pipelines.quiet(upgrade(base, autoencoder))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_images(pipeline: DiffusionPipeline, size: int | tuple[int, int], *, steps: int = 2, seed: int = 1) -> Tensor:
    """Two images in bytes, without guidance, by the stock pipeline; base and upgraded pipelines share their noise."""
    if backbone_of(pipeline.transformer).classes:
        if isinstance(size, tuple):
            pytest.skip("makes squares of one size")
        assert pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1) == size
        # The numbers of a narrow sample are the first of a wide one's.
        generator = [torch.Generator().manual_seed(seed + index) for index in (0, 1)]
        settings = {"guidance_scale": 1.0, "num_inference_steps": steps, "output_type": "pt"}
        return to_bytes(pipeline(CLASSES, generator=generator, **settings).images * 2 - 1)
    settings = {"guidance_scale": 1.0, "prompt_tokens": TEXT_TOKENS}
    return sample(pipeline, PROMPTS, size=size, seed=seed, steps=steps, **settings)


def encode_tiny(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The condition of two prompts, or of two classes."""
    backbone = backbone_of(pipeline.transformer)
    if backbone.classes:
        return backbone.condition(pipeline, CLASSES)
    return backbone.condition(pipeline, PROMPTS, max_sequence_length=TEXT_TOKENS)


def record_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[tuple[tuple, object]]:
    """Positional arguments and result of every call of a method from now on."""
    calls, method = [], getattr(owner, name)

    def seen(*arguments, **settings):
        calls.append((arguments, method(*arguments, **settings)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, seen)
    return calls
