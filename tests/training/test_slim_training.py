"""Stage 1 trains a slim decoder: on finished latents, which stay, or from the start."""

from pathlib import Path

import pytest
import torch

from davae.data.sources import open_pictures
from davae.errors import SettingsError
from davae.pipelines.autoencoders import load_autoencoder
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_one_start import start_autoencoder
from stages import autoencoder_recipe

SLIM = {"decoder_block_out_channels": (4, 8, 12), "decoder_layers_per_block": (0, 0, 1)}


@pytest.fixture
def recipe(base_folder: Path, picture_folder: Path) -> AutoencoderRecipe:
    return autoencoder_recipe(base_folder, picture_folder, steps=2, detail_channels=8, learning_rate=1e-2, **SLIM)


def test_a_slim_decoder_learns_on_latents_that_stay_bit_for_bit(
    recipe: AutoencoderRecipe, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    refined = recipe.model_copy(update={"autoencoder": str(autoencoder_folder), "decoder_only": True})
    slim = load_autoencoder(train_autoencoder(refined, tmp_path / "run"))
    full, start = (load_autoencoder(folder) for folder in (autoencoder_folder, tmp_path / "run" / "start"))
    assert tuple(slim.config.decoder_block_out_channels) == SLIM["decoder_block_out_channels"]
    pictures = open_pictures(picture_folder, size=64, split="train")
    image = pictures.batch(range(4))
    with torch.no_grad():
        ours, theirs = (model.encode(image).latent_dist for model in (slim, full))
        assert torch.equal(ours.parameters, theirs.parameters)
    before, after = start.state_dict(), slim.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.startswith(("detail_upsample.", "joint_"))}
    again = refined.model_copy(update={"autoencoder": str(tmp_path / "run" / "autoencoder")})
    gone_on = start_autoencoder(again, pictures, tmp_path / "again" / "start").state_dict()
    assert all(torch.equal(gone_on[name], after[name]) for name in after)
    other = again.model_copy(update={"decoder_block_out_channels": (4, 8, 16)})
    with pytest.raises(SettingsError, match="slim already"):
        start_autoencoder(other, pictures, tmp_path / "other" / "start")
    assert not (tmp_path / "other").exists()


def test_a_slim_decoder_and_its_latents_from_the_start(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    slim, start = load_autoencoder(train_autoencoder(recipe, tmp_path)), load_autoencoder(tmp_path / "start")
    before, after = start.state_dict(), slim.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == {
        name for name in after if name.startswith("base_")
    }
    assert slim.joint_decoder.conv_norm_out.num_channels == 4


def test_widths_that_the_base_has_not_are_refused(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="multiples of"):
        train_autoencoder(recipe.model_copy(update={"decoder_block_out_channels": (5, 8, 16)}), tmp_path)
    assert not (tmp_path / "recipe.toml").exists()
