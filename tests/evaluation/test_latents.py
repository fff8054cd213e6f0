"""`davae latents`: what is drawn, and the numbers beside it."""

import json
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from davae import AutoencoderDA, detail_alignment_loss
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation.latents import choose_positions, describe, draw_latents, encode_halves
from davae.evaluation.report import matrix_tile, place_colours, scatter_tile
from davae.evaluation.structure import at_positions, neighbourhood_agreement
from davae.method.closed_form import fit_closed_form
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae


@pytest.fixture(scope="module")
def pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64)


@pytest.fixture(scope="module")
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


@pytest.fixture(scope="module")
def others(base_folder: Path, pictures: PictureSet) -> dict[str, AutoencoderDA]:
    """One whose code is not turned to the base, and one whose latents are all new."""
    vae, images = load_base_vae(str(base_folder)), pictures.batch(range(len(pictures)))
    made = {}
    for name, all_new in (("plain", False), ("full", True)):
        made[name] = AutoencoderDA.from_base(vae, detail_channels=8, all_new=all_new).eval()
        fit_closed_form(made[name], images, metric_pictures=2, code="unit variance")
        made[name].calibrate([images])
    return made


@torch.no_grad()
def test_halves_are_what_the_transformer_and_the_alignment_loss_see(pictures, autoencoder) -> None:
    halves = encode_halves(autoencoder, pictures)
    image = pictures.batch(range(len(pictures)))
    units = autoencoder.to_units(autoencoder.encode(image).latent_dist.mode())
    base, detail = autoencoder.split(units)
    torch.testing.assert_close(halves.base, base, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(halves.detail, detail, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(halves.unscaled, autoencoder.encode_detail(image)[0], atol=1e-4, rtol=1e-4)
    assert halves.own_base
    given = torch.zeros_like(base)
    assert torch.equal(encode_halves(autoencoder, pictures, base=given).base, given)


def test_positions_are_drawn_from_what_is_not_flat(tmp_path: Path) -> None:
    # Two 64 px pictures, white but for a busy square in one corner: four of 64 positions of f8 each.
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        picture = np.full((64, 64, 3), 255, dtype=np.uint8)
        picture[:32, 32:] = random.integers(0, 255, (32, 32, 3))
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("white")
    pictures = open_pictures(tmp_path, size=64)

    expected = {n * 64 + row * 8 + column for n in range(2) for row in range(4) for column in range(4, 8)}
    assert set(choose_positions(pictures, 8, 1000, seed=0).tolist()) == expected

    few = choose_positions(pictures, 8, 20, seed=0)
    assert len(few) == 20
    assert set(few.tolist()) < expected
    assert torch.equal(few, choose_positions(pictures, 8, 20, seed=0))
    assert not torch.equal(few, choose_positions(pictures, 8, 20, seed=1))
    with pytest.raises(DataError, match="8 latent positions are not flat, 16 are needed"):
        choose_positions(pictures, 16, 1000, seed=0)


@pytest.fixture(scope="module")
def drawn(autoencoder, others, picture_folder, tmp_path_factory) -> Path:
    autoencoders, out = {"ours": autoencoder, **others}, tmp_path_factory.mktemp("latents")
    return draw_latents(autoencoders, picture_folder, out, size=64, points=60, neighbours=3)


def test_the_numbers_are_those_of_their_functions(drawn: Path, autoencoder, others, picture_folder) -> None:
    result = json.loads((drawn.parent / "result.json").read_text())
    heldout = open_pictures(picture_folder, size=64, split="heldout")
    assert (result["count"], result["size"], result["neighbours"]) == (4, 64, 3)
    assert list(result["autoencoders"]) == ["ours", "plain", "full"]

    ours, full = result["autoencoders"]["ours"], result["autoencoders"]["full"]
    halves = encode_halves(autoencoder, heldout)
    rows = choose_positions(heldout, 8, 60, seed=0)
    base, detail = (at_positions(half)[rows] for half in (halves.base, halves.detail))
    assert ours["agreement_positions"] == pytest.approx(neighbourhood_agreement(base, detail, 3).item())
    assert ours["by_chance_positions"] == pytest.approx(3 / 59)
    assert ours["agreement_pictures"] is None  # four pictures have no three neighbours and more
    assert ours["alignment_loss"] == pytest.approx(detail_alignment_loss(halves.unscaled, halves.base).item(), rel=1e-5)
    assert np.shape(ours["channel_correlation"]) == (4, 8)
    assert len(ours["base_spectrum"]) == len(ours["detail_spectrum"]) == 4
    assert all(0 < value < 5 for fact in result["autoencoders"].values() for value in fact["tsne_divergence"])

    # New latents are held against the base latents of the first autoencoder that has any.
    assert (ours["base_latents"], full["base_latents"]) == ("its own", "another autoencoder's")
    new = at_positions(encode_halves(others["full"], heldout).detail)[rows]
    assert full["agreement_positions"] == pytest.approx(neighbourhood_agreement(base, new, 3).item())


def test_an_aligned_code_is_nearer_to_the_base(drawn: Path) -> None:
    facts = json.loads((drawn.parent / "result.json").read_text())["autoencoders"]
    assert facts["ours"]["group_mean_correlation"] > 0.1 + facts["plain"]["group_mean_correlation"]
    assert facts["ours"]["alignment_loss"] < facts["plain"]["alignment_loss"]


def test_page_and_figure_show_every_autoencoder(drawn: Path) -> None:
    assert {path.name for path in drawn.parent.iterdir()} == {"index.html", "latents.png", "result.json"}
    text = unescape(drawn.read_text())
    facts = json.loads((drawn.parent / "result.json").read_text())["autoencoders"]
    for name, fact in facts.items():
        assert f"{name}: neighbours kept {fact['agreement_positions']:.3f}, by chance 0.051" in text
    assert "cycles across the image" in text
    with Image.open(drawn.parent / "latents.png") as figure:
        assert figure.width > 5 * 420
        assert figure.height > 3 * 420


def test_with_pictures_enough_whole_pictures_are_compared(pictures, autoencoder) -> None:
    halves, rows = encode_halves(autoencoder, pictures), torch.arange(100)
    facts = describe(halves, rows, neighbours=3)
    expected = neighbourhood_agreement(halves.base.flatten(1), halves.detail.flatten(1), 3).item()
    assert facts["agreement_pictures"] == pytest.approx(expected)
    assert facts["by_chance_pictures"] == pytest.approx(3 / 15)


def test_refusals(autoencoder, others, base_folder, picture_folder, tmp_path) -> None:
    def draw(**changes: object) -> None:
        draw_latents(
            **{"autoencoders": {"ours": autoencoder}, "pictures": picture_folder, "out": tmp_path, "size": 64} | changes
        )

    with pytest.raises(SettingsError, match=r"size=60 must be a multiple of 8, the downsample factor of ours"):
        draw(size=60)
    with pytest.raises(SettingsError, match="points=2001: allowed are 16 to 2000"):
        draw(points=2001)
    with pytest.raises(SettingsError, match=r"full has no base latents.*downsample factor 8"):
        draw(autoencoders={"full": others["full"]})
    untrained = AutoencoderDA.from_base(load_base_vae(str(base_folder)), detail_channels=4)
    with pytest.raises(SettingsError, match="detail latents of fresh do not vary"):
        draw(autoencoders={"fresh": untrained})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- drawings


def test_a_cloud_is_drawn_in_its_colours_and_its_shape() -> None:
    points = np.array([[0.0, 0.0], [4.0, 1.0]])
    tile = scatter_tile(points, np.array([[1.0, 0, 0], [0, 0, 1.0]]))
    assert tile.shape == (3, 420, 420)
    pixels = tile.float()
    red = ((pixels[0] > 200) & (pixels[1] < 60)).nonzero().float().mean(dim=0)
    blue = ((pixels[2] > 200) & (pixels[1] < 60)).nonzero().float().mean(dim=0)
    across, up = blue[1] - red[1], red[0] - blue[0]  # one scale for both axes
    assert up > 20
    assert across / up == pytest.approx(4, rel=0.05)


def test_a_matrix_is_red_at_one_and_blue_at_minus_one() -> None:
    tile = matrix_tile(np.array([[1.0, 0.0], [0.0, -1.0]])).float()
    one, nothing, minus = tile[:, 100, 100], tile[:, 100, 300], tile[:, 300, 300]
    assert one[0] > one[2] + 50
    assert minus[2] > minus[0] + 50
    assert nothing.min() > 240


def test_places_far_apart_have_unlike_colours() -> None:
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    colours = place_colours(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    assert colours.min() >= 0
    assert colours.max() <= 1
    apart = np.abs(colours[:, None] - colours).sum(axis=2) + 9 * np.eye(8)
    assert apart.min() > 0.2
    assert apart[0, 4] > apart[0, 1]
