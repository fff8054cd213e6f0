"""Steps larger than 2: s = 4 in one go, and the upgrade of an upgrade; what is exact for 2 is exact for them."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

import tiny
import tiny_pipelines
from davae import AutoencoderDA, load_pipeline, upgrade
from davae.backbones import backbone_of
from davae.data.pictures import read_png
from davae.errors import DataError, SettingsError
from davae.evaluation.evaluate import evaluate
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer, unshuffle_base
from davae.method.closed_form import fit_closed_form
from davae.models.base_autoencoders import base_facts, decode_latents
from davae.models.detail_blocks import DetailDownsample, DetailUpsample
from davae.pipelines.adapter import add_lora, digest_base, save_adapter
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.inspection import describe
from davae.pipelines.sampling import draw_shared_noise, sample
from davae.pipelines.saving import save_pipeline
from scenes import fill_with_scenes

# Of diffusers' DPM solver: numpy is given a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIZES = [(64, 64), (48, 80)]
"""Height and width."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def smooth(*shape: int, coarse: int = 8) -> Tensor:
    """Pictures whose neighbouring pixels are alike."""
    count, channels, height, width = shape
    return F.interpolate(numbers(count, channels, coarse, coarse), size=(height, width), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def disturbed(autoencoder: AutoencoderDA, *, seed: int = 1) -> AutoencoderDA:
    """Stands for training: everything that is trained has moved, to float32 numbers, and statistics are measured."""
    random = torch.Generator().manual_seed(seed)
    for parameter in autoencoder.detail_parameters():
        parameter.copy_(parameter.float() + 0.1 * torch.randn(parameter.shape, generator=random))
    autoencoder.detail_mean.copy_(torch.randn(autoencoder.detail_mean.shape, generator=random))
    autoencoder.detail_std.copy_(torch.rand(autoencoder.detail_std.shape, generator=random) + 0.5)
    return autoencoder.eval()


@dataclass(frozen=True)
class Step:
    """A base autoencoder, and what makes an AutoencoderDA of it."""

    base: ModelMixin
    resolution_factor: int
    ratio: int
    """D / C."""
    exact_tiles: bool

    def upgraded(self, **settings) -> AutoencoderDA:
        channels = self.base.config.latent_channels
        return AutoencoderDA.from_base(
            self.base, detail_channels=self.ratio * channels, resolution_factor=self.resolution_factor, **settings
        )


def once(vae: ModelMixin) -> AutoencoderDA:
    return disturbed(AutoencoderDA.from_base(vae, detail_channels=base_facts(vae.config).latent_channels))


STEPS = {
    "kl by 4": lambda: Step(tiny.tiny_vae().double(), 4, 2, exact_tiles=True),
    "tiny by 4": lambda: Step(tiny.tiny_taesd().double(), 4, 2, exact_tiles=False),
    "kl by 2 x 2": lambda: Step(once(tiny.tiny_vae().double()), 2, 1, exact_tiles=True),
    "tiny by 2 x 2": lambda: Step(once(tiny.tiny_taesd().double()), 2, 1, exact_tiles=False),
}


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest) -> Step:
    return STEPS[request.param]()


@pytest.fixture(scope="module")
def autoencoder(step: Step) -> AutoencoderDA:
    return disturbed(step.upgraded(), seed=2)


def latents_of(vae: ModelMixin, image: Tensor) -> Tensor:
    return make_tokenizer(vae).encode(image)


# --------------------------------------------------------------------------------------------------- the autoencoder


@pytest.mark.parametrize("linear", [True, False])
def test_blocks_by_4_put_channels_in_the_places_of_a_pixel_shuffle(linear: bool) -> None:
    down = DetailDownsample(6, 32, factor=4, linear_shortcut=linear)
    up = DetailUpsample(32, 6, factor=4, linear_shortcut=linear)
    hidden = torch.randn(2, 6, 8, 12)
    small = down(hidden)
    assert small.shape == (2, 32, 2, 3)
    assert up(small).shape == hidden.shape
    for block in (down, up):
        torch.nn.init.zeros_(block.conv.weight)
        torch.nn.init.zeros_(block.conv.bias)
    folded = F.pixel_unshuffle(hidden, 4)
    expected = down.shortcut(folded) if linear else folded.unflatten(1, (32, 3)).mean(dim=2)
    assert torch.equal(down(hidden), expected)
    expected = up.shortcut(small) if linear else small.repeat_interleave(3, dim=1)
    assert torch.equal(F.pixel_unshuffle(up(small), 4), expected)


def test_channels_that_no_block_by_4_can_make_are_refused() -> None:
    with pytest.raises(ValueError, match=r"and of 8, half of resolution_factor.* nearest is 16"):
        AutoencoderDA.from_base(tiny.tiny_vae(), detail_channels=12, resolution_factor=4)
    with pytest.raises(ValueError, match="multiple of base_channels=8"):
        AutoencoderDA.from_base(once(tiny.tiny_vae()), detail_channels=12)
    with pytest.raises(ValueError, match="a AutoencoderDA can be upgraded with linear_blocks=True only"):
        AutoencoderDA.from_base(once(tiny.tiny_vae()), detail_channels=8, linear_blocks=False)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_base_half_is_what_the_base_makes_of_the_small_picture(step: Step, autoencoder, size) -> None:
    image, factor = smooth(2, 3, *size), step.resolution_factor
    expected = F.interpolate(image, scale_factor=1 / factor, mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.allclose(autoencoder.base_picture(image), expected, atol=1e-12)
    latents = autoencoder.encode(image).latent_dist.mode()
    assert autoencoder.downsample_factor == 16
    assert latents.shape[2:] == (size[0] // 16, size[1] // 16)
    assert torch.allclose(autoencoder.split(latents)[0], latents_of(step.base, expected), atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_untrained_it_shows_the_enlarged_base_latents(step: Step, size) -> None:
    autoencoder, factor = step.upgraded(), step.resolution_factor
    base, detail = autoencoder.split(autoencoder.encode(smooth(1, 3, *size)).latent_dist.mode())
    enlarged = base.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    made = autoencoder.decode(torch.cat([base, torch.randn_like(detail)], dim=1)).sample
    assert torch.allclose(made, decode_latents(step.base, enlarged), atol=1e-10)


@torch.no_grad()
def test_the_closed_form_with_all_directions_is_the_base_at_full_size(step: Step) -> None:
    channels = step.base.config.latent_channels
    full = AutoencoderDA.from_base(
        step.base, detail_channels=step.resolution_factor**2 * channels, resolution_factor=step.resolution_factor
    )
    pictures = smooth(24, 3, 64, 64, coarse=16)
    facts = fit_closed_form(full, pictures, metric_pictures=2)
    assert len(facts["eigenvalues"]) == step.resolution_factor**2 * channels
    assert facts["unexplained"] == [0]
    whole = make_tokenizer(step.base)
    assert torch.allclose(full(pictures[:2]).sample, whole(pictures[:2]), atol=1e-7)
    wide = smooth(1, 3, *SIZES[1])
    assert torch.allclose(full(wide).sample, whole(wide), atol=1e-7)


@torch.no_grad()
def test_half_of_the_directions_leave_a_part_that_the_spectrum_says(step: Step) -> None:
    autoencoder = step.upgraded(base_in_detail=True)
    pictures = smooth(24, 3, 64, 64, coarse=16)
    facts = fit_closed_form(autoencoder, pictures, metric_pictures=2, code="residual")
    assert 0 < facts["unexplained"][0] < 1
    mean = autoencoder.encode_detail(pictures)[0]
    assert mean.mean(dim=(0, 2, 3)).abs().max() < 1e-9
    assert (mean.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-9


@torch.no_grad()
def test_statistics_stay_inside(step: Step) -> None:
    autoencoder, image = disturbed(step.upgraded(), seed=3), smooth(3, 3, *SIZES[1])
    before = autoencoder.reconstruct(autoencoder.encode_base(image), autoencoder.encode_detail(image)[0])
    autoencoder.calibrate([image[:1], image[1:]])
    latents = autoencoder.encode(image).latent_dist.mode()
    detail = autoencoder.split(autoencoder.to_units(latents))[1]
    assert detail.mean((0, 2, 3)).abs().max() < 1e-9
    assert (detail.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-9
    assert torch.allclose(autoencoder.decode(latents).sample, before, atol=1e-9)


def innermost_convolution(autoencoder: AutoencoderDA) -> nn.Module:
    """The last one before the pixels."""
    decoder: nn.Module = autoencoder
    while isinstance(decoder, AutoencoderDA):
        decoder = decoder.joint_decoder
    return [module for module in decoder.modules() if isinstance(module, nn.Conv2d)][-1]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_tiles_give_what_the_whole_gives(step: Step, autoencoder: AutoencoderDA, size) -> None:
    latents = numbers(1, autoencoder.config.latent_channels, size[0] // 16, size[1] // 16)
    whole = autoencoder.decode(latents).sample
    tiled = disturbed(step.upgraded(), seed=2)
    tiled.tile_sample_size = 32
    tiled.enable_tiling()
    calls: list[nn.Module] = []
    hook = innermost_convolution(tiled).register_forward_hook(lambda module, *_: calls.append(module))
    error = (tiled.decode(latents).sample - whole).abs().max()
    assert error < 1e-9 if step.exact_tiles else error > 1e-6  # blended ones cannot be
    assert len(calls) > 1
    hook.remove()
    tiled.disable_tiling()
    assert torch.equal(tiled.decode(latents).sample, whole)


def test_all_but_the_base_is_trained_and_the_base_is_not(step: Step) -> None:
    autoencoder, image = disturbed(step.upgraded(), seed=4).train(), smooth(1, 3, 32, 32)
    mean, log_variance = autoencoder.encode_detail(image)
    detail = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    autoencoder.reconstruct(autoencoder.encode_base(image), detail).square().sum().backward()
    assert all(parameter.grad is not None for parameter in autoencoder.detail_parameters())
    frozen = {name for name, parameter in autoencoder.named_parameters() if parameter.grad is None}
    assert frozen == {name for name, _ in autoencoder.named_parameters() if "base_encoder." in name}
    assert not any(module.training for module in autoencoder.base_encoder.modules())


@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(autoencoder: AutoencoderDA, tmp_path: Path) -> None:
    single, image = disturbed(AutoencoderDA.from_config(autoencoder.config)).float(), smooth(1, 3, 48, 80).float()
    single.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert torch.equal(again(image).sample, single(image).sample)
    names = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (single, again)]
    assert names[0] == names[1]
    assert again.config.resolution_factor == autoencoder.config.resolution_factor


@torch.no_grad()
def test_the_bounds_of_the_base_are_at_the_same_tokens(step: Step, autoencoder: AutoencoderDA) -> None:
    image, factor = smooth(1, 3, 64, 64), step.resolution_factor
    small, unshuffled = enlarge_base(step.base, autoencoder), unshuffle_base(step.base, factor=factor)
    assert small.factor == unshuffled.factor == make_tokenizer(autoencoder).factor
    assert unshuffled.channels == factor**2 * small.channels
    assert small(image).shape == image.shape
    assert torch.allclose(unshuffled(image), make_tokenizer(step.base)(image), atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the pipelines


def pipeline_of(name: str) -> DiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        return tiny_pipelines.quiet(getattr(tiny_pipelines, name)())


def by_four(base: DiffusionPipeline) -> DiffusionPipeline:
    autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=tiny_pipelines.CHANNELS, resolution_factor=4)
    return tiny_pipelines.quiet(upgrade(base, disturbed(autoencoder)))


def by_two_twice(base: DiffusionPipeline) -> DiffusionPipeline:
    first = tiny_pipelines.quiet(upgrade(base, once(base.vae)))
    second = AutoencoderDA.from_base(first.vae, detail_channels=2 * tiny_pipelines.CHANNELS)
    return tiny_pipelines.quiet(upgrade(first, disturbed(second, seed=2)))


def made(pipeline: DiffusionPipeline, size: int | None) -> Tensor:
    return sample(pipeline, ["red apple"], size=size, seed=1, steps=2, guidance_scale=1.0, prompt_tokens=32)


@torch.no_grad()
@pytest.mark.parametrize("widened", [by_four, by_two_twice])
@pytest.mark.parametrize("name", ["sd3", "flux2", "qwen_image", "sana", "lumina2"])
def test_the_stock_pipeline_makes_four_times_the_side_of_the_same_tokens(name: str, widened, tmp_path: Path) -> None:
    """Of every sort of contract between pipeline and autoencoder; the base half starts as the base's, bit for bit."""
    base = pipeline_of(name)
    pipeline, backbone = widened(base), backbone_of(base.transformer)
    assert type(pipeline) is type(base)
    assert backbone.picture_side(pipeline, None) == 4 * backbone.picture_side(base, None)
    tokens: dict[str, list[Tensor]] = {"base": [], "upgraded": []}
    for name, one, size in (("base", base, 32), ("upgraded", pipeline, 128)):
        port = one.transformer.get_submodule(backbone.ports.input)
        hook = port.register_forward_hook(lambda _, __, output, name=name: tokens[name].append(output))
        assert made(one, size).shape == (1, 3, size, size)
        hook.remove()
    assert len(tokens["base"]) == 2
    for ours, theirs in zip(tokens["upgraded"], tokens["base"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    picture = made(pipeline, 128)
    save_pipeline(pipeline, tmp_path / "saved")
    loaded = tiny_pipelines.quiet(load_pipeline(tmp_path / "saved"))
    for name in ("vae", "transformer"):
        ours, theirs = (getattr(one, name).state_dict() for one in (loaded, pipeline))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    # Weights that lie elsewhere in memory may be multiplied in another order.
    assert (made(loaded, 128).int() - picture.int()).abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("widened", [by_four, by_two_twice])
def test_the_warm_start_is_exact(widened) -> None:
    base = pipeline_of("sd3")
    pipeline, velocity, channels = widened(base), backbone_of(base.transformer).velocity, tiny_pipelines.CHANNELS
    latents = numbers(2, pipeline.vae.config.latent_channels, 8, 8).float()
    condition = {
        "encoder_hidden_states": numbers(2, 5, 32).float(),
        "pooled_projections": numbers(2, 32).float(),
    }
    time = torch.tensor([0.2, 0.9])
    wide = velocity(pipeline.transformer, latents, time, condition)
    assert torch.equal(wide[:, :channels], velocity(base.transformer, latents[:, :channels], time, condition))
    assert not wide[:, channels:].any()


def test_an_upgrade_of_an_upgrade_shares_all_of_its_noise() -> None:
    base = pipeline_of("sd3")
    twice = by_two_twice(base)
    noise = [
        draw_shared_noise(pipeline, [3], seed=0, height=4, width=4)
        for pipeline in (base, upgrade(base, once(base.vae)), twice)
    ]
    for less, more in pairwise(noise):
        assert torch.equal(more[:, : less.shape[1]], less)
    fresh = noise[2].flatten(2).transpose(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in fresh}) == len(fresh)  # no channel twice


def test_another_bases_autoencoder_is_refused() -> None:
    base = pipeline_of("sd3")
    first = upgrade(base, once(base.vae))
    other = disturbed(AutoencoderDA.from_base(base.vae, detail_channels=tiny_pipelines.CHANNELS), seed=9)
    with pytest.raises(SettingsError, match="frozen base encoder is not this pipeline's"):
        upgrade(first, AutoencoderDA.from_base(other, detail_channels=2 * tiny_pipelines.CHANNELS))
    by_4 = AutoencoderDA.from_base(base.vae, detail_channels=tiny_pipelines.CHANNELS, resolution_factor=4)
    by_4.register_to_config(resolution_factor=2)  # whose stages say otherwise
    with pytest.raises(SettingsError, match="downsample factor / resolution factor is 8, the pipeline's VAE has 4"):
        upgrade(base, by_4)


def test_what_it_is_can_be_read() -> None:
    base = pipeline_of("sd3")
    facts = [describe(pipeline) for pipeline in (base, by_four(base), by_two_twice(base))]
    assert [each["downsample_factor"] for each in facts] == [4, 16, 16]
    assert [each["default_size"] for each in facts] == [32, 128, 128]
    assert [(each["base_channels"], each["detail_channels"]) for each in facts] == [(16, 0), (16, 16), (32, 32)]
    assert {each["tokens"][str(each["default_size"])] for each in facts} == {16}
    oblong = describe(by_two_twice(base), (96, 160))
    assert oblong["tokens"]["96x160"] == 3 * 5
    assert {**oblong, "tokens": facts[2]["tokens"]} == facts[2]
    for size, wrong in (((96, 100), 100), (0, 0), ((-32, 96), -32)):
        with pytest.raises(SettingsError, match=f"size={wrong}: allowed are multiples of 32"):
            describe(by_two_twice(base), size)


@pytest.mark.parametrize("name", ["lumina2", "z_image", "dit"])
def test_backbones_whose_pipelines_do_not_count_the_stages_can_be_read(name: str) -> None:
    base = pipeline_of(name)
    facts = [describe(pipeline) for pipeline in (base, by_four(base), by_two_twice(base))]
    assert [each["downsample_factor"] for each in facts] == [4, 16, 16]
    side = backbone_of(base.transformer).picture_side(base, None)
    assert [each["default_size"] for each in facts] == [side, 4 * side, 4 * side]
    assert facts[0]["upgrade"]["default_size"] == [side, 2 * side]


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="needs davae[eval]")
@pytest.mark.parametrize("widened", [by_four, by_two_twice], ids=["4", "2 x 2"])
def test_oblong_pictures_of_it_are_evaluated(widened, tmp_path: Path) -> None:
    pictures = fill_with_scenes(tmp_path / "pictures", train=3, held=1, side=192)
    pipeline = widened(pipeline_of("sd3"))
    evaluate(pipeline, pictures, tmp_path / "out", count=4, steps=1, prompt_tokens=8, size=(128, 192))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["size"], result["real"], result["count"]) == ([128, 192], 4, 4)
    assert "128x192 px" in (tmp_path / "out" / "index.html").read_text()
    assert {read_png(path).shape for path in (tmp_path / "out" / "pictures").iterdir()} == {(3, 192, 128)}
    with pytest.raises(SettingsError, match="allowed are multiples of 32"):
        evaluate(pipeline, pictures, tmp_path / "other", count=4, size=(128, 190))
    with pytest.raises(DataError, match="192"):
        evaluate(pipeline, pictures, tmp_path / "other", count=4, size=(256, 160))


@torch.no_grad()
def trained(base: DiffusionPipeline, autoencoder: AutoencoderDA, folder: Path, *, seed: int) -> DiffusionPipeline:
    """Stands for stage 2 with LoRA: the adapter in `folder`, and the pipeline with LoRA fused."""
    pipeline = tiny_pipelines.quiet(upgrade(base, autoencoder))
    digest = digest_base(pipeline.transformer)
    random = torch.Generator().manual_seed(seed)
    for parameter in add_lora(pipeline.transformer, 2, 2.0, ["to_q", "to_v"], seed=seed):
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    save_adapter(folder, pipeline, base="base", base_sha256=digest)
    pipeline.transformer.fuse_lora(safe_fusing=True)
    pipeline.transformer.unload_lora()
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_applied_one_upon_the_other(dtype: torch.dtype, tmp_path: Path) -> None:
    save_pipeline(pipeline_of("sd3"), tmp_path / "base")
    base = load_pipeline(tmp_path / "base")
    first = trained(base, once(base.vae), tmp_path / "first", seed=1)
    second = disturbed(AutoencoderDA.from_base(first.vae, detail_channels=2 * tiny_pipelines.CHANNELS), seed=2)
    expected = trained(first, second, tmp_path / "second", seed=2)
    chain = [tmp_path / "first", tmp_path / "second"]
    loaded = tiny_pipelines.quiet(load_pipeline(tmp_path / "base", adapter=chain, dtype=dtype))
    for name in ("transformer", "vae"):
        ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (loaded, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value.to(dtype)) for key, value in theirs.items())
    assert made(loaded, 128).shape == (1, 3, 128, 128)
    kept = {name.split(".")[0] for name in load_autoencoder(chain[1], base=first.vae).state_dict()}
    assert "base_encoder" in kept
    with pytest.raises(SettingsError, match="half an autoencoder: give the base pipeline's"):
        load_autoencoder(chain[1])
