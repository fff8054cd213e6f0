"""Gradient accumulation in stage 1: the batches of a step are those that as many steps of one batch would see."""

from pathlib import Path

import pytest

from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder


def test_the_losses_of_an_accumulated_step_are_the_means_over_its_batches(
    base_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = AutoencoderRecipe(
        base=str(base_folder),
        pictures=str(picture_folder),
        size=64,
        crop=32,
        detail_channels=8,
        batch_size=3,
        fit_pictures=4,
        heldout_pictures=1,
        learning_rate=1e-12,  # so that the second of two steps has the weights of the first
        final_learning_rate=1e-12,
        warmup_steps=0,
        loss=LossWeights(lpips=0.0),
        seed=4,
    )
    lines = {}
    for steps, batches in ((2, 1), (1, 2)):
        folder = tmp_path / str(steps)
        train_autoencoder(recipe.model_copy(update={"steps": steps, "gradient_accumulation": batches}), folder)
        lines[steps] = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    (step,), batches = lines[1], lines[2]
    for name in ("loss", "l1", "kl", "alignment"):
        assert batches[0][name] != pytest.approx(batches[1][name], rel=1e-4)
        assert step[name] == pytest.approx(sum(line[name] for line in batches) / 2, rel=1e-5)
