"""Autoencoders of other layouts: the imported network is the same function, in float64, as plain torch's."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

import ldm
from davae import AutoencoderDA
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.importing.account import Import
from davae.pipelines.importing.autoencoders import convert_imagenet_da_vae, convert_sd3_da_vae, convert_va_vae
from davae.pipelines.importing.kinds import import_checkpoint
from davae.pipelines.importing.reading import ForeignCheckpoint

TRUE_WIDTHS = (128, 128, 256, 256, 512)


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


def write_statistics(path: Path, mean: list[float], std: list[float]) -> Path:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in (("mean", mean), ("std", std))}
    return write({name: tensor.view(1, -1, 1, 1) for name, tensor in tensors.items()}, path)


def make_image(side: int = 32) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def count_parameters(report_rows: list[dict]) -> Counter:
    """Parameters by the part of the result that they are in."""
    parts: Counter = Counter()
    for row in report_rows:
        parts[row["target"].partition(".")[0]] += math.prod(row["shape"])
    return parts


def convert_shapes(convert: Callable, module: nn.Module) -> Import:
    """The report on a file with this module's tensors, which may be without values."""
    job = Import("true geometry", ForeignCheckpoint(Path("true geometry"), "", dict(module.state_dict())))
    convert(job)
    return job


# -------------------------------------------------------------------------------------------------------------- VA-VAE


@torch.no_grad()
def test_va_vae_is_a_stock_autoencoder(tmp_path: Path) -> None:
    theirs, image = ldm.shaken(ldm.VaVae()), make_image()
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 0.5]
    file = write(theirs.state_dict(), tmp_path / "f.safetensors")
    stats = write_statistics(tmp_path / "s.safetensors", mean, std)
    report = import_checkpoint(file, tmp_path / "out", stats=stats)
    ours = AutoencoderKL.from_pretrained(tmp_path / "out", dtype=torch.float64)
    z = theirs.encode(image)

    assert torch.allclose(ours.encode(image).latent_dist.mode(), z, rtol=1e-10, atol=1e-10)
    assert torch.allclose(ours.decode(z).sample, theirs.decode(z), rtol=1e-10, atol=1e-10)

    config = ours.config
    assert config.down_block_types == ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"]
    assert config.up_block_types == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2
    assert (config.block_out_channels, config.layers_per_block, config.latent_channels) == ([32, 32, 64], 2, 4)
    assert (config.latents_mean, config.latents_std) == (mean, std)
    assert (config.scaling_factor, config.shift_factor) == (1.0, None)
    assert [(row["key"], row["reason"]) for row in report.left] == [("loss.logvar", "of the loss")]
    assert {row["key"] for row in report.used} == set(theirs.state_dict()) - {"loss.logvar"}
    assert report.missing == []


def test_a_projection_of_the_alignment_loss_is_left_with_its_reason(tmp_path: Path) -> None:
    tensors = {**ldm.ImagenetDaVae().state_dict(), "da.align_proj.weight": torch.ones(1)}
    report = import_checkpoint(write(tensors, tmp_path / "f.safetensors"), tmp_path / "out", dry_run=True)
    assert {"key": "da.align_proj.weight", "reason": "of the alignment loss"} in report.left


def test_va_vae_has_the_papers_size() -> None:
    with torch.device("meta"):
        theirs = ldm.VaVae(TRUE_WIDTHS, 2, 32)
    report = convert_shapes(convert_va_vae, theirs)
    parts = count_parameters(report.used)
    assert (parts["encoder"], parts["quant_conv"]) == (28_413_248, 4_160)
    conv_in = 32 * 512 * 9 + 512  # the paper counts the decoder without it
    assert parts["decoder"] - conv_in == 41_269_635
    assert [row["target"] for row in report.missing] == ["latents_mean, latents_std"]


# ------------------------------------------------------------------------------------------------ DA-VAE for ImageNet

RENAMED = {"da.da_down": "dc.dc_down", "da.da_up": "dc.dc_up", "da.": "dc."}


def older(name: str) -> str:
    new = next((new for new in RENAMED if name.startswith(new)), None)
    return name if new is None else "model." + RENAMED[new] + name.removeprefix(new)


@torch.no_grad()
@pytest.mark.parametrize("names", ["newer", "older"])
def test_imagenet_da_vae_is_the_same_function(names: str, tmp_path: Path) -> None:
    theirs, image = ldm.shaken(ldm.ImagenetDaVae()), make_image(64)
    tensors = {older(name) if names == "older" else name: tensor for name, tensor in theirs.state_dict().items()}
    mean, std = np.linspace(-1, 1, 16).tolist(), np.linspace(0.2, 3, 16).tolist()
    stats = write_statistics(tmp_path / "stats.safetensors", mean, std)
    report = import_checkpoint(write(tensors, tmp_path / "f.safetensors"), tmp_path / "out", stats=stats)
    ours = AutoencoderDA.from_pretrained(tmp_path / "out", dtype=torch.float64)

    base, (detail, log_variance) = theirs.base(image), theirs.detail(image)
    raw = torch.cat([base, detail], dim=1).numpy()
    standardised = (raw - np.array(mean).reshape(1, -1, 1, 1)) / np.array(std).reshape(1, -1, 1, 1)
    latents = ours.encode(image).latent_dist

    assert np.allclose(latents.mode().numpy(), standardised, rtol=1e-9, atol=1e-9)
    assert torch.allclose(ours.encode_detail(image)[1], log_variance, rtol=1e-10, atol=1e-10)
    assert torch.allclose(
        ours.decode(latents.mode()).sample, theirs.decode(torch.from_numpy(raw)), rtol=1e-9, atol=1e-9
    )
    assert torch.allclose(ours.encode_base(image), base, rtol=1e-10, atol=1e-10)

    assert (ours.config.base_channels, ours.config.detail_channels) == (4, 12)
    assert not ours.config.linear_blocks

    unused = {
        f"da.{part}.{layer}.{kind}"
        for part, layer in (("encoder", "conv_out"), ("decoder", "conv_in"))
        for kind in ("weight", "bias")
    }
    left = {row["key"] for row in report.left}

    assert left == {"loss.logvar"} | {older(key).removeprefix("model.") if names == "older" else key for key in unused}
    assert report.checkpoint.prefixes == (("model.",) if names == "older" else ())


def test_imagenet_da_vae_has_the_papers_size() -> None:
    with torch.device("meta"):
        theirs = ldm.ImagenetDaVae(TRUE_WIDTHS, 2, 32, 96)
    report = convert_shapes(convert_imagenet_da_vae, theirs)

    assert count_parameters(report.used) == {
        "base_encoder": 28_413_248,
        "base_quant_conv": 4_160,
        "detail_encoder": 28_118_272,
        "detail_downsample": 614_448,
        "detail_upsample": 2_361_344,
        "joint_decoder": 41_269_635,
    }
    assert len(report.missing) == 2  # no statistics, of neither half


# ----------------------------------------------------------------------------------------------------- DA-VAE for SD3


class Sd3DaVae(nn.Module):
    """The reference code's DA-VAE for SD3: diffusers' names, detail latents first, images in [0, 1]."""

    def __init__(self, widths: tuple[int, ...] = (32, 64), channels: int = 4, detail: int = 4, blocks: int = 1) -> None:
        super().__init__()
        settings = {
            "down_block_types": ["DownEncoderBlock2D"] * len(widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(widths),
            "block_out_channels": widths,
            "layers_per_block": blocks,
            "latent_channels": channels,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
        self.vae, self.original_vae_model = AutoencoderKL(**settings), nn.Module()
        self.original_vae_model.vae = AutoencoderKL(**settings)
        self.dc_down, self.dc_up = nn.Module(), nn.Module()
        self.dc_down.conv = nn.Conv2d(widths[-1], detail // 2, 3, padding=1)
        self.dc_up.conv = nn.Conv2d(detail + channels, 4 * widths[-1], 3, padding=1)

    def base(self, x: Tensor) -> Tensor:
        half = [side // 2 for side in x.shape[-2:]]
        small = F.interpolate((x + 1) / 2, size=half, mode="bicubic", align_corners=False).clamp(0, 1)
        mean = self.original_vae_model.vae.encoder(small * 2 - 1).chunk(2, dim=1)[0]
        return (mean - 0.0609) * 1.5305  # Stable Diffusion 3's scale

    def detail(self, x: Tensor) -> tuple[Tensor, Tensor]:
        encoder = self.vae.encoder
        hidden = encoder.conv_in(x)
        for block in encoder.down_blocks:
            hidden = block(hidden)
        hidden = F.silu(encoder.conv_norm_out(encoder.mid_block(hidden)))
        main = unshuffled = ldm.unshuffle(self.dc_down.conv(hidden))
        groups = ldm.unshuffle(hidden).view(len(x), main.shape[1], -1, *main.shape[2:])
        return (unshuffled + groups.mean(dim=2)).chunk(2, dim=1)

    def decode(self, detail: Tensor, base: Tensor) -> Tensor:
        """In [0, 1], clamped."""
        decoder = self.vae.decoder
        hidden = decoder.mid_block(ldm.up_block(torch.cat([detail, base], dim=1), self.dc_up.conv))
        for block in decoder.up_blocks:
            hidden = block(hidden)
        shown = decoder.conv_out(F.silu(decoder.conv_norm_out(hidden)))
        return ((shown + 1) / 2).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize(("widths", "channels", "detail"), [((32, 64), 4, 4), ((32, 32, 128), 8, 8), ((32, 96), 2, 6)])
def test_sd3_da_vae_is_the_same_function_base_first(
    widths: tuple[int, ...], channels: int, detail: int, tmp_path: Path
) -> None:
    theirs, image = ldm.shaken(Sd3DaVae(widths, channels, detail)), make_image()
    mean, std = np.linspace(-1, 1, detail).tolist(), np.linspace(0.2, 3, detail).tolist()
    stats = tmp_path / "latent_norm_stats.json"
    stats.write_text(json.dumps({"mean": mean, "std": std}))
    file = write(theirs.state_dict(), tmp_path / "f.safetensors")
    report = import_checkpoint(file, tmp_path / "out", stats=stats)
    ours = AutoencoderDA.from_pretrained(tmp_path / "out", dtype=torch.float64)

    base, (code, log_variance) = theirs.base(image), theirs.detail(image)
    assert torch.allclose(ours.encode_base(image), base, rtol=1e-10, atol=1e-10)
    assert torch.allclose(ours.encode_detail(image)[0], code, rtol=1e-10, atol=1e-10)
    assert torch.allclose(ours.encode_detail(image)[1], log_variance, rtol=1e-10, atol=1e-10)

    units = ours.to_units(ours.encode(image).latent_dist.mode())
    standardised = (code.numpy() - np.array(mean).reshape(1, -1, 1, 1)) / np.array(std).reshape(1, -1, 1, 1)
    assert np.allclose(units.numpy(), np.concatenate([base.numpy(), standardised], axis=1), rtol=1e-9, atol=1e-9)

    shown = (ours.decode(ours.from_units(units)).sample + 1) / 2
    assert (shown < 0).any()  # not clamped, and the reference is
    assert torch.allclose(shown.clamp(0, 1), theirs.decode(code, base), rtol=1e-9, atol=1e-9)
    assert {row["key"].split(".")[1] for row in report.left if row["key"].startswith("original")} == {"vae"}
    assert all("decoder" in row["key"] or "conv_out" in row["key"] for row in report.left)
    assert any("[0, 1]" in note for note in report.notes)


def test_sd3_da_vae_has_the_references_size() -> None:
    with torch.device("meta"):
        theirs = Sd3DaVae((128, 256, 512, 512), 16, 16, blocks=2)
    parts = count_parameters(convert_shapes(convert_sd3_da_vae, theirs).used)
    assert (parts["detail_downsample"], parts["detail_upsample"]) == (36_872, 591_872)
    encoder = sum(p.numel() for p in theirs.original_vae_model.vae.encoder.parameters())
    assert parts["base_encoder"] == encoder
    assert parts["detail_encoder"] == encoder - 512 * 32 * 9 - 32


def test_all_new_latents_are_refused_with_the_reason(tmp_path: Path) -> None:
    tensors = Sd3DaVae().state_dict()
    tensors["dc_down.conv.weight"] = torch.zeros(4, 64, 3, 3)  # 8 latent channels of its own, and dc_up reads 8
    with pytest.raises(CheckpointError, match=r"'full' mode.*no base half"):
        import_checkpoint(write(tensors, tmp_path / "f.safetensors"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_order_that_would_tear_a_norms_groups_is_refused(tmp_path: Path) -> None:
    # The base latents' run is 2 of the decoder's channels, and its groups are of 4.
    theirs = Sd3DaVae((32, 128), 2, 126)
    theirs.dc_down.shortcut_proj = nn.Conv2d(4 * 128, 2 * 126, 1, bias=False)
    file = write(theirs.state_dict(), tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="would be torn"):
        import_checkpoint(file, tmp_path / "out")


def test_the_two_scalars_are_the_base_pipelines(tmp_path: Path) -> None:
    theirs = Sd3DaVae()
    file = write(theirs.state_dict(), tmp_path / "f.safetensors")

    for name, vae in (("base", theirs.original_vae_model.vae), ("other", Sd3DaVae().original_vae_model.vae)):
        vae.register_to_config(scaling_factor=0.7, shift_factor=0.2)
        vae.save_pretrained(tmp_path / name / "vae")
        index = {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))

    import_checkpoint(file, tmp_path / "out", base=str(tmp_path / "base"))
    config = AutoencoderDA.load_config(tmp_path / "out")
    assert (config["scaling_factor"], config["shift_factor"]) == (0.7, 0.2)
    assert (config["base_config"]["scaling_factor"], config["base_downsample"]) == (0.7, "bicubic")
    with pytest.raises(SettingsError, match="frozen base encoder is not this pipeline's"):
        import_checkpoint(file, tmp_path / "out", base=str(tmp_path / "other"))

    import_checkpoint(file, tmp_path / "out")
    config = AutoencoderDA.load_config(tmp_path / "out")
    assert (config["scaling_factor"], config["shift_factor"]) == (1.5305, 0.0609)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors import safe_open

    theirs = ldm.VaVae().to(dtype)
    import_checkpoint(write(theirs.state_dict(), tmp_path / "f.safetensors"), tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert torch.equal(tensors["encoder.conv_in.weight"], theirs.encoder.conv_in.weight)


WRONG = {
    "another width": (
        "decoder.mid.block_2.conv1.weight",
        torch.zeros(64, 32, 3, 3),
        "found [64, 32, 3, 3] float32, wanted [64, 64, 3, 3]",
    ),
    "missing": ("encoder.mid.attn_1.v.bias", None, "found none, wanted [64]"),
    "missing, and wanted for the config": ("decoder.conv_out.weight", None, "found none"),
    "a layer too many": ("decoder.up.0.block.3.conv1.weight", torch.zeros(2, 2), "found [2, 2], wanted none"),
    "integers": ("quant_conv.bias", torch.zeros(8, dtype=torch.int8), "found [8] int8, wanted [8]"),
    "a linear layer, not a convolution": (
        "encoder.down.2.attn.1.q.weight",
        torch.zeros(64, 64),
        "wanted [64, 64, 1, 1]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_with_the_first_mismatch(case: str, tmp_path: Path) -> None:
    key, tensor, message = WRONG[case]
    tensors = ldm.VaVae().state_dict()
    tensors.pop(key, None)
    tensors |= {} if tensor is None else {key: tensor}
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(write(tensors, tmp_path / "f.safetensors"), tmp_path / "out", kind="va-vae")
    assert f"first mismatch is {key}: " in str(refused.value)
    assert message in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_width_that_no_norm_divides_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = ldm.VaVae((32, 64)).state_dict()
    thin = {
        name: torch.zeros([48 if side == 64 else side for side in tensor.shape]) for name, tensor in tensors.items()
    }
    with pytest.raises(CheckpointError, match="no AutoencoderKL has such shapes"):
        import_checkpoint(write(thin, tmp_path / "f.safetensors"), tmp_path / "out")


@pytest.mark.parametrize("channels", [4, 17])
def test_statistics_of_other_channels_are_refused(channels: int, tmp_path: Path) -> None:
    stats = write_statistics(tmp_path / "stats.safetensors", [0.0] * channels, [1.0] * channels)
    file = write(ldm.ImagenetDaVae().state_dict(), tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=f"of {channels} channels, but this autoencoder, base first, has 16"):
        import_checkpoint(file, tmp_path / "out", stats=stats)
