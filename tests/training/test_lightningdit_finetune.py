"""Stage 2 of LightningDiT, class-conditional, through its own pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import tiny
from davae.backbones import BACKBONES, backbone_of
from davae.data.sources import open_pictures
from davae.method.flow import interpolate
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from davae.seeds import generator
from davae.training.stage_two_inputs import cache_latents
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from scenes import scene

pytestmark = pytest.mark.skipif("LightningDiT2DModel" not in BACKBONES, reason="LightningDiT is not here yet")


@torch.no_grad()
def detail_error(pipeline: DiffusionPipeline, latents: Tensor, classes: list[int]) -> float:
    """Mean squared error of the detail channels' velocity, at fixed noise."""
    backbone = backbone_of(pipeline.transformer)
    noise = torch.randn(latents.shape, generator=generator(9, "test"))
    sigma = torch.tensor([0.3, 0.5, 0.7]).repeat(len(latents))[: len(latents)]
    noisy = interpolate(latents, noise, sigma)
    velocity = backbone.velocity(pipeline.transformer, noisy, sigma, backbone.condition(pipeline, classes))
    return (velocity - (noise - latents))[:, 4:].square().mean().item()


def test_a_lightningdit_learns_the_detail_latents(tmp_path: Path) -> None:
    base = tiny.tiny_class_pipeline()
    base_folder = tmp_path / "base"
    save_pipeline(base, base_folder)
    for index in range(12):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(scene(index)).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.cls").write_text(str(index % 10))

    autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=12, linear_blocks=False).eval()
    pictures = open_pictures(tmp_path / "pictures", size=64, split="train", classes=True)
    autoencoder.calibrate([pictures.batch(range(len(pictures)))])
    autoencoder.save_pretrained(tmp_path / "autoencoder")

    recipe = FinetuneRecipe(
        base=str(base_folder),
        autoencoder=str(tmp_path / "autoencoder"),
        pictures=str(tmp_path / "pictures"),
        size=64,
        trained="full",
        steps=40,
        batch_size=6,
        learning_rate=3e-2,
        warmup_steps=0,
        detail_warmup_steps=5,
        caption_dropout=0.5,
        ema_decay=0.5,
        precision="float32",
    )

    finetune(recipe, tmp_path / "run")
    start, pipeline = upgrade(load_pipeline(base_folder), autoencoder), load_pipeline(tmp_path / "run" / "pipeline")
    latents = cache_latents(autoencoder, pictures, tmp_path / "run" / "cache")(range(len(pictures)), 0)
    before, after = (detail_error(model, latents, pictures.classes) for model in (start, pipeline))
    assert after < 0.95 * before

    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    images = pipeline([1, 9], num_inference_steps=3, output_type="pt", generator=random).images
    assert images.shape == (2, 3, 64, 64)
    assert type(pipeline) is type(base)
