"""The full-size recipes load and say what the sources say; their small twins have the same keys and run."""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from davae.models.autoencoder_da import AutoencoderDA
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from tiny import tiny_sd3_pipeline, tiny_vae

RECIPES = Path(__file__).parents[1] / "recipes"
SD35M = ["sd35m_1024", "sd35m_2048"]
NAMES = [*SD35M, "imagenet512"]
PLACES = {"base", "pictures", "autoencoder", "lpips_weights", "precision"}
"""Keys whose values say where something is, or what the machine can do."""


def values(name: str) -> dict[str, Any]:
    """By dotted key."""
    found = {}

    def collect(table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    collect(tomllib.loads((RECIPES / f"{name}.toml").read_text()), "")
    return found


# ----------------------------------------------------------------------------------------------------- what they say


def test_each_recipes_command_has_a_folder_of_its_own() -> None:
    commands = [text for path in RECIPES.rglob("*.toml") for text in re.findall("# +davae .*", path.read_text())]
    folders = [found for command in commands for found in re.findall(r"--out (\S+)", command)]
    assert len(set(folders)) == len(folders) > 5


@pytest.mark.parametrize("name", [*NAMES, *(f"tiny/{name}" for name in NAMES)])
def test_one_file_has_both_stages(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    first, second = load_recipe(AutoencoderRecipe, path), load_recipe(FinetuneRecipe, path)
    assert first.base == second.base
    assert first.size == second.size
    assert Path(second.autoencoder).name == "autoencoder"  # what stage 1 writes into its folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd35m_1024", (1.0, 2.0, 0.1, 1e-7, "sum", 1.0, 1e-4, (0.9, 0.999), 16, 10_000)),
        ("sd35m_2048", (1.0, 2.0, 0.1, 1e-7, "sum", 1.0, 1e-4, (0.9, 0.999), 16, 10_000)),
        ("imagenet512", (1.0, 1.0, 0.1, 1e-6, "mean", 0.5, 1e-4, (0.5, 0.9), 128, 100_000)),
    ],
)
def test_stage_1_is_that_of_table_s1(name: str, expected: tuple[Any, ...]) -> None:
    recipe = load_recipe(AutoencoderRecipe, RECIPES / f"{name}.toml")
    loss, batch = recipe.loss, recipe.batch_size * recipe.gradient_accumulation
    weights = (loss.lpips, loss.l1, loss.adversarial, loss.kl, loss.kl_reduction, loss.alignment)
    assert (*weights, recipe.learning_rate, recipe.betas, batch, recipe.steps) == expected


@pytest.mark.parametrize(
    ("name", "trained", "batch", "warmup"),
    [("sd35m_1024", "lora", 256, 10_000), ("sd35m_2048", "lora", 96, 10_000), ("imagenet512", "full", 640, 20_000)],
)
def test_stage_2_is_that_of_the_set_up(name: str, trained: str, batch: int, warmup: int) -> None:
    recipe = load_recipe(FinetuneRecipe, RECIPES / f"{name}.toml")
    assert (recipe.trained, recipe.detail_warmup_steps) == (trained, warmup)
    assert recipe.batch_size * recipe.gradient_accumulation == batch
    if trained == "lora":
        assert (recipe.lora_rank, recipe.lora_alpha) == (256, 256.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_totals_in_the_comments_are_right_and_every_value_is_explained(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    for stage in (AutoencoderRecipe, FinetuneRecipe):
        recipe = load_recipe(stage, RECIPES / f"{name}.toml")
        factors = f"{recipe.batch_size} x {recipe.gradient_accumulation} = "
        total = re.search(rf"batch_size = {recipe.batch_size} .*# {factors}(\d+)", text)
        assert int(total[1]) == recipe.batch_size * recipe.gradient_accumulation
    silent = {line.split(" = ")[0] for line in text.splitlines() if re.match(r"\w+ = ", line) and "#" not in line}
    # The rest are explained one line above them, or are not a setting of the method.
    assert silent <= {"base", "size", "gradient_accumulation", "heldout_pictures", "checkpoint_every"}


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_has_the_same_keys_and_the_same_options_switched_on(name: str) -> None:
    full, twin = values(name), values(f"tiny/{name}")
    assert full.keys() == twin.keys()
    for key, value in full.items():
        small, last = twin[key], key.rpartition(".")[2]
        if isinstance(value, bool) or (isinstance(value, str | list) and last not in PLACES):
            assert small == value, key
        elif last not in PLACES:
            assert bool(small) == bool(value), key
            assert small <= value, key


# ------------------------------------------------------------------------------------------------------- that they run


def tiny_va_vae() -> AutoencoderKL:
    """VA-VAE's kind: attention at the lowest level, quantisation layers, no scaling; f4, 4 channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=32,
    ).eval()


def run_stage_1(name: str, base: Path, pictures: Path, folder: Path) -> Path:
    places = {"base": str(base), "pictures": str(pictures)}
    recipe = load_recipe(AutoencoderRecipe, RECIPES / "tiny" / f"{name}.toml", places)
    made = train_autoencoder(recipe, folder / "autoencoder")
    lines = read_metrics(folder / "autoencoder" / "metrics.jsonl")
    assert [line["step"] for line in lines if "heldout_psnr" in line] == [0, 2, 4]
    return made


def run_stage_2(name: str, base: Path, pictures: Path, folder: Path) -> Path:
    places = {"base": str(base), "pictures": str(pictures), "autoencoder": str(folder / "autoencoder" / "autoencoder")}
    return finetune(load_recipe(FinetuneRecipe, RECIPES / "tiny" / f"{name}.toml", places), folder / "finetune")


@pytest.fixture(scope="module")
def sd3_base(tmp_path_factory) -> Path:
    """Stable Diffusion 3 with 16 latent channels, as in the full size."""
    folder = tmp_path_factory.mktemp("sd3")
    tiny_sd3_pipeline(vae=tiny_vae(16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SD35M)
def test_the_text_to_image_twins_run_through_both_stages(name, sd3_base, picture_folder, tmp_path) -> None:
    made = run_stage_1(name, sd3_base, picture_folder, tmp_path)
    autoencoder = AutoencoderDA.from_pretrained(made)
    assert (autoencoder.config.detail_channels, autoencoder.config.linear_blocks) == (16, False)

    pipeline = DiffusionPipeline.from_pretrained(run_stage_2(name, sd3_base, picture_folder, tmp_path))
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    assert pipeline.transformer.config.in_channels == 32

    factors = load_file(tmp_path / "finetune" / "adapter" / "transformer_lora.safetensors")
    assert {tensor.shape[0] for name, tensor in factors.items() if "lora_A" in name} == {2}

    latents = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("red ball", latents=latents, num_inference_steps=2, max_sequence_length=8, output_type="pt")
    assert picture.images.shape == (1, 3, 64, 64)


@pytest.fixture(scope="module")
def class_pictures(picture_folder: Path, tmp_path_factory) -> Path:
    """The pictures, each with a class beside its caption."""
    folder = tmp_path_factory.mktemp("classes")
    for index, path in enumerate(sorted(picture_folder.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{path.stem}.cls").write_text(f"{index % 10}\n")
    return folder


def test_the_class_conditional_twin_runs_through_stage_1(class_pictures, tmp_path) -> None:
    tiny_sd3_pipeline(vae=tiny_va_vae()).save_pretrained(tmp_path / "base")  # stage 1 reads its autoencoder only
    made = run_stage_1("imagenet512", tmp_path / "base", class_pictures, tmp_path)
    config = AutoencoderDA.from_pretrained(made).config
    assert (config.base_channels, config.detail_channels, config.linear_blocks) == (4, 12, False)


@pytest.mark.skipif(find_spec("davae.models.lightningdit") is None, reason="davae.models.lightningdit is not there yet")
def test_the_class_conditional_twin_runs_through_both_stages(class_pictures, tmp_path) -> None:
    from davae.pipelines.loading import load_pipeline
    from tiny import tiny_class_pipeline

    base = tmp_path / "base"
    tiny_class_pipeline(vae=tiny_va_vae()).save_pretrained(base)
    run_stage_1("imagenet512", base, class_pictures, tmp_path)
    pipeline = load_pipeline(run_stage_2("imagenet512", base, class_pictures, tmp_path))
    assert pipeline.transformer.config.in_channels == 16
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 2], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
