"""The reference's "full" mode: an AutoencoderDA with base_channels = 0, whose latents are all the detail encoder's."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from davae import AutoencoderDA, upgrade
from davae.errors import SettingsError
from davae.method.closed_form import fit_closed_form
from davae.pipelines.autoencoders import load_autoencoder
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder

BASES = {"kl": tiny.tiny_vae, "tiny": tiny.tiny_taesd}
KINDS = list(itertools.product(BASES, (True, False)))


def pictures(count: int = 2, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=generator, dtype=torch.float64) * 2 - 1
    return F.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(-1, 1)


def all_new(base: str = "kl", linear_blocks: bool = True, channels: int = 8) -> AutoencoderDA:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = BASES[base]().double()
        return AutoencoderDA.from_base(vae, detail_channels=channels, linear_blocks=linear_blocks, all_new=True)


def latents_of(vae, image: Tensor) -> Tensor:
    encoded = vae.encode(image)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


@torch.no_grad()
@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_all_latents_are_the_detail_encoders(base: str, linear: bool) -> None:
    autoencoder, image = all_new(base, linear), pictures()
    posterior = autoencoder.encode(image).latent_dist
    assert posterior.mode().shape == (2, 8, 4, 4)
    shares = autoencoder.split(posterior.mode())
    assert [share.shape[1] for share in shares] == [0, 8]
    assert autoencoder.encode_base(image).shape == (2, 0, 4, 4)
    torch.testing.assert_close(autoencoder.to_units(posterior.mode()), autoencoder.encode_detail(image)[0])
    assert autoencoder.decode(posterior.mode()).sample.shape == image.shape
    config = autoencoder.config
    assert (config.base_channels, config.detail_channels, config.latent_channels) == (0, 8, 8)
    assert autoencoder.downsample_factor == 8
    with pytest.raises(ValueError, match=r"9 channels.*8 \(0 base \+ 8 detail\)"):
        autoencoder.decode(torch.zeros(1, 9, 4, 4).double())


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_there_is_no_frozen_part_and_no_weight_that_rests(base: str, linear: bool) -> None:
    autoencoder, image = all_new(base, linear).train(), pictures()
    assert not any(name.startswith("base_") for name in autoencoder.state_dict())
    assert len(autoencoder.detail_parameters()) == len(list(autoencoder.parameters()))
    mean, log_variance = autoencoder.encode_detail(image)
    made = autoencoder.reconstruct(autoencoder.encode_base(image), mean + log_variance.exp())
    (made - image).square().mean().backward()
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
def test_linear_blocks_start_at_the_full_pictures_latents_averaged(base: str) -> None:
    vae, autoencoder, image = BASES[base]().double(), all_new(base), pictures()
    full = latents_of(vae, image)
    averaged = F.avg_pool2d(full, 2)
    found = autoencoder.encode(image).latent_dist.mode()
    torch.testing.assert_close(found[:, :4], averaged)
    expected = vae.decode(F.interpolate(averaged, scale_factor=2, mode="nearest")).sample
    torch.testing.assert_close(autoencoder.decode(found).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("base", BASES)
def test_in_closed_form_with_all_directions_it_is_the_base_at_full_size(base: str) -> None:
    autoencoder, image = all_new(base, channels=16), pictures(8)
    facts = fit_closed_form(autoencoder, image, metric_pictures=2, code="unit variance")
    assert facts["unexplained"][0] < 1e-12
    vae = BASES[base]().double()
    torch.testing.assert_close(autoencoder(image).sample, vae.decode(latents_of(vae, image)).sample)
    fewer, errors = all_new(base, channels=8), []
    for start in (False, True):
        if start:
            fit_closed_form(fewer, image, metric_pictures=2, code="unit variance")
        errors.append((fewer(image).sample - autoencoder(image).sample).square().mean().item())
    assert errors[1] < errors[0]
    with pytest.raises(SettingsError, match="this code needs base latents"):
        fit_closed_form(fewer, image)


@torch.no_grad()
@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_calibrated_and_saved_it_is_the_same_picture_of_standard_latents(base: str, linear: bool, tmp_path) -> None:
    autoencoder, image = all_new(base, linear).eval(), pictures(4)
    if linear:
        fit_closed_form(autoencoder, image, metric_pictures=1, code="unit variance")
    before = autoencoder(image).sample
    autoencoder.calibrate([image])
    torch.testing.assert_close(autoencoder(image).sample, before)
    units = autoencoder.to_units(autoencoder.encode(image).latent_dist.mode())
    deviations = units.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(deviations, torch.ones_like(deviations))
    autoencoder.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path, dtype=torch.float64)
    assert json.loads((tmp_path / "config.json").read_text())["base_channels"] == 0
    torch.testing.assert_close(again(image).sample, autoencoder(image).sample)


def test_it_has_no_warm_start() -> None:
    pipeline = tiny.tiny_sd3_pipeline()
    autoencoder = AutoencoderDA.from_base(pipeline.vae, detail_channels=8, all_new=True)
    with pytest.raises(SettingsError, match="pretrained transformer cannot start from them"):
        upgrade(pipeline, autoencoder)


def test_channels_that_base_and_detail_could_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"detail_channels=6.*nearest is 8"):
        all_new(channels=6)


# ------------------------------------------------------------------------------------------------------------ stage 1


def recipe_for(base: Path, scenes: Path, **changes: object) -> AutoencoderRecipe:
    settings = {
        "base": str(base), "pictures": str(scenes), "size": 64, "crop": 32, "latents": "full", "start": "random",
        "detail_channels": 8, "steps": 21, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 1, "ema_decay": 0.5,
        "precision": "float32", "evaluate_every": 21, "heldout_pictures": 2,
        "latent_noise": 0.1, "loss": LossWeights(lpips=0, alignment=0),
    }  # fmt: skip
    return AutoencoderRecipe(**(settings | changes))


def test_stage_1_trains_it(base_folder: Path, picture_folder: Path, tmp_path: Path) -> None:
    made = train_autoencoder(recipe_for(base_folder, picture_folder), tmp_path)
    autoencoder = load_autoencoder(made)
    assert (autoencoder.config.base_channels, autoencoder.config.latent_channels) == (0, 8)
    assert (autoencoder.detail_std != 1).all()  # calibrated
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert all(line["alignment"] == 0 for line in lines)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_stage_1_aligns_nothing_with_nothing(base_folder: Path, picture_folder: Path, tmp_path: Path) -> None:
    chosen = recipe_for(base_folder, picture_folder, loss=LossWeights(lpips=0))
    with pytest.raises(SettingsError, match=r'alignment=0.5: latents="full" has nothing to align'):
        train_autoencoder(chosen, tmp_path)
