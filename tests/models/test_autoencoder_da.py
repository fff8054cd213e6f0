"""AutoencoderDA: its blocks and its two halves, the diffusers contract, statistics, slicing and tiling."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.hooks import apply_group_offloading
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import Tensor, nn

import tiny
from davae import AutoencoderDA
from davae.method.closed_form import fit_closed_form
from davae.models.autoencoder_da import DetailDownsample, DetailUpsample
from davae.pipelines.upgrade import upgrade


def quantised_kl() -> AutoencoderKL:
    """An `AutoencoderKL` of Stable Diffusion 1's kind: quant convolutions, attention in the middle, no shift factor."""
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 8), "norm_num_groups": 4, "scaling_factor": 0.18215, "shift_factor": None}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**settings, **types).eval()


BASES = {"kl": tiny.tiny_vae, "quantised kl": quantised_kl, "tiny": tiny.tiny_taesd, "taef2": tiny.tiny_taef2}
KINDS = list(itertools.product(BASES, (True, False)))


def pictures(count: int = 2, side: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(count, 3, side, side, generator=generator) * 2 - 1).to(dtype)


def trained(base: str, linear_blocks: bool = True, **settings) -> AutoencoderDA:
    """As after training, in float64: nothing is zero any more."""
    detail_channels = 8 if linear_blocks else 4  # the paper's shortcut repeats channels a whole number of times
    autoencoder = AutoencoderDA.from_base(
        BASES[base]().double(), detail_channels=detail_channels, linear_blocks=linear_blocks, **settings
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in (autoencoder.detail_downsample, autoencoder.detail_upsample):
            for parameter in block.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return autoencoder


def latents_of(vae: nn.Module, image: Tensor) -> Tensor:
    encoded = vae.encode(image)
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --------------------------------------------------------------------------------------------------------- the blocks


def test_blocks_have_the_references_parameters() -> None:
    assert count(DetailDownsample(512, 192)) == 614_448
    assert count(DetailDownsample(512, 32)) == 36_872
    assert count(DetailUpsample(128, 512)) == 2_361_344
    assert count(DetailUpsample(32, 512)) == 591_872


@pytest.mark.parametrize(("channels", "out_channels"), [(16, 8), (8, 32), (12, 4)])
def test_downsample_is_the_block_of_diffusers(channels: int, out_channels: int) -> None:
    ours = DetailDownsample(channels, out_channels).double()
    theirs = DCDownBlock2d(channels, out_channels, downsample=True, shortcut=True).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    hidden = torch.randn(2, channels, 6, 4).double()
    assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize(("channels", "out_channels"), [(8, 16), (32, 8), (4, 3)])
def test_upsample_is_the_block_of_diffusers(channels: int, out_channels: int) -> None:
    ours = DetailUpsample(channels, out_channels).double()
    theirs = DCUpBlock2d(channels, out_channels, interpolate=False, shortcut=True).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    hidden = torch.randn(2, channels, 3, 5).double()
    assert torch.equal(ours(hidden), theirs(hidden))


def test_where_groups_are_unequal_the_shortcut_is_learned_and_starts_at_nothing() -> None:
    block, hidden = DetailDownsample(6, 20), torch.randn(1, 6, 4, 4)  # 24 channels on 20
    assert block.shortcut.bias is None
    assert torch.equal(block(hidden), F.pixel_unshuffle(block.conv(hidden), 2))
    with torch.no_grad():
        block.shortcut.weight[0, 5] = 1  # the last place of the first channel
    added = block(hidden) - F.pixel_unshuffle(block.conv(hidden), 2)
    assert torch.allclose(added[:, 0], hidden[:, 1, 0::2, 1::2], atol=1e-6)
    assert not added[:, 1:].any()


def test_linear_shortcuts_stand_behind_the_unshuffle_and_before_the_shuffle() -> None:
    down, up = DetailDownsample(4, 12, linear_shortcut=True), DetailUpsample(12, 4, linear_shortcut=True)
    for block in (down, up):
        nn.init.zeros_(block.conv.weight)
        nn.init.zeros_(block.conv.bias)
    hidden = torch.randn(1, 4, 4, 4)
    assert torch.equal(down(hidden), down.shortcut(F.pixel_unshuffle(hidden, 2)))
    small = down(hidden)
    assert torch.equal(F.pixel_unshuffle(up(small), 2), up.shortcut(small))


def test_blocks_refuse_channels_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        DetailDownsample(8, 6)
    with pytest.raises(ValueError, match="linear_shortcut=True"):
        DetailUpsample(12, 8)
    assert DetailUpsample(12, 8, linear_shortcut=True)(torch.zeros(1, 12, 2, 2)).shape == (1, 8, 4, 4)


# ------------------------------------------------------------------------------------------------------ the two halves


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_base_half_is_the_bases_own_latents_of_the_small_picture(base: str, linear: bool) -> None:
    autoencoder, vae, image = trained(base, linear), BASES[base]().double(), pictures()
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
    image, made = pictures(), {}
    for name, antialias in (("bicubic", False), ("bicubic-antialias", True)):
        made[name] = trained("tiny", base_downsample=name).base_picture(image)
        expected = F.interpolate(image, size=(16, 16), mode="bicubic", align_corners=False, antialias=antialias)
        assert torch.allclose(made[name], expected.clamp(-1, 1), atol=1e-12)
    assert (made["bicubic"] - made["bicubic-antialias"]).abs().max() > 0.1


@pytest.mark.parametrize("base", BASES)
def test_untrained_it_shows_the_enlarged_base_latents(base: str) -> None:
    vae, image = BASES[base]().double(), pictures()
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=8)
    half, detail = autoencoder.split(autoencoder.encode(image).latent_dist.mode())
    enlarged = half.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    made = autoencoder.decode(torch.cat([half, torch.randn_like(detail)], dim=1)).sample
    assert torch.allclose(made, vae.decode(enlarged).sample, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_inside_the_linear_blocks_is_the_pretrained_autoencoder_at_full_size(base: str) -> None:
    vae, image = BASES[base]().double(), pictures()
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
    autoencoder, image = trained(base, linear).train(), pictures()
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


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_statistics_change_the_latents_and_not_the_picture(base: str, linear: bool) -> None:
    autoencoder, image = trained(base, linear), pictures()
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


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("base", BASES)
def test_group_offloading_has_each_part_there_when_it_runs(base: str, offload_type: str, tmp_path: Path) -> None:
    autoencoder, image = trained(base), pictures(1)
    with torch.no_grad():
        latents = [autoencoder.encode_base(image), autoencoder.encode_detail(image)[0]]
        before = [*latents, autoencoder.reconstruct(*latents)]
        settings = {"offload_type": offload_type, "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
        apply_group_offloading(autoencoder, torch.device("cpu"), **settings)
        for parameter in autoencoder.parameters():  # what is not read from its file is missed
            parameter.fill_(torch.nan)
        now = [autoencoder.encode_base(image), autoencoder.encode_detail(image)[0], autoencoder.reconstruct(*latents)]
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(before, now, strict=True))


def test_statistics_follow_the_latents_to_where_they_are() -> None:
    autoencoder = trained("kl")
    mean, std = autoencoder.detail_mean, autoencoder.detail_std
    nn.Module.to(autoencoder, "meta")
    autoencoder.detail_mean, autoencoder.detail_std = mean, std
    latents = autoencoder.encode(pictures().to("meta")).latent_dist.mode()
    assert autoencoder.decode(latents).sample.is_meta


def test_samples_spread_as_the_detail_encoder_says() -> None:
    autoencoder, image = trained("tiny"), pictures(1, 8)
    autoencoder.calibrate([pictures()])
    posterior, generator = autoencoder.encode(image).latent_dist, torch.Generator().manual_seed(0)
    draws = torch.cat([autoencoder.to_units(posterior.sample(generator)) for _ in range(4000)])
    spread = autoencoder.split(draws)[1].std(dim=0)[:, 0, 0] * autoencoder.detail_std
    assert torch.allclose(spread, (0.5 * autoencoder.encode_detail(image)[1]).exp().flatten(), rtol=0.06)
    assert autoencoder.split(draws)[0].std(dim=0).max() < 1e-6


def test_calibration_does_not_depend_on_the_batches() -> None:
    autoencoder, image = trained("kl"), pictures(4)
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
        autoencoder.calibrate([pictures()])
    autoencoder = trained("kl")
    with torch.no_grad():
        autoencoder.detail_downsample.shortcut.bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"\[2\] do not vary, or are not finite"):
        autoencoder.calibrate([pictures()])
    with pytest.raises(ValueError, match="multiples of 8"):
        autoencoder.calibrate([pictures(side=36)])
    with pytest.raises(ValueError, match=r"torch.uint8: give floats \[B, 3, H, W\] in"):
        autoencoder.calibrate([pictures(dtype=torch.uint8)])
    assert torch.equal(autoencoder.detail_std, torch.ones(8).double())


# ----------------------------------------------------------------------------------------------- the diffusers contract


@pytest.mark.parametrize(("base", "linear"), KINDS)
def test_saved_and_loaded_bit_for_bit(base: str, linear: bool, tmp_path: Path) -> None:
    autoencoder, image = trained(base, linear).float(), pictures(dtype=torch.float32)
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
    autoencoder, image = trained(base).float(), pictures(dtype=torch.float32)
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
    autoencoder, image = trained("kl"), pictures()
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
        autoencoder.encode(pictures(1)[0])
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


# -------------------------------------------------------------------------------------------------- slices and tiles


@pytest.mark.parametrize("base", BASES)
def test_slices_are_the_whole(base: str) -> None:
    autoencoder, image = trained(base), pictures(3)
    latents, whole = autoencoder.encode(image).latent_dist.parameters, autoencoder(image).sample
    autoencoder.enable_slicing()
    assert torch.allclose(autoencoder.encode(image).latent_dist.parameters, latents, atol=1e-12)
    assert torch.allclose(autoencoder(image).sample, whole, atol=1e-12)


def pointwise() -> AutoencoderDA:
    """Its 3x3 kernels see their centre only: no tile can know what lies beyond its border, or need to."""
    autoencoder = trained("tiny")
    with torch.no_grad():
        for module in autoencoder.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                centre = module.weight[..., 1, 1].clone()
                module.weight.zero_()[..., 1, 1] = centre
    return autoencoder


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 72), (24, 104)])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0.25), (32, 0.0), (44, 0.5), (40, 0.9), (4, 0.5)])
def test_tiles_cover_every_size_and_weigh_one(height: int, width: int, tile: int, overlap: float) -> None:
    autoencoder = pointwise()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, height, width, generator=generator).double() * 2 - 1
    moments = autoencoder.encode(image).latent_dist.parameters
    latents = torch.randn(2, 12, height // 8, width // 8, generator=generator).double()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size, autoencoder.tile_overlap = tile, overlap
    assert torch.allclose(autoencoder.decode(latents).sample, whole, atol=1e-12)
    tiled = autoencoder.encode(image).latent_dist.parameters
    assert tiled.shape == moments.shape
    # The filter of the base picture reaches over a tile's border; all else is pointwise.
    assert torch.allclose(tiled[:, 4:], moments[:, 4:], atol=1e-12)
    autoencoder.disable_tiling()
    assert torch.equal(autoencoder.decode(latents).sample, whole)


def test_pictures_no_larger_than_a_tile_are_not_tiled() -> None:
    autoencoder, image = trained("kl"), pictures()
    whole = autoencoder(image).sample
    autoencoder.enable_tiling()
    assert torch.equal(autoencoder(image).sample, whole)
    autoencoder.tile_sample_size = 32
    assert torch.equal(autoencoder(image).sample, whole)
    autoencoder.tile_sample_size = 24
    assert not torch.equal(autoencoder(image).sample, whole)


def scene(side: int) -> Tensor:
    """Smooth shades with a soft disc on them."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side).double(),) * 2, indexing="ij")
    disc = torch.sigmoid(20 * (0.5 - (x.square() + y.square()).sqrt()))
    return torch.stack([0.7 * x, 0.7 * y * (1 - disc), 1.2 * disc - 0.6])[None]


@torch.no_grad()
def test_tiles_join_without_a_seam() -> None:
    # No norms and no attention: a tile's middle does not know that it is one.
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(0, 1), num_decoder_blocks=(0, 1)).double().eval()
    autoencoder, image = AutoencoderDA.from_base(vae, detail_channels=4), scene(192)
    fit_closed_form(autoencoder, torch.cat([image, image.flip(3), image.transpose(2, 3)]), metric_pictures=1)
    latents = autoencoder.encode(image).latent_dist.mode()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size, errors = 64, {}
    for overlap in (0.0, 0.5):  # side by side, and sharing 32 px: the decoder sees half of that around a pixel
        autoencoder.tile_overlap = overlap
        tiled = autoencoder.decode(latents).sample
        errors[overlap] = (tiled - whole).abs().max().item()
    assert errors[0.5] < 1 / 255
    assert errors[0.0] > 50 * errors[0.5]
    again = autoencoder.encode(image).latent_dist.mode()
    assert again.shape == latents.shape
    assert (again - latents).abs().max() < 0.1
