"""Per-channel statistics of the base: the transformer sees (z - mean) / std * scaling_factor, pipelines two scalars.

The calculations are numpy float64, diffusers' convention for latents_mean and latents_std and for the two scalars.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import tiny
from autoencoders import disturb_blocks
from davae import AutoencoderDA, upgrade
from davae.errors import SettingsError

MEAN = [0.3, -1.2, 0.05, 2.0]
STD = [0.5, 2.5, 1.25, 0.01]
SCALING, SHIFT = 1.5, 0.1  # tiny_vae's


def vae_of(mean: list[float] | None = MEAN, std: list[float] | None = STD) -> AutoencoderKL:
    plain = tiny.tiny_vae()
    config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    vae = AutoencoderKL(**{**config, "latents_mean": mean, "latents_std": std})
    vae.load_state_dict(plain.state_dict())
    return vae.eval()


def autoencoder_of(mean: list[float] | None = MEAN, std: list[float] | None = STD, *, linear: bool) -> AutoencoderDA:
    autoencoder = AutoencoderDA.from_base(vae_of(mean, std).double(), detail_channels=4, linear_blocks=linear)
    disturb_blocks(autoencoder)
    return autoencoder


def picture() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
def test_base_latents_in_units_are_standardised_by_the_bases_own_statistics(linear: bool) -> None:
    autoencoder, vae, image = autoencoder_of(linear=linear), vae_of().double(), picture()
    raw = vae.encode(autoencoder.base_picture(image)).latent_dist.mode().numpy()
    mean, std = (np.array(numbers).reshape(1, -1, 1, 1) for numbers in (MEAN, STD))
    encoded = autoencoder.encode(image).latent_dist.mode()[:, :4].numpy()
    units = (encoded - SHIFT) * SCALING  # what a stock pipeline does
    assert np.allclose(units, (raw - mean) / std * SCALING, rtol=1e-11, atol=1e-11)
    assert np.allclose(autoencoder.encode_base(image).numpy(), (raw - SHIFT) * SCALING, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
def test_statistics_of_the_base_change_its_latents_and_nothing_else(linear: bool) -> None:
    plain, ours, image = autoencoder_of(None, None, linear=linear), autoencoder_of(linear=linear), picture()
    for autoencoder in (plain, ours):
        autoencoder.calibrate([image])
    before, after = plain.encode(image).latent_dist.mode(), ours.encode(image).latent_dist.mode()
    assert not torch.allclose(before[:, :4], after[:, :4], atol=0.01)
    assert torch.equal(before[:, 4:], after[:, 4:])
    assert torch.allclose(ours.decode(after).sample, plain.decode(before).sample, atol=1e-10)
    assert ours.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_without_statistics_every_bit_is_that_of_two_scalars() -> None:
    autoencoder, vae, image = autoencoder_of(None, None, linear=True).float(), tiny.tiny_vae(), picture().float()
    units = (vae.encode(autoencoder.base_picture(image)).latent_dist.mode() - SHIFT) * SCALING
    latents = autoencoder.encode(image).latent_dist.mode()
    assert torch.equal(latents[:, :4], units / SCALING + SHIFT)
    shown = (latents - SHIFT) * SCALING
    detail = shown[:, 4:] * autoencoder.detail_std.view(1, -1, 1, 1) + autoencoder.detail_mean.view(1, -1, 1, 1)
    assert torch.equal(autoencoder.decode(latents).sample, autoencoder.reconstruct(shown[:, :4], detail))


def test_they_survive_saving(tmp_path: Path) -> None:
    autoencoder = autoencoder_of(linear=False).float()
    autoencoder.save_pretrained(tmp_path)
    again, image = AutoencoderDA.from_pretrained(tmp_path), picture().float()
    assert json.loads((tmp_path / "config.json").read_text())["base_config"]["latents_std"] == STD
    assert torch.equal(again.encode(image).latent_dist.mode(), autoencoder.encode(image).latent_dist.mode())
    assert torch.equal(again(image).sample, autoencoder(image).sample)


@pytest.mark.parametrize(
    ("mean", "std"),
    [(MEAN, None), (None, STD), (MEAN[:3], STD[:3]), (MEAN, [*STD[:3], 0.0]), (MEAN, [*STD[:3], float("nan")])],
    ids=["no deviations", "no means", "three channels", "a deviation of 0", "a deviation of nan"],
)
def test_statistics_that_are_refused(mean: list[float] | None, std: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"latents_mean and latents_std .* 4 numbers each"):
        AutoencoderDA.from_base(vae_of(mean, std), detail_channels=4)


def test_an_upgrade_wants_the_statistics_of_its_pipeline() -> None:
    base = tiny.tiny_sd3_pipeline(vae=vae_of())
    assert upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4)).vae.config.base_config[
        "latents_mean"
    ] == pytest.approx(MEAN)
    others = [vae_of(None, None), vae_of([0.3, -1.2, 0.05, 2.1]), vae_of(std=[0.5, 2.5, 1.25, 0.02])]
    for other in others:
        with pytest.raises(SettingsError, match=r"its latents_(mean|std) is"):
            upgrade(base, AutoencoderDA.from_base(other, detail_channels=4))


def test_the_reference_filter_for_imagenet_is_not_clamped() -> None:
    settings = {"detail_channels": 4, "base_downsample": "bicubic-unclamped"}
    autoencoder = AutoencoderDA.from_base(tiny.tiny_vae().double(), **settings)
    edge = torch.ones(1, 3, 16, 16).double()
    edge[..., 8:] = -1
    # Cubic convolution (Keys 1981) with torch's a = -0.75, at distances 1.5, 0.5, 0.5 and 1.5; borders are repeated.
    kernel = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
    row = np.pad(edge[0, 0, 0].numpy(), (1, 2), mode="edge")
    expected = np.array([kernel @ row[2 * i : 2 * i + 4] for i in range(8)])
    small = autoencoder.base_picture(edge)
    assert np.allclose(small.numpy(), np.broadcast_to(expected, (1, 3, 8, 8)), atol=1e-12)
    assert small.abs().max() > 1.1
    clamped = AutoencoderDA.from_base(tiny.tiny_vae().double(), detail_channels=4, base_downsample="bicubic")
    assert torch.equal(small.clamp(-1, 1), clamped.base_picture(edge))
