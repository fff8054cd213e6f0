"""Settings, autoencoders and pictures that stage 1 refuses, or makes do with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from davae.data.sources import open_pictures
from davae.errors import CheckpointError, DataError, NumericsError, SettingsError
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from scenes import fill_with_scenes
from stages import stage_one_recipe


@pytest.fixture(scope="module")
def recipe(base_folder: Path, picture_folder: Path) -> AutoencoderRecipe:
    return stage_one_recipe(base_folder, picture_folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 60, "crop": 32}, r"size=60.*multiples of 8"),
        ({"crop": 36}, r"crop=36.*multiples of 8.*size=64"),
        ({"crop": 72}, r"crop=72.*size=64"),
        ({"crop": 24}, r"crop=24.*from 32, which LPIPS needs"),
        ({"detail_channels": 6}, r"detail_channels=6 must be a positive multiple of base_channels=4"),
        ({"detail_channels": 8, "start": "random"}, r"in_channels=12 must divide .* Choose detail_channels"),
        (
            {"crop": 16, "loss": LossWeights(lpips=0, adversarial=0.1)},
            r"crop=16.*from 24, which the discriminator needs",
        ),
        ({"loss": LossWeights(lpips_patch=48)}, r"lpips_patch=48: allowed are 32 to crop=32"),
        ({"loss": LossWeights(lpips_patch=24)}, r"lpips_patch=24: allowed are 32 to crop=32"),
        ({"loss": LossWeights(lpips_patch=32, lpips_stride=33)}, r"lpips_stride=33: .* lpips_patch, which is 32"),
        ({"loss": LossWeights(lpips_stride=16)}, r"lpips_stride=16: .* lpips_patch, which is not given"),
        ({"decoder_only": True, "frozen_trunk": True}, r"decoder_only trains less"),
        (
            {"decoder_only": True, "loss": LossWeights(adaptive_alignment=True)},
            r"adaptive_alignment with decoder_only",
        ),
    ],
    ids=[
        "size",
        "crop",
        "crop above size",
        "crop below LPIPS",
        "channels",
        "channels of the random start",
        "crop below the discriminator",
        "patch above crop",
        "patch below LPIPS",
        "stride above patch",
        "stride without patch",
        "frozen twice",
        "alignment of what is frozen",
    ],
)
def test_settings_that_do_not_fit_are_named(
    recipe: AutoencoderRecipe, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(SettingsError, match=named):
        train_autoencoder(recipe.model_copy(update=changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_crop_below_lpips_is_fine_without_it(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    chosen = recipe.model_copy(update={"crop": 24, "loss": LossWeights(lpips=0), "steps": 1})
    assert (train_autoencoder(chosen, tmp_path) / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"detail_channels": 12}, r"detail_channels=12, but .* has 8"),
        ({"base_downsample": "bicubic"}, r"base_downsample='bicubic', but .* has 'bicubic-antialias'"),
        ({"base": ""}, r"frozen base encoder is not this pipeline's"),  # the shipped base is not the tiny one
    ],
    ids=["channels", "filter", "base"],
)
def test_an_autoencoder_to_go_on_from_must_be_what_the_recipe_says(
    recipe: AutoencoderRecipe, autoencoder_folder: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    update = {"autoencoder": str(autoencoder_folder), "detail_channels": 8, "target": "base reconstruction", **changes}
    with pytest.raises(SettingsError, match=named):
        train_autoencoder(recipe.model_copy(update=update), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_missing_weights_of_lpips_or_an_autoencoder_lock_no_folder(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for update in ({"loss": LossWeights(lpips_weights=absent)}, {"autoencoder": absent}):
        with pytest.raises(CheckpointError, match="absent"):
            train_autoencoder(recipe.model_copy(update=update), tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_detail_latents_that_came_to_nothing_are_no_result(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    chosen = recipe.model_copy(update={"steps": 0})
    train_autoencoder(chosen, tmp_path)
    path = tmp_path / "start" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.startswith("detail_")}
    save_file({**tensors, **zeros, "detail_std": tensors["detail_std"]}, path)
    with pytest.raises(NumericsError, match=r"do not vary, or are not finite.*KL"):
        train_autoencoder(chosen, tmp_path)


def test_a_refused_recipe_can_be_mended_in_the_same_folder(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="detail_channels=17"):
        train_autoencoder(recipe.model_copy(update={"detail_channels": 17, "steps": 0}), tmp_path)
    train_autoencoder(recipe.model_copy(update={"steps": 0}), tmp_path)
    assert load_recipe(AutoencoderRecipe, tmp_path / "recipe.toml").detail_channels == recipe.detail_channels


def test_what_comes_after_the_runs_end_is_said_before_it(recipe: AutoencoderRecipe, tmp_path: Path, caplog) -> None:
    """The folder is refused after the warnings, so that nothing is trained here."""
    (tmp_path / "autoencoder").mkdir()
    late = recipe.model_copy(update={"steps": 3, "warmup_steps": 4})
    with pytest.raises(SettingsError, match=r"has no config\.json"):
        train_autoencoder(late, tmp_path)
    assert caplog.messages == ["warmup_steps = 4: the learning rate never reaches 0.003 in the 3 steps of this run"]


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[-0.1, 0.9]"])
def test_betas_outside_their_range_are_refused(tmp_path: Path, betas: str) -> None:
    (tmp_path / "recipe.toml").write_text(f"betas = {betas}\n")
    with pytest.raises(SettingsError, match=r'key "betas\.[01]"'):
        load_recipe(AutoencoderRecipe, tmp_path / "recipe.toml")


def test_pictures_without_a_heldout_one_are_a_data_error(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    pictures = fill_with_scenes(tmp_path / "pictures", train=1, held=0)
    with pytest.raises(DataError, match="heldout"):
        train_autoencoder(recipe.model_copy(update={"pictures": str(pictures)}), tmp_path / "run")


def test_a_damaged_heldout_picture_is_left_out_and_said(recipe: AutoencoderRecipe, tmp_path: Path, caplog) -> None:
    pictures = fill_with_scenes(tmp_path / "pictures", held=2)
    damaged = pictures / f"{open_pictures(pictures, size=64, split='heldout').keys[0]}.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    train_autoencoder(recipe.model_copy(update={"pictures": str(pictures), "steps": 1}), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    assert [message for message in caplog.messages if f"1 refused: {damaged.name}: damaged" in message]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").rglob("stage1*.toml")), ids=str)
def test_shipped_recipes_fit(path: Path) -> None:
    recipe = load_recipe(AutoencoderRecipe, path)
    assert recipe.crop <= recipe.size
    assert recipe.crop % 16 == recipe.size % 16 == 0
