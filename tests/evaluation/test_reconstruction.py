import json
import math
from html import unescape
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from davae.data.sources import PictureSet, open_pictures
from davae.data.split import heldout
from davae.errors import DataError, SettingsError
from davae.evaluation.reconstruction import make_gallery, make_table, measure, reconstruct
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer
from davae.method.metrics import psnr, ssim
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from scenes import fill_with_scenes


@pytest.fixture(scope="module")
def pictures(picture_folder: Path) -> PictureSet:
    """All 16, so that there are two batches."""
    return open_pictures(picture_folder, size=64)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS.alex()


@pytest.fixture(scope="module")
def vae(base_folder: Path):
    return load_base_vae(str(base_folder))


@pytest.fixture(scope="module")
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


def test_the_identity_is_perfect(pictures, lpips) -> None:
    values = measure(pictures, {"identity": lambda image: image}, lpips=lpips)
    assert values["identity"]["psnr"] == math.inf
    assert values["identity"]["ssim"] == pytest.approx(1, abs=2e-5)  # float32
    assert values["identity"]["lpips"] == pytest.approx(0, abs=1e-6)


def test_numbers_are_means_over_pictures_of_both_batches(pictures, lpips) -> None:
    def duller(image: Tensor) -> Tensor:
        return 0.5 * image

    assert len(pictures) > 8
    means = measure(pictures, {"duller": duller, "same": lambda image: image}, lpips=lpips)
    assert list(means) == ["duller", "same"]

    alone = [pictures.batch([index]) for index in range(len(pictures))]
    for name, metric in (("psnr", psnr), ("ssim", ssim), ("lpips", lpips)):
        values = [metric(duller(image), image).item() for image in alone]
        assert means["duller"][name] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    by_hand = [10 * math.log10(4 / (image / 2).double().square().mean().item()) for image in alone]
    assert means["duller"]["psnr"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_what_overshoots_is_clamped_as_a_picture_is(pictures, lpips) -> None:
    loud = measure(pictures, {"loud": lambda image: 3 * image.sign()}, lpips=lpips)
    capped = measure(pictures, {"loud": lambda image: image.sign()}, lpips=lpips)
    assert loud == capped


@torch.no_grad()
def test_the_bounds_are_the_bases_own(pictures, vae, autoencoder) -> None:
    image = pictures.batch([0, 1])
    at_full = vae.decode(vae.encode(image).latent_dist.mode()).sample
    torch.testing.assert_close(make_tokenizer(vae)(image), at_full)
    half = F.interpolate(image, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    small = vae.decode(vae.encode(half).latent_dist.mode()).sample.clamp(-1, 1)
    assert small.shape[-1] == 32
    large = F.interpolate(small, size=(64, 64), mode="bicubic")
    torch.testing.assert_close(enlarge_base(vae, autoencoder)(image), large)


@torch.no_grad()
def test_ours_is_encode_and_decode(pictures, autoencoder) -> None:
    image = pictures.batch([0, 1])
    latents = autoencoder.encode(image).latent_dist.mode()
    assert latents.shape == (2, 12, 8, 8)
    torch.testing.assert_close(make_tokenizer(autoencoder)(image), autoencoder.decode(latents).sample)


def test_a_gallery_shows_originals_ways_and_errors(pictures) -> None:
    shown = make_gallery(pictures, [3, 1], {"darker": lambda image: image - 0.1}, differences=["darker"])
    assert shown.columns == ["original", "darker", "4 x error, darker"]
    assert shown.rows == [pictures.captions[3], pictures.captions[1]]
    assert torch.equal(shown.cells[0][0], pictures.image(3))
    grey = shown.cells[0][2][pictures.image(3) > 20]  # 4 x 0.1 of a range of 2, below the middle
    assert int(grey.min()) == int(grey.max()) == round((1 - 0.2) * 127.5)


def test_a_table_has_a_row_for_each_way() -> None:
    made = make_table(
        {"a": {"psnr": 30.123, "ssim": 0.5, "lpips": 0.25}, "b": {"psnr": math.inf, "ssim": 1.0, "lpips": 0}}
    )
    assert [list(row) for row in made.rows] == [["a", "30.12", "0.5000", "0.2500"], ["b", "inf", "1.0000", "0.0000"]]


# --------------------------------------------------------------------------------------------------------- reconstruct


def test_reconstruct_writes_numbers_and_a_page(autoencoder, vae, picture_folder, tmp_path, lpips) -> None:
    page = reconstruct(autoencoder, picture_folder, tmp_path / "out", base=vae, size=64)
    assert page == tmp_path / "out" / "index.html"
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "result.json"}
    result = json.loads((page.parent / "result.json").read_text())
    assert (result["count"], result["size"]) == (4, 64)

    bounds = ["base at full size", "base at full size, unshuffled"]
    assert list(result["values"]) == ["base at half size, bicubic", "davae", *bounds]
    heldout = open_pictures(picture_folder, size=64, split="heldout")
    assert result["values"]["davae"] == pytest.approx(
        measure(heldout, {"a": make_tokenizer(autoencoder)}, lpips=lpips)["a"]
    )

    text = unescape(page.read_text())
    assert all(caption in text for caption in heldout.captions)
    assert "4 held-out images at 64 px through f8 latents" in text
    for row in result["values"].values():
        assert f"{row['psnr']:.2f}" in text


def test_reconstruct_without_a_base_shows_ours_alone(autoencoder, picture_folder, tmp_path) -> None:
    page = reconstruct(autoencoder, picture_folder, tmp_path, size=64, limit=2)
    result = json.loads((page.parent / "result.json").read_text())
    assert (list(result["values"]), result["count"]) == (["davae"], 2)


def test_a_damaged_picture_is_listed_and_not_measured(autoencoder, tmp_path) -> None:
    folder = fill_with_scenes(tmp_path / "pictures", train=3, held=3)
    damaged = [path for path in sorted(folder.glob("*.png")) if heldout(path.stem)][1]
    damaged.write_bytes(damaged.read_bytes()[:2000])
    page = reconstruct(autoencoder, folder, tmp_path / "out", size=64)
    assert json.loads((page.parent / "result.json").read_text())["count"] == 2
    assert f"1 refused: {damaged.name}" in unescape(page.read_text())


def test_the_bounds_of_another_base_are_refused(autoencoder, picture_folder, base_folder, tmp_path) -> None:
    other = load_base_vae(str(base_folder))
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.1)
    with pytest.raises(SettingsError, match="frozen base encoder is not this pipeline's"):
        reconstruct(autoencoder, picture_folder, tmp_path / "out", base=other, size=64)
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_factor_does_not_divide_is_refused(autoencoder, picture_folder, tmp_path) -> None:
    with pytest.raises(SettingsError, match=r"size=60 must be a multiple of 8"):
        reconstruct(autoencoder, picture_folder, tmp_path / "out", size=60)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_is_refused(autoencoder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no usable picture"):
        reconstruct(autoencoder, tmp_path / "empty", tmp_path / "out", size=64)
