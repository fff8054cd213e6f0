"""AutoencoderDA: its two halves, and the diffusers contract."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

import tiny
from autoencoders import BASES, KINDS, images, quantised_kl, trained
from davae import AutoencoderDA
from davae.pipelines.upgrade import upgrade


def latents_of(vae: nn.Module, image: Tensor) -> Tensor:
    encoded = vae.encode(image)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_base_half_is_the_bases_own_latents_of_the_small_picture(base: str, linear: bool) -> None:
    autoencoder, vae, image = trained(base, linear), BASES[base]().double(), images()
    expected = latents_of(vae, autoencoder.base_picture(image))
    latents = autoencoder.encode(image).latent_dist.mode()
    half, detail = autoencoder.split(latents)
    assert torch.allclose(half, expected, atol=1e-12)
    assert torch.equal(torch.cat([half, detail], dim=1), latents)
    side = 32 // autoencoder.downsample_factor
    assert detail.shape == (2, autoencoder.config.detail_channels, side, side)
    sample = autoencoder.encode(image).latent_dist.sample()
    assert torch.allclose(autoencoder.split(sample)[0], expected, atol=1e-5)  # it is sampled, but with no deviation


def test_base_picture_is_a_picture() -> None:
    autoencoder = trained("tiny")
    checks = torch.ones(1, 3, 16, 16).double()
    checks[..., 8:] = -1
    small = autoencoder.base_picture(checks)
    assert small.shape == (1, 3, 8, 8)
    assert small.abs().max() == 1  # a bicubic filter overshoots at an edge
    assert torch.allclose(small[..., :2], torch.ones(1, 3, 8, 2).double(), atol=1e-12)
    assert autoencoder.base_picture(checks.bfloat16()).dtype == torch.bfloat16
    third = torch.full((1, 3, 16, 16), 1 / 3).double()
    assert torch.allclose(autoencoder.base_picture(third), third[..., ::2, ::2], atol=1e-12)  # not through float32


def test_the_filter_is_the_configs() -> None:
    image, made = images(), {}
    for name, antialias in (("bicubic", False), ("bicubic-antialias", True)):
        made[name] = trained("tiny", base_downsample=name).base_picture(image)
        expected = F.interpolate(image, size=(16, 16), mode="bicubic", align_corners=False, antialias=antialias)
        assert torch.allclose(made[name], expected.clamp(-1, 1), atol=1e-12)
    assert (made["bicubic"] - made["bicubic-antialias"]).abs().max() > 0.1


@pytest.mark.parametrize("base", BASES)
def test_untrained_it_shows_the_enlarged_base_latents(base: str) -> None:
    vae, image = BASES[base]().double(), images()
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=8)
    half, detail = autoencoder.split(autoencoder.encode(image).latent_dist.mode())
    enlarged = half.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    made = autoencoder.decode(torch.cat([half, torch.randn_like(detail)], dim=1)).sample
    assert torch.allclose(made, vae.decode(enlarged).sample, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_inside_the_linear_blocks_is_the_pretrained_autoencoder_at_full_size(base: str) -> None:
    vae, image = BASES[base]().double(), images()
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=4)
    full = autoencoder.encode_pretrained(image)
    assert torch.allclose(autoencoder.from_units(full), latents_of(vae, image), atol=1e-12)
    latents = 5 * torch.randn(full.shape, generator=torch.Generator().manual_seed(0)).double()  # some saturate
    made = autoencoder.decode_full(autoencoder.to_units(latents))
    assert torch.allclose(made, vae.decode(latents).sample, atol=1e-12)


@pytest.mark.parametrize("linear", [True, False])
def test_the_bases_weights_are_copied_and_its_mode_and_dtype_are_kept(linear: bool) -> None:
    vae = quantised_kl().bfloat16()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=4, linear_blocks=linear)
    assert autoencoder.dtype == torch.bfloat16
    assert not autoencoder.training
    assert AutoencoderDA.from_base(vae.train(), detail_channels=4).training
    for part in ("base_encoder", "base_quant_conv", "detail_encoder", "joint_decoder"):
        for name, tensor in getattr(autoencoder, part).state_dict().items():
            assert torch.equal(tensor, before[f"{part.partition('_')[2]}.{name}"])
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


# A posterior's mode reads the first half of what the pretrained encoder ends in: the second half has no gradient.
HALF_READ = {
    ("kl", True): {"detail_encoder.conv_out.weight", "detail_encoder.conv_out.bias"},
    ("quantised kl", True): {"detail_quant_conv.weight", "detail_quant_conv.bias"},
}


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_everything_but_the_base_is_trained(base: str, linear: bool) -> None:
    autoencoder, image = trained(base, linear).train(), images()
    mean, log_variance = autoencoder.encode_detail(image)
    detail = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    autoencoder.reconstruct(autoencoder.encode_base(image), detail).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in autoencoder.named_parameters()}
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {name for name in gradients if name.startswith("base_")}
    trainable = {id(parameter) for parameter in autoencoder.detail_parameters()}
    assert trainable == {id(p) for name, p in autoencoder.named_parameters() if name not in without}

    still = {name for name in gradients.keys() - without if gradients[name].abs().max() < 1e-9}
    # Adding one vector to all keys shifts every row of an attention's logits, which a softmax does not see.
    assert still == {name for name in gradients.keys() - without if name.endswith("to_k.bias")}
    half_read = HALF_READ.get((base, linear), set())
    for name in half_read:
        read, unread = gradients[name].chunk(2)
        assert read.flatten(1).any(dim=1).all() if read.ndim > 1 else read.all()
        assert not unread.any()
    rest = gradients.keys() - without - still - half_read
    assert all(gradients[name].chunk(2)[-1].any() for name in rest)


def test_training_mode_leaves_the_base_alone() -> None:
    autoencoder = trained("kl").train()
    assert autoencoder.training
    assert autoencoder.joint_decoder.training
    assert not any(module.training for module in autoencoder.base_encoder.modules())


# ----------------------------------------------------------------------------------------------- the diffusers contract


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_saved_and_loaded_bit_for_bit(base: str, linear: bool, tmp_path: Path) -> None:
    autoencoder, image = trained(base, linear).float(), images(dtype=torch.float32)
    autoencoder.calibrate([image])
    autoencoder.save_pretrained(tmp_path)
    again = AutoencoderDA.from_pretrained(tmp_path)
    assert torch.equal(again(image).sample, autoencoder(image).sample)
    trainable = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (autoencoder, again)]
    assert trainable[0] == trainable[1]
    assert not again.training


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loaded_in_half_precision(base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    autoencoder, image = trained(base).float(), images(dtype=torch.float32)
    autoencoder.calibrate([image])
    autoencoder.save_pretrained(tmp_path)
    half = AutoencoderDA.from_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {dtype}
    latents, made = half.encode(image.to(dtype)).latent_dist.mode(), half(image.to(dtype)).sample
    assert made.dtype == latents.dtype == dtype
    for ours, exact in ((latents, autoencoder.encode(image).latent_dist.mode()), (made, autoencoder(image).sample)):
        assert (ours.float() - exact).std() < 0.1 * exact.std()


def test_the_config_survives_json() -> None:
    for base, linear in KINDS:
        autoencoder = trained(base, linear)
        config = json.loads(autoencoder.to_json_string())
        again = AutoencoderDA.from_config(config)
        again.load_state_dict(autoencoder.state_dict())
        assert json.loads(again.to_json_string()) == config
        assert config["_class_name"] == "AutoencoderDA"
        assert config["latent_channels"] == config["base_channels"] + config["detail_channels"]
        assert again.config.block_out_channels[:-1] == list(BASES[base]().config.block_out_channels)
        assert again.downsample_factor == autoencoder.downsample_factor


def test_its_module_is_the_frozen_public_name() -> None:
    assert AutoencoderDA.__module__ == "davae"


def test_tuples_for_those_who_ask() -> None:
    autoencoder, image = trained("kl"), images()
    (posterior,), latents = autoencoder.encode(image, return_dict=False), autoencoder.encode(image).latent_dist.mode()
    assert torch.equal(posterior.mode(), latents)
    assert torch.equal(autoencoder.decode(latents, return_dict=False)[0], autoencoder.decode(latents).sample)
    draws = [
        autoencoder(image, sample_posterior=True, generator=torch.Generator().manual_seed(s)).sample for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detail_channels": 7}, "nearest is 8"),
        ({"detail_channels": 5}, "nearest is 4"),
        ({"detail_channels": 0}, "nearest is 4"),
        ({"detail_channels": -4}, "nearest is 4"),
        ({"detail_channels": 4, "base_downsample": "lanczos"}, "'lanczos'.*bicubic, bicubic-antialias"),
        ({"detail_channels": 4, "all_new": True, "base_in_detail": True}, "there are no base latents to add"),
    ],
)
def test_settings_that_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderDA.from_base(tiny.tiny_vae(), **settings)


class SomebodysOwn(AutoencoderKL):
    """It may encode in its own way."""


def test_bases_and_factors_that_are_refused() -> None:
    config = json.loads(trained("kl").to_json_string())
    with pytest.raises(ValueError, match="VQModel is not supported; allowed are AutoencoderKL, AutoencoderTiny"):
        AutoencoderDA.from_config({**config, "base_config": {"_class_name": "VQModel"}})
    with pytest.raises(ValueError, match="SomebodysOwn is not supported"):
        AutoencoderDA.from_base(SomebodysOwn(block_out_channels=(8,), norm_num_groups=4), detail_channels=4)
    with pytest.raises(ValueError, match="resolution_factor=3: allowed are 2 and 4"):
        AutoencoderDA.from_config({**config, "resolution_factor": 3})


def test_pictures_and_latents_that_are_refused() -> None:
    autoencoder = trained("kl")
    with pytest.raises(ValueError, match="40x36 px: both sides must be multiples of 8"):
        autoencoder.encode(torch.zeros(1, 3, 36, 40).double())
    with pytest.raises(ValueError, match=r"\[3, 32, 32\] of torch.float64: give floats"):
        autoencoder.encode(images(1)[0])
    with pytest.raises(ValueError, match=r"4 channels.*12 \(4 base \+ 8 detail\)"):
        autoencoder.decode(torch.zeros(1, 4, 4, 4).double())


def test_a_stock_pipeline_runs_it_at_twice_the_size() -> None:
    base = tiny.tiny_sd3_pipeline()
    autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=base.vae.config.latent_channels)
    upgraded = upgrade(base, autoencoder)
    assert type(upgraded) is type(base)
    assert upgraded.vae_scale_factor == 2 * base.vae_scale_factor
    call = {"num_inference_steps": 1, "max_sequence_length": 8}
    small, large = base("a", **call).images[0], upgraded("a", **call).images[0]
    assert large.size == (2 * small.width, 2 * small.height)
    wide = upgraded("a", width=96, height=64, **call).images[0]
    assert wide.size == (96, 64)
