"""What one sees of a run: progress, pictures of raw and EMA weights, trackers; none of it changes the training."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from davae.data.pictures import read_png
from davae.data.sources import open_pictures
from davae.errors import SettingsError
from davae.run.progress import StepProgress
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import choose_prompts, finetune
from hashes import digests
from stages import finetune_recipe
from tiny import tiny_class_pipeline

TAG = "raw above, EMA below"


@pytest.fixture(scope="module")
def recipe(base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path_factory) -> FinetuneRecipe:
    cache = str(tmp_path_factory.mktemp("cache"))
    own = {"steps": 3, "batch_size": 4, "learning_rate": 1e-1, "warmup_steps": 0, "log_every": 10, "cache": cache}
    return finetune_recipe(base_folder, autoencoder_folder, picture_folder, **own)


@pytest.fixture(scope="module")
def unseen(recipe: FinetuneRecipe, tmp_path_factory) -> Path:
    """A run without pictures and trackers."""
    folder = tmp_path_factory.mktemp("unseen")
    finetune(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def seen(recipe: FinetuneRecipe, tmp_path_factory) -> Path:
    """With both."""
    folder = tmp_path_factory.mktemp("seen")
    chosen = {"validation_every": 2, "validation_prompts": ("red ball", "blue box", "tree"), "validation_steps": 2}
    finetune(recipe.model_copy(update=chosen), folder, report_to=["tensorboard"])
    return folder


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_looking_changes_nothing(seen: Path, unseen: Path) -> None:
    for name in ("adapter", "pipeline", "checkpoints"):
        assert digests(seen / name) == digests(unseen / name) != {}
    hexes = [[line["loss_hex"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (seen, unseen)]
    assert hexes[0] == hexes[1]
    assert not (unseen / "pictures").exists()
    assert not (unseen / "tensorboard").exists()


def test_pictures_at_step_0_every_n_steps_and_at_the_end_by_raw_and_ema_weights(seen: Path) -> None:
    assert [path.name for path in sorted((seen / "pictures").iterdir())] == [
        "00000000.png",
        "00000002.png",
        "00000003.png",
    ]

    start, _, end = (read_png(path).float() for path in sorted((seen / "pictures").iterdir()))
    assert start.shape == (3, 2 * 64, 3 * 64)
    assert torch.equal(start[:, :64], start[:, 64:]), "the EMA begins as the weights"
    assert not torch.equal(end[:, :64], end[:, 64:])
    assert not torch.equal(end[:, 64:], start[:, 64:])

    first, second, third = start[:, :64].split(64, dim=2)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_tracker_is_told_what_metrics_jsonl_is(seen: Path) -> None:
    found = events(seen)
    lines = [line for line in read_metrics(seen / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 2
    for name in ("loss", "base_loss", "detail_loss", "learning_rate", "grad_norm"):
        told = [(event.step, event.value) for event in found.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert [event.step for event in found.Images(TAG)] == [0, 2, 3]
    assert "lora_rank = 2" in str(found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0])


def test_stage_1_has_its_heldout_numbers_in_the_tracker(base_folder, picture_folder, tmp_path) -> None:
    recipe = AutoencoderRecipe(
        **{"base": str(base_folder), "pictures": str(picture_folder), "size": 64, "crop": 32, "batch_size": 2},
        **{"detail_channels": 12, "fit_pictures": 4, "steps": 2, "evaluate_every": 5},
    )
    train_autoencoder(recipe, tmp_path, report_to=["tensorboard"])
    result = json.loads((tmp_path / "result.json").read_text())["values"]
    told = events(tmp_path).Scalars("heldout_psnr")
    assert [event.step for event in told] == [0, 2]
    assert told[-1].value == pytest.approx(result["heldout_psnr"], rel=1e-6)


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_done(recipe, tmp_path, monkeypatch) -> None:
    with pytest.raises(SettingsError, match="--report-to comet: allowed are tensorboard, wandb, trackio"):
        finetune(recipe, tmp_path / "run", report_to=["comet"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match=r"Install it: pip install 'davae\[wandb\]'"):
        finetune(recipe, tmp_path / "run", report_to=["wandb"])
    assert not (tmp_path / "run").exists()


def test_pictures_of_a_backbone_of_classes_are_refused(recipe) -> None:
    pictures = open_pictures(Path(recipe.pictures), size=64, split="train")
    pipeline = tiny_class_pipeline()
    assert choose_prompts(recipe, pipeline.transformer, pictures) == pictures.captions[:4]
    with pytest.raises(SettingsError, match="validation_every=2: pictures are drawn from captions"):
        choose_prompts(recipe.model_copy(update={"validation_every": 2}), pipeline.transformer, pictures)


@pytest.mark.parametrize(
    ("settings", "loss", "expected"),
    [
        ({"samples": 8}, 0.25, r"work: 5/5 steps, \d+\.\d\d it/s, \d+\.\d samples/s, 0:00:00 left, loss 0.2500"),
        ({"unit": "captions"}, None, r"work: 5/5 captions, \d+\.\d\d captions/s, 0:00:00 left"),
        ({"device": torch.device("cpu")}, 1.0, r"work: 5/5 steps, \d+\.\d\d it/s, 0:00:00 left, loss 1.0000"),
    ],
)
def test_progress_says_how_fast_it_goes(settings, loss, expected) -> None:
    out = io.StringIO()
    with StepProgress("work", done=3, total=5, console=Console(file=out, width=200), **settings) as progress:
        progress.show(4, loss)
        progress.show(5, loss)
    (line,) = filter(None, out.getvalue().splitlines())
    assert re.fullmatch(expected, line)
