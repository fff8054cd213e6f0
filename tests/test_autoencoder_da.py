"""AutoencoderDA: its two halves, the diffusers contract, statistics, slicing and tiling."""

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import nn

import tiny
from davae import AutoencoderDA
from davae.autoencoder_da import DetailDownsample, DetailUpsample
from davae.upgrade import upgrade

BASES = {"kl": tiny.tiny_vae, "tiny": tiny.tiny_taesd}
KINDS = list(itertools.product(BASES, (True, False)))


def pictures(count: int = 2, side: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, side, side, generator=generator) * 2 - 1).to(dtype)


def trained(base: str, linear_blocks: bool, **settings) -> AutoencoderDA:
    """As after training: nothing is zero any more."""
    detail_channels = 8 if linear_blocks else 4  # the paper's shortcut repeats channels a whole number of times
    autoencoder = AutoencoderDA.from_base(
        BASES[base](), detail_channels=detail_channels, linear_blocks=linear_blocks, **settings
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in (autoencoder.detail_downsample, autoencoder.detail_upsample):
            for parameter in block.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return autoencoder.eval()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_blocks_have_the_references_parameters() -> None:
    assert count(DetailDownsample(512, 192)) == 614_448
    assert count(DetailDownsample(512, 32)) == 36_872
    assert count(DetailUpsample(128, 512)) == 2_361_344
    assert count(DetailUpsample(32, 512)) == 591_872
    assert not DetailDownsample(512, 192).shortcut.weight.any()


def test_downsample_is_the_block_of_diffusers() -> None:
    ours, theirs = DetailDownsample(16, 8).double(), DCDownBlock2d(16, 8, downsample=True, shortcut=True).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    hidden = torch.randn(2, 16, 6, 4).double()
    assert torch.equal(ours(hidden), theirs(hidden))


def test_upsample_is_the_block_of_diffusers() -> None:
    ours, theirs = DetailUpsample(8, 16).double(), DCUpBlock2d(8, 16, interpolate=False, shortcut=True).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    hidden = torch.randn(2, 8, 3, 5).double()
    assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_base_half_is_the_bases_own_latents_of_the_small_picture(base: str, linear: bool) -> None:
    autoencoder, vae, image = trained(base, linear), BASES[base](), pictures()
    encoded = vae.encode(autoencoder.base_picture(image))
    expected = encoded.latent_dist.mode() if base == "kl" else encoded.latents
    half, _ = autoencoder.split(autoencoder.encode(image).latent_dist.mode())
    assert torch.allclose(half, expected, atol=1e-6)
    assert half.shape == (2, 4, 4, 4)


@pytest.mark.parametrize(("shift", "quant"), [(None, True), (0.3, True), (0.3, False)])
def test_quant_convolutions_and_shifts(shift: float | None, quant: bool) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, shift_factor=shift, use_quant_conv=quant, use_post_quant_conv=quant
    ).eval()
    autoencoder, image = AutoencoderDA.from_base(vae, detail_channels=4).eval(), pictures(1, 16)
    half, _ = autoencoder.split(autoencoder.encode(image).latent_dist.mode())
    assert torch.allclose(half, vae.encode(autoencoder.base_picture(image)).latent_dist.mode(), atol=1e-6)
    # Untrained, the full picture's latents are the base's, each on 2x2 positions, whatever the detail latents say.
    enlarged = half.repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = torch.randn_like(half)
    made = autoencoder.decode(torch.cat([half, noise], dim=1)).sample
    assert torch.allclose(made, vae.decode(enlarged).sample, atol=1e-5)


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_everything_but_the_base_is_trained(base: str, linear: bool) -> None:
    autoencoder, image = trained(base, linear).train(), pictures()
    mean, log_variance = autoencoder.encode_detail(image)
    made = autoencoder.reconstruct(autoencoder.encode_base(image), mean + log_variance)
    made.square().sum().backward()
    without = {name for name, parameter in autoencoder.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in autoencoder.named_parameters() if name.startswith("base_")}
    assert not autoencoder.base_encoder.training
    trainable = {id(parameter) for parameter in autoencoder.detail_parameters()}
    assert trainable == {id(p) for name, p in autoencoder.named_parameters() if name not in without}


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_statistics_change_the_latents_and_not_the_picture(base: str, linear: bool) -> None:
    autoencoder, image = trained(base, linear).double(), pictures(dtype=torch.float64)
    mean, log_variance = autoencoder.encode_detail(image)
    expected = autoencoder.reconstruct(autoencoder.encode_base(image), mean)
    autoencoder.calibrate([image[:1], image[1:]])
    posterior = autoencoder.encode(image).latent_dist
    assert torch.allclose(autoencoder.decode(posterior.mode()).sample, expected, atol=1e-9)
    _, detail = autoencoder.split(autoencoder.to_units(posterior.mode()))
    assert torch.allclose(detail.mean((0, 2, 3)), torch.zeros_like(autoencoder.detail_mean), atol=1e-6)
    assert torch.allclose(detail.std((0, 2, 3), correction=0), torch.ones_like(autoencoder.detail_mean), atol=1e-6)
    # The deviation of a sample, brought back before standardisation, is the detail encoder's.
    deviation = autoencoder.split(posterior.std)[1] * autoencoder.config.scaling_factor
    back = deviation * autoencoder.detail_std.view(1, -1, 1, 1)
    assert torch.allclose(back, (0.5 * log_variance).exp(), rtol=1e-6)


def test_calibration_refuses_what_cannot_be_standardised() -> None:
    autoencoder = AutoencoderDA.from_base(tiny.tiny_vae(), detail_channels=4)
    with pytest.raises(ValueError, match="do not vary"):
        autoencoder.calibrate([pictures()])
    with pytest.raises(ValueError, match="no pictures"):
        autoencoder.calibrate([])


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_saved_and_loaded_bit_for_bit(base: str, linear: bool, tmp_path: Path) -> None:
    autoencoder, image = trained(base, linear), pictures()
    autoencoder.calibrate([image])
    autoencoder.save_pretrained(tmp_path)
    again = AutoencoderDA.from_pretrained(tmp_path).eval()
    assert type(again).__module__ == "davae"
    assert torch.equal(again(image).sample, autoencoder(image).sample)
    half = AutoencoderDA.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    made = half(image.bfloat16()).sample
    assert made.dtype == torch.bfloat16
    assert made.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nearest is 8"):
        AutoencoderDA.from_base(tiny.tiny_vae(), detail_channels=7)
    config = AutoencoderDA.from_base(tiny.tiny_vae(), detail_channels=4).config
    with pytest.raises(ValueError, match="AutoencoderDC"):
        AutoencoderDA.from_config({**config, "base_config": {"_class_name": "AutoencoderDC"}})
    with pytest.raises(ValueError, match="base_downsample"):
        AutoencoderDA.from_base(tiny.tiny_vae(), detail_channels=4, base_downsample="lanczos")
    autoencoder = AutoencoderDA.from_base(tiny.tiny_vae(), detail_channels=4)
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.encode(pictures(side=36))
    with pytest.raises(ValueError, match="4 base \\+ 4 detail"):
        autoencoder.decode(torch.zeros(1, 4, 4, 4))


def test_slices_are_the_whole() -> None:
    autoencoder, image = trained("kl", True), pictures(3)
    whole = autoencoder(image).sample
    autoencoder.enable_slicing()
    assert torch.allclose(autoencoder(image).sample, whole, atol=1e-5)


@pytest.mark.parametrize("side", [64, 72, 104])
def test_tiles_join_without_a_seam(side: int) -> None:
    # AutoencoderTiny has no norms and no attention: a tile's middle does not know that it is one.
    autoencoder = trained("tiny", True)
    ramp = torch.linspace(-0.8, 0.8, side)
    image = torch.stack([ramp[:, None].expand(side, side), ramp.expand(side, side), ramp[:, None] * ramp])[None]
    latents = autoencoder.encode(image).latent_dist.mode()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size, autoencoder.tile_overlap = 56, 0.5
    tiled = autoencoder.decode(latents).sample
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() < 2 / 255
    assert autoencoder.encode(image).latent_dist.mode().shape == latents.shape


def test_stock_pipeline_runs_it_at_twice_the_size() -> None:
    base = tiny.tiny_sd3_pipeline()
    autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=base.vae.config.latent_channels)
    upgraded = upgrade(base, autoencoder)
    assert type(upgraded) is type(base)
    assert upgraded.vae_scale_factor == 2 * base.vae_scale_factor
    small = base("a", num_inference_steps=1, max_sequence_length=8).images[0]
    large = upgraded("a", num_inference_steps=1, max_sequence_length=8).images[0]
    assert large.size == (2 * small.width, 2 * small.height)
