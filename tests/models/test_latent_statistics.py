"""Statistics of the detail latents: the transformer sees unit scale, the image does not change."""

import pytest
import torch
from torch import nn

import tiny
from autoencoders import KINDS, images, trained
from davae import AutoencoderDA


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_statistics_change_the_latents_and_not_the_picture(base: str, linear: bool) -> None:
    autoencoder, image = trained(base, linear), images()
    mean, log_variance = autoencoder.encode_detail(image)
    expected = autoencoder.reconstruct(autoencoder.encode_base(image), mean)
    autoencoder.calibrate([image[:1], image[1:]])
    assert (autoencoder.detail_std - 1).abs().min() > 1e-3
    posterior = autoencoder.encode(image).latent_dist
    assert torch.allclose(autoencoder.decode(posterior.mode()).sample, expected, atol=1e-10)
    assert torch.allclose(autoencoder(image).sample, expected, atol=1e-10)
    _, detail = autoencoder.split(autoencoder.to_units(posterior.mode()))
    assert detail.mean((0, 2, 3)).abs().max() < 1e-9
    assert (detail.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-9
    # The deviation of a sample, brought back before standardisation, is the detail encoder's.
    deviation = autoencoder.split(posterior.std)[1] * autoencoder.config.scaling_factor
    assert torch.allclose(
        deviation * autoencoder.detail_std.view(1, -1, 1, 1), (0.5 * log_variance).exp(), rtol=1e-9, atol=0
    )


def test_statistics_follow_the_latents_to_where_they_are() -> None:
    autoencoder = trained("kl")
    mean, std = autoencoder.detail_mean, autoencoder.detail_std
    nn.Module.to(autoencoder, "meta")
    autoencoder.detail_mean, autoencoder.detail_std = mean, std
    latents = autoencoder.encode(images().to("meta")).latent_dist.mode()
    assert autoencoder.decode(latents).sample.is_meta


def test_samples_spread_as_the_detail_encoder_says() -> None:
    autoencoder, image = trained("tiny"), images(1, 8)
    autoencoder.calibrate([images()])
    posterior, generator = autoencoder.encode(image).latent_dist, torch.Generator().manual_seed(0)
    draws = torch.cat([autoencoder.to_units(posterior.sample(generator)) for _ in range(4000)])
    spread = autoencoder.split(draws)[1].std(dim=0)[:, 0, 0] * autoencoder.detail_std
    assert torch.allclose(spread, (0.5 * autoencoder.encode_detail(image)[1]).exp().flatten(), rtol=0.06)
    assert autoencoder.split(draws)[0].std(dim=0).max() < 1e-6


def test_calibration_does_not_depend_on_the_batches() -> None:
    autoencoder, image = trained("kl"), images(4)
    statistics = []
    for size in (1, 3, 4):
        autoencoder.calibrate(image.split(size))
        statistics.append(torch.cat([autoencoder.detail_mean, autoencoder.detail_std]))
    assert torch.allclose(statistics[0], statistics[1], atol=1e-12)
    assert torch.allclose(statistics[0], statistics[2], atol=1e-12)


def test_calibration_refuses_what_cannot_be_standardised() -> None:
    autoencoder = AutoencoderDA.from_base(tiny.tiny_vae().double(), detail_channels=4)
    with pytest.raises(ValueError, match="no images"):
        autoencoder.calibrate([])
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3\] do not vary"):
        autoencoder.calibrate([images()])
    autoencoder = trained("kl")
    with torch.no_grad():
        autoencoder.detail_downsample.shortcut.bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"\[2\] do not vary, or are not finite"):
        autoencoder.calibrate([images()])
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.calibrate([images(side=36)])
    with pytest.raises(ValueError, match=r"torch.uint8: give floats \[B, 3, H, W\] in"):
        autoencoder.calibrate([images(dtype=torch.uint8)])
    assert torch.equal(autoencoder.detail_std, torch.ones(8).double())
