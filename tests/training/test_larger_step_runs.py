"""Both stages on a step of 4, and on an upgraded pipeline: the whole of two short runs, and what they would cost."""

from pathlib import Path

import pytest

from davae.cost.budget import estimate_stage_one
from davae.cost.geometry import read_geometry
from davae.errors import SettingsError
from davae.method.stage_one_loss import last_convolution
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter_index import read_index
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import sample
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_one_start import make_untrained, name_base
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from scenes import fill_with_scenes

Step = tuple[str, int, int]
"""Base pipeline, resolution factor, detail channels."""


@pytest.fixture(scope="module", params=["4", "2 x 2"])
def step(request, base_folder: Path, autoencoder_folder: Path, tmp_path_factory) -> Step:
    if request.param == "4":
        return str(base_folder), 4, 8
    base, once = load_pipeline(base_folder), tmp_path_factory.mktemp("once") / "pipeline"
    save_pipeline(upgrade(base, load_autoencoder(autoencoder_folder)), once)
    return str(once), 2, 12


def stage_one(step: Step, pictures: Path, **changes) -> AutoencoderRecipe:
    base, resolution_factor, detail_channels = step
    settings = {
        "base": base,
        "pictures": str(pictures),
        "resolution_factor": resolution_factor,
        "detail_channels": detail_channels,
        "size": 64,
        "crop": 32,
        "fit_pictures": 24,
        "start": "closed form",
        "code": "residual",
        "steps": 3,
        "batch_size": 2,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "precision": "float32",
        "checkpoint_every": 2,
        "evaluate_every": 3,
        "heldout_pictures": 2,
        "calibration_pictures": 12,
    }
    return AutoencoderRecipe(**(settings | changes))


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory) -> Path:
    """Enough of them for the closed form of 16 x 4 or 4 x 12 full latents at 16 positions a picture."""
    return fill_with_scenes(tmp_path_factory.mktemp("many"), train=24, held=2)


def test_both_stages_run_and_the_pipeline_is_the_next_base(step: Step, many_pictures: Path, tmp_path: Path) -> None:
    recipe = stage_one(step, many_pictures)
    folder = train_autoencoder(recipe, tmp_path / "stage1")
    autoencoder = load_autoencoder(folder)
    assert autoencoder.config.resolution_factor == recipe.resolution_factor
    assert autoencoder.downsample_factor == 16
    assert any("heldout_psnr" in line for line in read_metrics(tmp_path / "stage1" / "metrics.jsonl"))
    base = load_pipeline(step[0])
    assert autoencoder.config.base_channels == base.transformer.config.in_channels
    second = FinetuneRecipe(
        base=step[0], autoencoder=str(folder), pictures=str(many_pictures), size=64, lora_rank=2, lora_alpha=2.0,
        steps=3, batch_size=4, learning_rate=1e-2, warmup_steps=1, detail_warmup_steps=1, prompt_tokens=8,
        precision="float32", checkpoint_every=2,
    )  # fmt: skip
    made = load_pipeline(finetune(second, tmp_path / "stage2"))
    picture = sample(made, ["red ball"], size=64, seed=0, steps=2, prompt_tokens=8)
    assert picture.shape == (1, 3, 64, 64)
    wide = sample(made, ["red ball"], size=(96, 64), seed=0, steps=2, prompt_tokens=8)
    assert wide.shape == (1, 3, 64, 96)
    adapted = load_pipeline(step[0], adapter=tmp_path / "stage2" / "adapter")
    again = sample(adapted, ["red ball"], size=64, seed=0, steps=2, prompt_tokens=8)
    assert (again.int() - picture.int()).abs().max() <= 1
    assert read_index(tmp_path / "stage2" / "adapter").base_channels == autoencoder.config.base_channels


def untrained(step: Step) -> AutoencoderDA:
    base, resolution_factor, detail_channels = step
    return AutoencoderDA.from_base(
        load_base_vae(base), detail_channels=detail_channels, resolution_factor=resolution_factor
    )


def test_the_last_convolution_is_where_pixels_come_from(step: Step) -> None:
    """For the adaptive weight of the adversarial loss: of an upgraded base, too, whose new block was built last."""
    autoencoder = untrained(step)
    last = last_convolution(autoencoder.joint_decoder)
    assert last.shape[0] == 3
    assert any(parameter is last for parameter in autoencoder.detail_parameters())


def test_what_a_run_costs_is_counted_on_the_same_models(step: Step, many_pictures: Path, tmp_path: Path) -> None:
    recipe = stage_one(step, many_pictures)
    geometry = read_geometry(step[0], tmp_path / "recipe.toml")
    figures = {figure.name: figure.value for figure in estimate_stage_one(recipe, geometry)}
    assert figures["tokens, 2 x 2"] == 4
    autoencoder = make_untrained(recipe, load_base_vae(name_base(recipe)))
    trained = sum(parameter.numel() for parameter in autoencoder.detail_parameters())
    assert figures["trained in this stage"] == trained


def test_another_step_than_the_recipes_is_refused(step: Step, many_pictures: Path, tmp_path: Path) -> None:
    untrained(step).save_pretrained(tmp_path / "autoencoder")
    changes = {"resolution_factor": 6 - step[1], "autoencoder": str(tmp_path / "autoencoder")}
    with pytest.raises(SettingsError, match=f"resolution_factor={6 - step[1]}, but .* has {step[1]}"):
        train_autoencoder(stage_one(step, many_pictures, **changes), tmp_path / "run")
