"""A whole run of stage 1: what it learns, what it leaves, and what it refuses to go on with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from davae.data.pictures import read_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_one_start import start_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from hashes import digests
from stages import STAGE_ONE_STEPS, stage_one_recipe


@pytest.fixture(scope="module")
def recipe(base_folder: Path, picture_folder: Path) -> AutoencoderRecipe:
    return stage_one_recipe(base_folder, picture_folder)


@pytest.fixture(scope="module", params=["closed form", "random"])
def trained(request: pytest.FixtureRequest, recipe: AutoencoderRecipe, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run from either start."""
    folder = tmp_path_factory.mktemp("stage1")
    made = train_autoencoder(recipe.model_copy(update={"start": request.param}), folder)
    assert made == folder / "autoencoder"
    return folder, request.param


@pytest.fixture(scope="module")
def train_pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64, split="train")


def outcome(folder: Path) -> dict[str, object]:
    """What result.json says, without when and how."""
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("finished", "command", "commit")}


def test_the_loss_falls_and_heldout_pictures_profit(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])
    heldout = [line["heldout_psnr"] for line in lines if "heldout_psnr" in line]
    drawn = sorted((folder / "pictures").iterdir())
    assert len(drawn) == len(heldout)
    originals, reconstructions = read_png(drawn[-1]).chunk(2, dim=1)
    assert originals.shape == reconstructions.shape == (3, 64, 64 * 3)  # as many as are held out
    assert 0 < (originals.float() - reconstructions.float()).abs().mean() < 80  # noise: 85 or more
    assert len(heldout) == 4  # before steps 0, 20, 40, and at the end
    assert heldout[-1] > heldout[0] + 0.5


def test_the_result_is_the_last_heldout_numbers(trained: tuple[Path, str], recipe: AutoencoderRecipe) -> None:
    folder, start = trained
    result, last = outcome(folder), read_metrics(folder / "metrics.jsonl")[-1]
    numbers = {name: value for name, value in last.items() if name.startswith("heldout_")}
    assert result["values"] == {**numbers, "autoencoder": "autoencoder"}
    assert result["counts"] == {
        "pictures": 12,
        "heldout_pictures": 3,
        "steps": STAGE_ONE_STEPS,
        "skipped_steps": 0,
        "spikes": 0,
    }
    assert result["recipe_digest"] == recipe.model_copy(update={"start": start}).digest()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["precision"] == "float32"


def test_the_base_encoder_stays_bit_for_bit_and_everything_else_moves(
    trained: tuple[Path, str], base_folder: Path
) -> None:
    start, end = (AutoencoderDA.from_pretrained(trained[0] / name) for name in ("start", "autoencoder"))
    base = load_base_vae(str(base_folder)).encoder.state_dict()
    assert all(torch.equal(tensor, end.base_encoder.state_dict()[name]) for name, tensor in base.items())
    before = {id(p): q for p, q in zip(end.parameters(), start.parameters(), strict=True)}
    moved = end.detail_parameters()
    still = [p for p in end.parameters() if not p.requires_grad]
    assert len(moved) > len(still) > 0
    assert not any(torch.equal(p, before[id(p)]) for p in moved)
    assert all(torch.equal(p, before[id(p)]) for p in still)


def test_either_start_is_what_its_name_says(trained: tuple[Path, str], base_folder: Path) -> None:
    folder, start = trained
    autoencoder = AutoencoderDA.from_pretrained(folder / "start")
    assert autoencoder.config.linear_blocks == (start == "closed form")
    convolution = autoencoder.detail_downsample.conv.weight
    assert bool(convolution.any()) == (start == "random")
    base = load_base_vae(str(base_folder))
    for ours, theirs in ((autoencoder.detail_encoder, base.encoder), (autoencoder.joint_decoder, base.decoder)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


@pytest.mark.parametrize("start", ["closed form", "random"])
def test_the_start_is_a_function_of_the_seed(recipe, train_pictures, tmp_path, start) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        chosen = recipe.model_copy(update={"start": start, "seed": seed})
        start_autoencoder(chosen, train_pictures, tmp_path / name)
        weights.append(digests(tmp_path / name))
    assert weights[0] == weights[1] != weights[2]


def test_what_is_saved_is_the_ema_and_it_is_calibrated(trained: tuple[Path, str], train_pictures: PictureSet) -> None:
    folder, _ = trained
    autoencoder = AutoencoderDA.from_pretrained(folder / "autoencoder").eval()
    shadows = load_file(folder / "checkpoints" / f"step-{STAGE_ONE_STEPS:08d}" / "ema.safetensors")
    live = load_file(folder / "checkpoints" / f"step-{STAGE_ONE_STEPS:08d}" / "autoencoder.safetensors")
    for name, parameter in autoencoder.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, shadows[f"autoencoder.{name}"])
    assert any(not torch.equal(live[name.removeprefix("autoencoder.")], shadow) for name, shadow in shadows.items())
    with torch.no_grad():
        latents = autoencoder.encode(train_pictures.batch(range(len(train_pictures)))).latent_dist.mode()
    detail = autoencoder.split(autoencoder.to_units(latents))[1].double()
    assert detail.mean((0, 2, 3)) == pytest.approx(torch.zeros(12), abs=1e-4)
    assert detail.std((0, 2, 3), correction=0) == pytest.approx(torch.ones(12), abs=1e-4)


def test_the_same_command_again_returns_the_same_and_trains_nothing(
    trained: tuple[Path, str], recipe: AutoencoderRecipe
) -> None:
    folder, start = trained
    before, lines, result = digests(folder), read_metrics(folder / "metrics.jsonl"), outcome(folder)
    inodes = {path: path.stat().st_ino for path in (folder / "checkpoints").rglob("*")}
    train_autoencoder(recipe.model_copy(update={"start": start}), folder)
    assert digests(folder) == before
    assert {path: path.stat().st_ino for path in (folder / "checkpoints").rglob("*")} == inodes
    after = read_metrics(folder / "metrics.jsonl")
    assert outcome(folder) == result
    without_time = [[{k: v for k, v in line.items() if k != "seconds"} for line in run] for run in (lines, after)]
    assert without_time[0] == without_time[1]
    assert {path.name for path in folder.iterdir()} == {
        *(
            "recipe.toml",
            "environment.json",
            "pictures.json",
            "inputs.json",
            "metrics.jsonl",
            "result.json",
            "checkpoints",
            "start",
            "autoencoder",
            "pictures",
            ".lock",
        )
    }


def test_another_recipe_in_the_same_folder_is_refused(trained: tuple[Path, str], recipe: AutoencoderRecipe) -> None:
    folder, start = trained
    before = digests(folder, "*")
    with pytest.raises(CheckpointError, match="another recipe"):
        train_autoencoder(recipe.model_copy(update={"start": start, "learning_rate": 1e-3}), folder)
    assert digests(folder, "*") == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_with_other_pictures(
    recipe: AutoencoderRecipe, picture_folder: Path, tmp_path: Path, finished: bool
) -> None:
    pictures, run = shutil.copytree(picture_folder, tmp_path / "pictures"), tmp_path / "run"
    recipe = recipe.model_copy(update={"pictures": str(pictures), "steps": 1})
    train_autoencoder(recipe, run)
    if not finished:
        (run / "result.json").unlink()
    first = open_pictures(pictures, size=64, split="train").keys[0]
    (pictures / f"{first}.png").rename(tmp_path / "aside.png")
    with pytest.raises(CheckpointError, match=r"has trained on \d+ pictures, and there are \d+ now"):
        train_autoencoder(recipe, run)
    (tmp_path / "aside.png").rename(pictures / f"{first}.png")
    train_autoencoder(recipe, run)


def test_a_folder_of_the_other_stage_is_refused(trained: tuple[Path, str]) -> None:
    with pytest.raises(CheckpointError, match="of the other stage"):
        finetune(FinetuneRecipe(), trained[0])


def test_somebodys_own_folder_is_not_replaced(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    (tmp_path / "autoencoder").mkdir()
    with pytest.raises(SettingsError, match=r"autoencoder exists and has no config\.json"):
        train_autoencoder(recipe, tmp_path)


def test_another_recipe_is_refused_even_before_the_first_checkpoint(
    trained: tuple[Path, str], recipe: AutoencoderRecipe, tmp_path: Path
) -> None:
    folder, start = trained
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "autoencoder"))
    with pytest.raises(CheckpointError, match="another recipe"):
        train_autoencoder(recipe.model_copy(update={"start": start, "detail_channels": 4}), tmp_path / "run")


def test_a_run_without_steps_is_the_start_calibrated(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    folder = train_autoencoder(recipe.model_copy(update={"steps": 0}), tmp_path)
    start, end = load_autoencoder(tmp_path / "start"), load_autoencoder(folder)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), end.parameters(), strict=True))
    assert not torch.equal(start.detail_std, end.detail_std)
