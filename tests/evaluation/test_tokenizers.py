"""Tokenizers behind one interface: each really goes through latents of the shape that it says."""

import json
import math
from html import unescape
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

import tiny
from davae import AutoencoderDA
from davae.data.sources import open_pictures
from davae.errors import CheckpointError, SettingsError
from davae.evaluation.reconstruction import make_tokenizer_table, measure, measure_kid, reconstruct
from davae.evaluation.tokenizers import (
    enlarge_base,
    load_tokenizer,
    make_tokenizer,
    name_folders,
    randomise_detail,
    unshuffle_base,
    zero_detail,
)
from davae.method.metrics import kid
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae


def tiny_dc() -> AutoencoderDC:
    """An f8 DC-AE of 2 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
        return AutoencoderDC(
            latent_channels=2,
            attention_head_dim=4,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), ()),
            decoder_qkv_multiscales=((), (), (), ()),
        ).eval()


@pytest.fixture(scope="module")
def image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, size=(64, 64), mode="bilinear")


@pytest.fixture(scope="module")
def vae(base_folder: Path):
    return load_base_vae(str(base_folder))


@pytest.fixture(scope="module")
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


@pytest.fixture(scope="module")
def dc_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "dc"
    tiny_dc().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def all_new_folder(tmp_path_factory, vae) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "full"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderDA.from_base(vae, detail_channels=8, linear_blocks=False, all_new=True).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_every_tokenizer_makes_latents_of_its_factor_and_channels(image, vae, autoencoder) -> None:
    with torch.random.fork_rng(devices=[]):
        full = AutoencoderDA.from_base(vae, detail_channels=8, linear_blocks=False, all_new=True)

    tokenizers = {
        "f4c4p2": make_tokenizer(vae),
        "f8c4p2": enlarge_base(vae, autoencoder),
        "f8c16p2": unshuffle_base(vae),
        "f8c12p2": make_tokenizer(autoencoder),
        "f8c8p2": make_tokenizer(full),
        "f8c2p2": make_tokenizer(tiny_dc()),
    }
    for brief, tokenizer in [*tokenizers.items(), ("f4c4p2", make_tokenizer(tiny.tiny_taesd()))]:
        latents = tokenizer.encode(image)
        assert latents.shape == (2, tokenizer.channels, 64 // tokenizer.factor, 64 // tokenizer.factor), brief
        assert tokenizer.decode(latents).shape == image.shape
        assert torch.equal(tokenizer(image), tokenizer.decode(latents))
        assert not torch.allclose(tokenizer.decode(latents + 1), tokenizer(image)), brief  # it reads them
        cost = tokenizer.count_cost(size=64, patch=2, equal_tokens=16)
        assert cost["brief"] == brief
        assert cost["numbers_per_picture"] == latents[0].numel()
        assert cost["numbers_per_pixel"] == latents[0].numel() / 64**2


@torch.no_grad()
def test_unshuffled_latents_give_the_pictures_of_the_base_at_full_size(image, vae) -> None:
    full, simple = make_tokenizer(vae), unshuffle_base(vae)
    assert torch.equal(simple(image), full(image))
    latents, unshuffled = full.encode(image), simple.encode(image)
    for channel, row, column in ((0, 0, 0), (1, 0, 1), (3, 1, 0), (2, 1, 1)):  # channel order of a pixel unshuffle
        assert torch.equal(unshuffled[:, 4 * channel + 2 * row + column], latents[:, channel, row::2, column::2])


@torch.no_grad()
def test_no_latent_is_rounded_on_the_way(image) -> None:
    vae = tiny.tiny_taesd()
    expected = vae.decode(vae.encode(image).latents).sample
    assert torch.equal(make_tokenizer(vae)(image), expected)
    assert not torch.equal(vae(image).sample, expected)  # its forward rounds them to bytes


@torch.no_grad()
def test_zeroed_and_randomised_detail_leave_the_base(image, autoencoder) -> None:
    base, detail = autoencoder.encode_base(image), autoencoder.encode_detail(image)[0]
    expected = autoencoder.reconstruct(base, torch.zeros_like(detail))
    torch.testing.assert_close(zero_detail(autoencoder)(image), expected, atol=1e-5, rtol=1e-4)

    noisy = randomise_detail(autoencoder)
    assert torch.equal(noisy(image), noisy(image))
    assert not torch.allclose(noisy(image), randomise_detail(autoencoder, seed=1)(image))

    # The decoder gets the image's own base latents, and noise in units.
    decoded: list[tuple[Tensor, Tensor]] = []
    reconstruct_ = autoencoder.reconstruct

    def recording(base: Tensor, detail: Tensor) -> Tensor:
        decoded.append((base, detail))
        return reconstruct_(base, detail)

    autoencoder.reconstruct = recording
    try:
        noisy(image)
    finally:
        del autoencoder.reconstruct
    ((decoded_base, decoded_detail),) = decoded
    torch.testing.assert_close(decoded_base, base, atol=1e-5, rtol=1e-4)
    units = (decoded_detail - autoencoder.detail_mean.view(1, -1, 1, 1)) / autoencoder.detail_std.view(1, -1, 1, 1)
    assert abs(units.mean().item()) < 0.1  # 1,024 numbers
    assert abs(units.std().item() - 1) < 0.1


# ------------------------------------------------------------------------------------------------- factors and tokens


def test_costs_by_hand(vae) -> None:
    full = make_tokenizer(vae)  # f4 c4
    cost = full.count_cost(size=64, patch=2, equal_tokens=16)
    assert cost == {
        "brief": "f4c4p2", "downsample_factor": 4, "channels": 4, "numbers_per_picture": 4 * 16 * 16,
        "numbers_per_pixel": 0.25, "tokens": 8 * 8, "patch_at_equal_tokens": 4,
    }  # fmt: skip
    assert full.count_cost(size=64, patch=3, equal_tokens=16)["tokens"] is None
    assert full.count_cost(size=64, patch=2, equal_tokens=25)["patch_at_equal_tokens"] is None


def test_patches_of_equal_tokens_are_those_of_the_papers_table_2() -> None:
    # 512 px, 16 x 16 tokens: SD-VAE f8c4p4, DC-AE f32c32p1, VA-VAE f16c32p2, DA-VAE f32c128p1
    identity = make_tokenizer(tiny_dc())

    for factor, channels, brief in (
        (8, 4, "f8c4p4"),
        (32, 32, "f32c32p1"),
        (16, 32, "f16c32p2"),
        (32, 128, "f32c128p1"),
    ):
        tokenizer = type(identity)(identity.encode, identity.decode, factor, channels)
        patch = tokenizer.count_cost(size=512, patch=1, equal_tokens=16 * 16)["patch_at_equal_tokens"]
        assert tokenizer.count_cost(size=512, patch=patch, equal_tokens=None)["brief"] == brief
        assert tokenizer.count_tokens(512, patch) == 256


# ------------------------------------------------------------------------------------------------------------ loading


@torch.no_grad()
def test_each_folder_is_recognised_by_its_class(image, base_folder, autoencoder_folder, dc_folder, tmp_path) -> None:
    tiny.tiny_taesd().save_pretrained(tmp_path / "taesd")
    expected = {
        base_folder / "vae": make_tokenizer(load_base_vae(str(base_folder))),
        base_folder: make_tokenizer(load_base_vae(str(base_folder))),  # a whole pipeline
        autoencoder_folder: make_tokenizer(load_autoencoder(autoencoder_folder)),
        dc_folder: make_tokenizer(tiny_dc()),
        tmp_path / "taesd": make_tokenizer(tiny.tiny_taesd()),
    }

    for folder, tokenizer in expected.items():
        loaded = load_tokenizer(folder)
        assert (loaded.factor, loaded.channels) == (tokenizer.factor, tokenizer.channels)
        torch.testing.assert_close(loaded(image), tokenizer(image))


def test_folders_of_something_else_are_refused(base_folder, dc_folder, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no autoencoder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(
        SettingsError, match=r"class SD3Transformer2DModel is not supported; allowed are .*AutoencoderDC"
    ):
        load_tokenizer(base_folder / "transformer")

    # A config that is no JSON, and one whose weights are missing.
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(damaged)
    (damaged / "config.json").write_text((dc_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="damaged cannot be loaded"):
        load_tokenizer(damaged)


def test_names_are_short_and_apart(tmp_path: Path) -> None:
    assert name_folders([]) == {}
    assert list(name_folders([tmp_path / "a" / "vae", tmp_path / "b" / "vae"])) == ["a/vae", "b/vae"]
    two = [tmp_path / "a" / "x" / "vae", tmp_path / "b" / "x" / "vae"]
    assert list(name_folders(two)) == ["a/x/vae", "b/x/vae"]
    with pytest.raises(SettingsError, match="given twice"):
        name_folders([tmp_path / "a", tmp_path / "a"])


# ---------------------------------------------------------------------------------------------------- the whole table


def test_one_command_makes_the_table(
    autoencoder, vae, picture_folder, dc_folder, all_new_folder, base_folder, tmp_path
) -> None:
    others = {name: load_tokenizer(folder) for name, folder in name_folders([dc_folder, all_new_folder]).items()}
    page = reconstruct(
        autoencoder, picture_folder, tmp_path, base=vae, compare=others, size=64, limit=2, patch=1, ablate_detail=True
    )
    result = json.loads((tmp_path / "result.json").read_text())
    dc, full = others
    assert (dc.rsplit("/")[-1], full.rsplit("/")[-1]) == ("dc", "full")
    briefs = {name: cost["brief"] for name, cost in result["tokenizers"].items()}
    assert briefs == {
        "base at half size, bicubic": "f8c4p1",
        "davae": "f8c12p1",
        "davae, detail zeroed": "f8c12p1",
        "davae, detail randomised": "f8c12p1",
        dc: "f8c2p1",
        full: "f8c8p1",
        "base at full size": "f4c4p1",
        "base at full size, unshuffled": "f8c16p1",
    }

    # Values and costs of every row.
    assert list(result["values"]) == list(briefs)
    assert result["values"]["base at full size"] == result["values"]["base at full size, unshuffled"]
    ablated = [result["values"][name]["psnr"] for name in list(briefs)[1:4]]
    assert len(set(ablated)) == 3
    costs = result["tokenizers"]
    assert {costs[name]["tokens"] for name in briefs} == {64, 256}
    assert costs["base at full size"]["patch_at_equal_tokens"] == 2

    # The values of `measure`, and a page with all names.
    heldout = open_pictures(picture_folder, size=64, split="heldout", limit=2)
    alone = measure(heldout, {dc: make_tokenizer(tiny_dc())}, lpips=LPIPS.alex())
    assert result["values"][dc] == pytest.approx(alone[dc])
    text = unescape(page.read_text())
    assert all(brief in text for brief in briefs.values())
    assert dc in text


def test_ours_may_have_all_new_latents(all_new_folder, vae, picture_folder, tmp_path) -> None:
    full = load_autoencoder(all_new_folder)
    reconstruct(full, picture_folder, tmp_path, base=vae, size=64, limit=1)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["tokenizers"]["davae"]["brief"] == "f8c8p2"
    assert "base at half size, bicubic" in result["values"]
    with pytest.raises(SettingsError, match="nothing is left to decode"):
        reconstruct(full, picture_folder, tmp_path / "out", size=64, ablate_detail=True)


def test_a_size_that_another_factor_does_not_divide_is_refused(autoencoder, picture_folder, tmp_path) -> None:
    coarse = type(make_tokenizer(autoencoder))(lambda image: image, lambda latents: latents, 128, 3)
    with pytest.raises(SettingsError, match="size=64 must be a multiple of 128, the downsample factor of coarse"):
        reconstruct(autoencoder, picture_folder, tmp_path / "out", compare={"coarse": coarse}, size=64)
    assert not (tmp_path / "out").exists()


def test_kid_is_that_of_the_reconstructions_features(picture_folder) -> None:
    pictures = open_pictures(picture_folder, size=64)

    def extract(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 16).flatten(1)

    ways = {"same": lambda image: image, "dull": lambda image: 0.2 * image}
    kids = measure_kid(pictures, ways, extract, device=torch.device("cpu"))
    image = pictures.batch(range(len(pictures)))
    assert kids["dull"] == pytest.approx(kid(extract(0.2 * image), extract(image)), rel=1e-3)
    assert kids["same"] <= 0 < kids["dull"]

    # They stand in the last column.
    values = {name: {"psnr": 1.0, "ssim": 0.5, "lpips": 0.1} for name in ways}
    costs = {name: {"brief": "f1c3p1", "numbers_per_pixel": 3.0, "tokens": None, "patch_at_equal_tokens": 1}
             for name in ways}  # fmt: skip
    shown = make_tokenizer_table(values, costs, kids, patch=3)
    assert shown.header[-1] == "KID x 1000 (EfficientNet-Lite0)"
    assert list(shown.rows[1]) == [
        "dull", "f1c3p1", "3", "-", "1", "1.00", "0.5000", "0.1000", f"{1000 * kids['dull']:.2f}"
    ]  # fmt: skip
    assert not math.isnan(kids["dull"])
