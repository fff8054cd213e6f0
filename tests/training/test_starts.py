"""What the recipes of both stages start from: the code of the detail latents, and the new half of the ports."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from davae.data.sources import open_pictures
from davae.errors import SettingsError
from davae.method.closed_form import Code
from davae.method.losses import detail_alignment_loss
from davae.method.widen import PortsStart
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_one_start import start_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune


def recipe_for(base: Path, pictures: Path, **changes: object) -> AutoencoderRecipe:
    settings = {
        "base": str(base),
        "pictures": str(pictures),
        "size": 64,
        "crop": 32,
        "detail_channels": 8,
        "fit_pictures": 8,
        "steps": 1,
        "batch_size": 2,
        "precision": "float32",
        "heldout_pictures": 1,
        "calibration_pictures": 100,
        "loss": LossWeights(lpips=0.0),
    }
    return AutoencoderRecipe(**(settings | changes))


@torch.no_grad()
def test_every_code_starts_with_the_same_picture_but_zero_sum_which_is_aligned(
    base_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    pictures = open_pictures(picture_folder, size=64, split="train")
    image = pictures.batch(range(4))
    made, aligned = {}, {}
    codes: dict[Code, float] = {
        "aligned": 0.3,
        "unit variance": 0.3,
        "residual": 0.3,
        "base added": 0.3,
        "zero sum": 0.0,
    }

    for code, least in codes.items():
        recipe = recipe_for(base_folder, picture_folder, code=code)
        autoencoder = start_autoencoder(recipe, pictures, tmp_path / code / "start")
        base, detail = autoencoder.encode_base(image), autoencoder.encode_detail(image)[0]
        made[code], aligned[code] = autoencoder(image).sample, detail_alignment_loss(detail, base).item()
        assert aligned[code] >= least

    assert torch.allclose(made["base added"], made["aligned"], atol=1e-4)
    assert torch.allclose(made["residual"], made["aligned"], atol=1e-4)
    assert torch.allclose(made["unit variance"], made["aligned"], atol=1e-4)
    assert not torch.allclose(made["zero sum"], made["aligned"], atol=1e-2)
    assert aligned["zero sum"] < 1e-8


def test_a_code_that_holds_the_base_is_trained_saved_and_loaded(
    base_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(base_folder, picture_folder, code="zero sum", steps=3, learning_rate=1e-2, warmup_steps=1)
    autoencoder = load_autoencoder(train_autoencoder(recipe, tmp_path))
    start = load_autoencoder(tmp_path / "start")
    assert autoencoder.config.base_in_detail
    assert not torch.equal(autoencoder.detail_from_base.weight, start.detail_from_base.weight)

    pictures = open_pictures(picture_folder, size=64, split="train")
    image = pictures.batch(range(len(pictures)))
    with torch.no_grad():
        base = autoencoder.encode_base(image)
        mean = autoencoder.encode_detail(image)[0]
        given = autoencoder.encode_detail(image, base)[0]
        without = autoencoder.encode_detail(image, torch.zeros_like(base))[0]
        added = functional.conv2d(base, autoencoder.detail_from_base.weight)
        units = autoencoder.split(autoencoder.to_units(autoencoder.encode(image).latent_dist.mode()))[1]

    assert torch.equal(mean, given)
    assert torch.allclose(mean - without, added, atol=1e-4)
    # calibration has seen the base, too
    assert units.mean((0, 2, 3)).abs().max() < 1e-4
    assert (units.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_one_group_of_one_channel_cannot_sum_to_zero(base_folder: Path, picture_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="0 components: give detail_channels from 8"):
        train_autoencoder(recipe_for(base_folder, picture_folder, code="zero sum", detail_channels=4), tmp_path)


def test_stage_two_starts_its_ports_as_the_recipe_says(
    base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    ports = {}
    starts: tuple[PortsStart, ...] = ("random", "repeat")
    for start in starts:
        recipe = FinetuneRecipe(
            base=str(base_folder),
            autoencoder=str(autoencoder_folder),
            pictures=str(picture_folder),
            size=64,
            trained="layers",
            ports_start=start,
            steps=1,
            batch_size=1,
            learning_rate=1e-9,
            prompt_tokens=8,
            precision="float32",
        )
        pipeline = load_pipeline(finetune(recipe, tmp_path / start))
        adapted = load_pipeline(base_folder, adapter=tmp_path / start / "adapter")
        ports[start] = pipeline.transformer.pos_embed.proj.weight
        assert torch.equal(adapted.transformer.pos_embed.proj.weight, ports[start])

    base = load_pipeline(base_folder).transformer.pos_embed.proj.weight
    near = {"atol": 1e-6, "rtol": 0}
    assert torch.allclose(ports["random"][:, :4], base, **near)
    assert ports["random"][:, 4:].abs().max() > 0.1
    assert torch.allclose(ports["repeat"][:, :4], base / 3, **near)
    assert torch.allclose(ports["repeat"][:, 4:], base.repeat_interleave(2, dim=1) / 3, **near)
