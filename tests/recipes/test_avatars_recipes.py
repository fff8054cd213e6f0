"""The scripts that build the small pair run, one after the other, at a tiny size."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from davae.backbones import sd3
from davae.data import avatars
from davae.data.avatar_shards import write_avatar_shards
from davae.data.avatars import Attributes
from davae.data.pictures import read_png
from davae.errors import SettingsError
from davae.evaluation.attributes import SIDE, read_attributes
from davae.evaluation.generation import resize
from davae.pipelines.loading import load_pipeline
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

FOLDER = Path(__file__).parents[2] / "recipes/avatars"

AUTOENCODER = """
size = 32
channels = [8, 8, 8, 8]
images = 8
steps = 3
decoder_steps = 2
crop = 32
batch_size = 2
whole_share = 0.5
full_size_share = 0.5
evaluate_every = 2
checkpoint_every = 2
"""
TRANSFORMER = """
width = 16
layers = 2
heads = 2
images = 8
steps = 3
cool_down_steps = 2
batch_size = 4
evaluate_every = 2
strip_every = 2
checkpoint_every = 2
compiled = false
"""

pytest.importorskip("resvg", reason="drawing avatars needs davae[demo]")


def main_of(script: str) -> Callable[..., None]:
    main: Callable[..., None] = runpy.run_path(str(FOLDER / script), run_name="imported")["main"]
    return main


def by_four(folder: Path) -> None:
    """Both stages of the recipes for four times the side, from 32 to 128 px."""
    pictures = write_avatar_shards(folder / "shards_512", training=6, held_out=2, size=128)
    tiny = {"pictures": str(pictures), "base": str(folder / "pipeline"), "size": 128, "batch_size": 2, "steps": 1}
    fast = {"warmup_steps": 0, "start": "random", "crop": 32, "calibration_pictures": 4, "heldout_pictures": 2}
    fast["detail_channels"] = 16  # what the random start's blocks can make of 8 hidden channels

    recipe = load_recipe(AutoencoderRecipe, FOLDER / "stage1_512.toml")
    loss = recipe.loss.model_copy(update={"lpips": 0.0})
    first = train_autoencoder(recipe.model_copy(update={**tiny, **fast, "loss": loss}), folder / "stage1_512")
    recipe = load_recipe(FinetuneRecipe, FOLDER / "stage2_512.toml")
    few = {"autoencoder": str(first), "warmup_steps": 0, "detail_warmup_steps": 0}
    finetune(recipe.model_copy(update={**tiny, **few}), folder / "stage2_512")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the scripts wrote."""
    folder = tmp_path_factory.mktemp("avatars")
    (folder / "autoencoder.toml").write_text(AUTOENCODER)
    (folder / "transformer.toml").write_text(TRANSFORMER)

    sys.path.insert(0, str(FOLDER))
    try:
        main_of("draw.py")(folder / "images", count=8, held_out=4, size=64)

        train = main_of("train_base_autoencoder.py")
        settings = {"out": folder / "vae", "recipe_file": folder / "autoencoder.toml"}
        train(folder / "images", folder / "vae_run", decoder=False, start=None, **settings)
        train(folder / "images", folder / "vae_run", decoder=True, start=None, **settings)

        train = main_of("train_base_transformer.py")
        settings = {"autoencoder": folder / "vae/all", "recipe_file": folder / "transformer.toml"}
        for out, flags in {"pipeline": {}, "cooled": {"cool_down": True}, "exported": {"export": True}}.items():
            flags = {"cool_down": False, "export": False} | flags
            train(folder / "images", folder / "run", out=folder / out, **settings, **flags)

        # Both stages, and the rival that makes images of the same prompts.
        shards = write_avatar_shards(folder / "shards", training=20, held_out=4, size=64)
        pictures = {"base": str(folder / "pipeline"), "pictures": str(shards), "size": 64, "batch_size": 2, "steps": 2}
        loss = LossWeights(lpips=0, alignment=0.02)
        fit = {"fit_pictures": 20, "calibration_pictures": 8, "heldout_pictures": 4}
        first = train_autoencoder(AutoencoderRecipe(**pictures, **fit, crop=32, loss=loss), folder / "stage1")
        finetune(
            FinetuneRecipe(**pictures, autoencoder=str(first), trained="ports", prompt_tokens=20), folder / "stage2"
        )
        lora = {"trained": "lora", "lora_targets": ("to_q", "to_v"), "lora_rank": 2, "prompt_tokens": 20}
        finetune(FinetuneRecipe(**pictures, autoencoder=str(first), **lora), folder / "stage2_lora")
        upgrade, rival = folder / "stage2/adapter", folder / "rival"
        main_of("generative_decoder.py")(folder / "pipeline", upgrade, shards, rival, steps=2, count=4, start=0)

        pair = {"base": folder / "pipeline", "adapter": upgrade}
        main_of("measure_detail.py")(folder / "detail", shards, [f"again={first}"], size=64, count=4, **pair)

        settings = {"upgrade": upgrade, "other": [f"rival={rival / 'images'}"], "count": 4, "start": 0}
        main_of("measure.py")(folder / "pipeline", folder / "measured", **settings)
        by_four(folder)
        settings = {"upgrade": folder / "stage2_512/adapter", "other": [], "count": 4, "start": 0, "reconstructed": 2}
        main_of("measure.py")(folder / "pipeline", folder / "measured_512", **settings)
    finally:
        sys.path.remove(str(FOLDER))
    return folder


def test_autoencoders_are_measured_on_held_out_images(work: Path) -> None:
    for phase, steps in {"all": 3, "decoder": 2}.items():
        metrics = read_metrics(work / "vae_run" / phase / "metrics.jsonl")
        measured = [line["step"] for line in metrics if "held_out_psnr" in line]
        assert measured == sorted({0, 2, steps})


def test_the_latents_of_the_transformer_have_unit_deviation(work: Path) -> None:
    config = json.loads((work / "vae/all/config.json").read_text())
    assert config["scaling_factor"] > 0
    assert config["sample_size"] == 32


@pytest.mark.parametrize("name", ["pipeline", "cooled", "exported"])
def test_the_pipeline_is_a_stock_one(work: Path, name: str) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(work / name)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a laughing woman with a red beanie", num_inference_steps=2).images
    assert images[0].size == (32, 32)


def test_the_cool_down_goes_on_from_the_newest_checkpoint_to_no_learning_rate(work: Path) -> None:
    rates = [line["learning_rate"] for line in read_metrics(work / "run/constant/metrics.jsonl") if "loss" in line]
    assert json.loads((work / "run/cool_down_start/checkpoint.json").read_text()) == {"name": "step-00000003"}
    assert (work / "run/cool_down/checkpoints/step-00000002").is_dir()
    assert rates == sorted(rates)


def test_the_numbers_of_a_pipeline(work: Path) -> None:
    result = json.loads((work / "measured/result.json").read_text())
    real = {"real images, halved and enlarged", "other real images"}
    assert set(result["kid"]) == {"base enlarged", "upgrade", "rival", *real}
    enlarged, halved = (result["to_exact"][name] for name in ("base enlarged", "real images, halved and enlarged"))
    assert enlarged["psnr"][0] < halved["psnr"][0]
    assert all(share == 1 for share, _ in result["attributes"]["real images"].values())
    assert result["counts"]["reconstructed"] == 4
    assert set(result["reconstruction"]) == {"base + bicubic", "upgrade", "base at full size"}


def test_the_numbers_at_four_times_the_side(work: Path) -> None:
    result = json.loads((work / "measured_512/result.json").read_text())
    quartered = "real images, quartered and enlarged"
    assert set(result["kid"]) == {"base enlarged", "upgrade", quartered, "other real images"}
    assert read_png(work / "measured_512/upgrade/00000.png").shape == (3, 128, 128)
    halved = json.loads((work / "measured/result.json").read_text())["to_exact"]["real images, halved and enlarged"]
    assert result["to_exact"]["base enlarged"]["psnr"][0] < result["to_exact"][quartered]["psnr"][0]
    assert result["to_exact"][quartered]["lpips"][0] > halved["lpips"][0]  # of the same people
    assert result["counts"]["reconstructed"] == 2


def test_detail_latents_are_replaced(work: Path) -> None:
    rows = json.loads((work / "detail/result.json").read_text())["rows"]
    assert set(rows) == {"base + bicubic", "shipped", "again"}
    for name, numbers in rows["shipped"].items():
        assert rows["again"][name] == pytest.approx(numbers)
    assert len({numbers["psnr"] for numbers in rows["shipped"].values()}) == 6  # each change does something else


@pytest.mark.parametrize("stage", ["stage2", "stage2_lora"])
def test_a_pair_that_was_trained_is_shipped(work: Path, tmp_path: Path, stage: str) -> None:
    package = tmp_path / "src/davae"
    card = package / "assets/base_pipeline/README.md"
    card.parent.mkdir(parents=True)
    card.write_text("about the base")
    main_of("ship.py")(work / "pipeline", work / stage / "adapter", package=package)

    # The card stays, the files are half as large, and all of it loads.
    assert card.read_text() == "about the base"
    for folder in (work / "pipeline", work / stage / "adapter"):
        out = package / "assets" / ("base_pipeline" if folder.name == "pipeline" else "upgrade")
        names = {path.relative_to(folder) for path in folder.rglob("*.safetensors")}
        assert {path.relative_to(out) for path in out.rglob("*.safetensors")} == names
        tensors = [tensor for name in names for tensor in load_file(out / name).values()]
        assert all(tensor.itemsize == 2 for tensor in tensors if tensor.is_floating_point())
    loaded = load_pipeline(package / "assets/base_pipeline", adapter=package / "assets/upgrade")
    assert loaded.transformer.config.in_channels == 32


def test_a_blind_comparison_hides_the_sides_and_counts_votes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = FOLDER.parents[1] / "benchmarks/blind.py"
    blind = runpy.run_path(str(script), run_name="imported")
    run, pair = work / "blind", {"base": work / "pipeline", "adapter": work / "stage2/adapter"}
    blind["main"](run, count=4, seed=1, **pair)

    answers = json.loads((run / "answers.json").read_text())
    sides = "".join(answers["upgrade is"])
    assert set(sides) == {"L", "R"}
    assert 0 <= answers["judge prefers the upgrade"] <= 4
    text = re.sub("data:[^'\"]*", "", (run / "index.html").read_text())
    assert not {"upgrade", "base", "bicubic"} & set(re.findall(r"\w+", text.partition("<body")[2]))

    capsys.readouterr()
    blind["main"](run, votes=sides[:3].lower() + ".")
    assert capsys.readouterr().out == "{'upgrade': 3, 'base + bicubic': 0, 'cannot tell': 1}\n"
    with pytest.raises(SettingsError, match="give 4 letters"):
        blind["main"](run, votes="LR")


def test_the_judge_prefers_the_exact_image() -> None:
    blind = runpy.run_path(str(FOLDER.parents[1] / "benchmarks/blind.py"), run_name="imported")
    person = Attributes("longCurly", "smileLOL", "glasses5", None, None, None, "tan", "green", "blue")
    exact = torch.from_numpy(np.array(avatars.draw_image(person, 128))).permute(2, 0, 1)
    enlarged = resize(resize(exact, 64), 128)
    assert blind["judge"](enlarged, exact, person) > 0.1
    assert blind["judge"](exact, enlarged, person) < -0.1


def test_the_figures_prompts_differ_and_the_figure_is_small(tmp_path: Path) -> None:
    figure = runpy.run_path(str(FOLDER / "figure.py"), run_name="imported")
    people = figure["choose_people"]()
    assert all(avatars.is_held_out(each) for each in people)
    for name in ("hair", "expression", "skin"):
        assert len({getattr(each, name) for each in people}) == 4
    noise = Image.effect_noise((400, 400), 90).convert("RGB")
    assert figure["write_small"](noise, tmp_path / "figure.webp") < 95
    assert (tmp_path / "figure.webp").stat().st_size <= 100_000


def test_attributes_are_read_where_they_can_be_seen() -> None:
    bald = Attributes("noHair1", "smile", None, None, None, None, "tan", "green", "blue")
    for shown, shirt in ((bald, "green"), (replace(bald, shirt="red"), "red")):
        drawn = avatars.draw_image(replace(shown, shirt=shirt), SIDE)
        image = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)
        right = read_attributes({"set": image}, bald)["set"]
        assert right.pop("shirt") == (shirt == bald.shirt)
        assert right == dict.fromkeys(right, True)
        assert {"hair", "expression", "accessory", "facial_hair", "skin", "background"} == set(right)

    # Long hair before the shirt.
    hidden = replace(bald, hair="longBangs")
    image = torch.from_numpy(np.array(avatars.draw_image(hidden, SIDE))).permute(2, 0, 1)
    assert "shirt" not in read_attributes({"set": image}, hidden)["set"]


def test_there_is_a_strip_of_held_out_prompts(work: Path) -> None:
    assert {path.name for path in (work / "run/strips").glob("*.png")} >= {"000000.png", "000002.png"}


@torch.no_grad()
def test_words_reach_the_transformer_as_the_pipeline_sends_them(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    encode_words = runpy.run_path(str(FOLDER / "train_base_transformer.py"))["encode_words"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(work / "pipeline")
    prompts = ["a laughing LADY, red curls; a unicorn", "", " ".join(["red hair"] * 30)]
    for tokens in (20, 64):
        expected = sd3.condition(pipeline, prompts, max_sequence_length=tokens)
        given = encode_words(pipeline, prompts, tokens)
        for name, value in expected.items():
            torch.testing.assert_close(given[name], value)
