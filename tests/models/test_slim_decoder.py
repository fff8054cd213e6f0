"""A joint decoder with widths of its own: the base's widths are the base's decoder, and latents never change."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor, nn

import tiny
import tiny_pipelines
from davae import AutoencoderDA, load_pipeline, upgrade
from davae.cost.budget import estimate_stage_one
from davae.cost.geometry import read_geometry
from davae.errors import SettingsError
from davae.method.slim_start import fit_slim_decoder, slimmed
from davae.models.tiling import has_exact_tiles
from davae.pipelines.adapter import digest_base, save_adapter
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import with_autoencoder
from davae.run.recipe import load_recipe
from davae.training.stage_one_recipe import AutoencoderRecipe

pytestmark = pytest.mark.usefixtures("without_gradients")

ROOT = Path(__file__).parents[2]
WIDTHS, DEPTHS = (4, 6, 12), (0, 1, 0)
"""Of `tiny_vae`, which has 8, 8 and 16 channels in 4 groups, and depths of 1."""


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def attending_kl() -> AutoencoderKL:
    """With quant convolutions and attention in the middle."""
    torch.manual_seed(0)
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2, **types).eval()


def trained(
    vae: nn.Module | None = None, *, linear_blocks: bool = True, dtype: torch.dtype = torch.float64
) -> AutoencoderDA:
    """As after training: nothing is zero any more."""
    torch.manual_seed(1)
    vae = tiny.tiny_vae() if vae is None else vae
    channels = vae.config.latent_channels
    autoencoder = AutoencoderDA.from_base(vae.to(dtype), detail_channels=channels, linear_blocks=linear_blocks)
    with torch.no_grad():  # also where fixtures call it
        for part in (autoencoder.detail_downsample, autoencoder.detail_upsample, autoencoder.joint_decoder):
            for parameter in part.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        autoencoder.detail_mean.normal_()
        autoencoder.detail_std.uniform_(0.5, 2)
    return autoencoder.requires_grad_(False)


def latents(autoencoder: AutoencoderDA, height: int = 6, width: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.randn(2, autoencoder.config.latent_channels, height, width, generator=random).to(autoencoder.dtype)


def pictures(count: int = 4, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)).double() * 2 - 1


# --------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("linear_blocks", [True, False])
@pytest.mark.parametrize("make", [tiny.tiny_vae, attending_kl, lambda: tiny_pipelines.flux2().vae])
def test_the_bases_widths_are_the_full_decoder_bit_for_bit(make, linear_blocks: bool) -> None:
    # In float32, whose kernels lay the weights out anew: in float64, where they lie decides the last bit.
    full = trained(make(), linear_blocks=linear_blocks, dtype=torch.float32)
    base = full.config.base_config
    slim = slimmed(full, base["block_out_channels"], [base["layers_per_block"]] * len(base["block_out_channels"]))
    slim.load_state_dict(full.state_dict(), strict=True)
    z = latents(full)
    assert torch.equal(slim.decode(z).sample, full.decode(z).sample)
    assert fit_slim_decoder(slim, full, pictures().float()) == 0
    assert torch.equal(slim.decode(z).sample, full.decode(z).sample)


@pytest.mark.parametrize("linear_blocks", [True, False])
def test_widths_and_depths_are_the_decoders_alone(linear_blocks: bool) -> None:
    full = trained(linear_blocks=linear_blocks, dtype=torch.float32)
    slim = slimmed(full, WIDTHS, DEPTHS)
    decoder = slim.joint_decoder
    assert [block.resnets[-1].conv2.out_channels for block in decoder.up_blocks] == list(reversed(WIDTHS))
    assert [len(block.resnets) - 1 for block in decoder.up_blocks] == list(reversed(DEPTHS))
    norms = {name: norm for name, norm in decoder.named_modules() if isinstance(norm, nn.GroupNorm)}
    for name, norm in norms.items():
        theirs = full.joint_decoder.get_submodule(name)
        assert norm.num_channels // norm.num_groups == theirs.num_channels // theirs.num_groups
    assert {norm.num_groups for norm in norms.values()} == {2, 3}
    image, z = pictures().float(), latents(full)
    assert torch.equal(slim.encode(image).latent_dist.parameters, full.encode(image).latent_dist.parameters)
    assert slim.downsample_factor == full.downsample_factor
    assert slim.decode(z).sample.shape == full.decode(z).sample.shape
    assert slimmed(full.double(), WIDTHS).dtype == torch.float64


def test_it_is_saved_loaded_and_tiled_as_any_other(tmp_path: Path) -> None:
    slim = slimmed(trained(), WIDTHS, DEPTHS)
    slim.save_pretrained(tmp_path)
    loaded, z = load_autoencoder(tmp_path, dtype=torch.float64), latents(slim, 6, 8)
    loaded.load_state_dict(slim.state_dict(), strict=True)
    whole = slim.decode(z).sample
    assert torch.equal(loaded.decode(z).sample, whole)
    loaded.enable_tiling()
    loaded.tile_sample_size = 24
    assert has_exact_tiles(loaded)
    assert (loaded.decode(z).sample - whole).abs().max() < 1e-12


def test_an_upgrade_of_an_upgrade_keeps_the_slim_decoder_inside() -> None:
    slim = slimmed(trained(), WIDTHS)
    twice = AutoencoderDA.from_base(slim, detail_channels=8)
    z = latents(slim)
    again = twice.decode(torch.cat([z, torch.zeros_like(z)], dim=1)).sample
    once = slim.decode(z.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)).sample
    assert torch.allclose(again, once, atol=1e-4)
    with pytest.raises(ValueError, match="Slim the first upgrade"):
        slimmed(twice, WIDTHS)


@pytest.mark.parametrize(
    ("widths", "depths", "message"),
    [
        ((4, 8), (), "allowed are 3 widths"),
        ((4, 8, 32), (), r"up to the base's \[8, 8, 16\]"),
        ((3, 8, 16), (), r"multiples of \[2, 2, 4\]"),
        ((0, 8, 16), (), "outermost stage first"),
        ((4, 8, 16), (0, 0), "allowed are 3 numbers"),
        ((), (0, 0, 2), "from 0 to the base's 1"),
        ((), (0, 0, -1), "from 0 to the base's 1"),
    ],
)
def test_other_widths_and_depths_are_refused(widths, depths, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slimmed(trained(), widths, depths)


def test_other_decoders_and_slim_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed are the decoders of AutoencoderKL and AutoencoderKLFlux2"):
        slimmed(AutoencoderDA.from_base(tiny.tiny_taesd(), detail_channels=4), (8, 8, 8))
    with pytest.raises(ValueError, match="slim already"):
        slimmed(slimmed(trained(), WIDTHS), WIDTHS)


def test_flux2s_own_setting_of_its_decoder_is_what_may_be_slimmer() -> None:
    if "decoder_block_out_channels" not in inspect.signature(AutoencoderKLFlux2).parameters:
        pytest.skip("this diffusers has no such setting")
    config = {name: value for name, value in tiny_pipelines.flux2().vae.config.items() if not name.startswith("_")}
    vae = AutoencoderKLFlux2.from_config({**config, "decoder_block_out_channels": (4, 8, 8)})
    full = AutoencoderDA.from_base(vae, detail_channels=vae.config.latent_channels)
    assert slimmed(full, (2, 4, 8)).joint_decoder.conv_norm_out.num_channels == 2
    with pytest.raises(ValueError, match=r"up to the base's \[4, 8, 8\]"):
        slimmed(full, (8, 8, 8))


# --------------------------------------------------------------------------------------------------- its start


def duplicated(full: AutoencoderDA) -> AutoencoderDA:
    """The outermost stage's second half of channels the same as its first: what a half as wide decoder can say."""

    def halves(tensor: Tensor) -> None:
        tensor[len(tensor) // 2 :] = tensor[: len(tensor) // 2]

    decoder = full.joint_decoder
    last = decoder.up_blocks[-1]
    for module in (decoder.up_blocks[-2].upsamplers[0].conv, decoder.conv_norm_out, *last.modules()):
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            halves(module.weight)
            halves(module.bias)
    return full


def test_a_decoder_that_says_all_twice_is_said_once_exactly() -> None:
    full = duplicated(trained())
    slim = slimmed(full, (4, 8, 16))
    before = (slim.decode(latents(full)).sample - full.decode(latents(full)).sample).abs().max()
    assert fit_slim_decoder(slim, full, pictures(8, 64)) < 1e-12
    assert (slim.decode(latents(full)).sample - full.decode(latents(full)).sample).abs().max() < 1e-4 * before


@pytest.mark.parametrize("make", [tiny.tiny_vae, attending_kl])
def test_the_fit_is_nearer_to_the_full_decoder_than_what_is_random(make) -> None:
    full, image = trained(make()), pictures(8)
    widths = [width * 3 // 4 for width in full.config.base_config["block_out_channels"]]
    slim = slimmed(full, widths, [0] * len(widths))
    z = full.encode(image).latent_dist.mode()
    before = (slim.decode(z).sample - full.decode(z).sample).square().mean()
    found = fit_slim_decoder(slim, full, image)
    assert found == pytest.approx((slim.decode(z).sample - full.decode(z).sample).square().mean().item())
    assert found < 0.5 * before


def test_without_linear_blocks_the_innermost_width_must_stay() -> None:
    full = trained(linear_blocks=False)
    assert fit_slim_decoder(slimmed(full, (4, 8, 16)), full, pictures()) > 0
    with pytest.raises(SettingsError, match="innermost stage is narrower"):
        fit_slim_decoder(slimmed(full, WIDTHS), full, pictures())


# ------------------------------------------------------------------------------------- beside a finished transformer


@pytest.fixture(scope="module")
def finished():
    """A base pipeline, and an upgraded one, as if fine-tuned."""
    base = tiny.tiny_sd3_pipeline()
    pipeline = upgrade(base, trained(base.vae, dtype=torch.float32))
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.normal_(generator=torch.Generator().manual_seed(4))
    return base, pipeline


def picture(pipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "max_sequence_length": 8, "generator": generator}
    return torch.from_numpy(pipeline("a", output_type="np", **settings).images)


def test_a_finished_transformer_gets_a_slim_decoder(finished, tmp_path: Path) -> None:
    base, full = finished
    slim = with_autoencoder(full, slimmed(full.vae, WIDTHS, DEPTHS))
    assert slim.transformer is full.transformer
    assert slim.vae_scale_factor == full.vae_scale_factor
    made = picture(slim)
    assert made.shape == picture(full).shape
    assert not torch.equal(made, picture(full))
    save_pipeline(slim, tmp_path / "pipeline")
    save_adapter(tmp_path / "adapter", slim, base="tiny", base_sha256=digest_base(base.transformer))
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(picture(load_pipeline(tmp_path / "pipeline")), made)
    loaded = load_pipeline(tmp_path / "base", adapter=tmp_path / "adapter")
    assert tuple(loaded.vae.config.decoder_block_out_channels) == WIDTHS
    assert torch.equal(picture(loaded), made)


def test_an_autoencoder_of_other_latents_is_refused(finished) -> None:
    base, full = finished
    for name, part in (("detail_std", "latent statistics"), ("detail_downsample.conv.bias", "weights of the encoders")):
        slim = slimmed(full.vae, WIDTHS)
        slim.state_dict()[name].mul_(2).add_(1)
        with pytest.raises(SettingsError, match=f"differs from the pipeline's in {part}:"):
            with_autoencoder(full, slim)
    with pytest.raises(SettingsError, match="AutoencoderKL and AutoencoderDA"):
        with_autoencoder(base, full.vae)


# --------------------------------------------------------------------------------------------------- what it costs


def test_the_recipes_decoder_has_a_fifth_of_the_work() -> None:
    path = ROOT / "recipes" / "avatars" / "slim_decoder.toml"
    recipe = load_recipe(AutoencoderRecipe, path)
    whole = recipe.model_copy(update={"decoder_block_out_channels": (), "decoder_layers_per_block": ()})
    with torch.enable_grad():
        slim, full = (figures(each, read_geometry("", path)) for each in (recipe, whole))
    assert 5 < full["decoding it"] / slim["decoding it"] < 5.5
    assert slim["encoding one picture of 256 px"] == full["encoding one picture of 256 px"]
    assert full["joint decoder without its new block"] > 5 * slim["joint decoder without its new block"]
    assert slim["trained in this stage"] < full["trained in this stage"]


def figures(recipe: AutoencoderRecipe, geometry) -> dict[str, float]:
    return {figure.name: figure.value for figure in estimate_stage_one(recipe, geometry)}
