"""Gradient accumulation: the batches of a step are those that as many steps would see; a run may split them anew."""

from pathlib import Path

import pytest

from davae.errors import CheckpointError
from davae.run import faults
from davae.run.ranks import Ranks
from davae.run.record import read_metrics
from davae.training.folders import claim_folder
from davae.training.interruption import Interrupted
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_run import finetune
from stages import ADVERSARIAL, autoencoder_recipe, finetune_recipe


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


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_stopped_run_goes_on_in_smaller_batches(
    stage: str, base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """The same images in the same order, and the same loss and gradient up to rounding."""
    short = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "evaluate_every": 9, "heldout_pictures": 2}
    if stage == "one":
        recipe, run = autoencoder_recipe(base_folder, picture_folder, **short), train_autoencoder
    else:
        del short["evaluate_every"], short["heldout_pictures"]
        recipe = finetune_recipe(base_folder, autoencoder_folder, picture_folder, **short)
        run = finetune
    run(recipe, tmp_path / "whole")
    faults.arm("step:term:2")
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "on")
    faults.arm("")
    run(recipe.model_copy(update={"batch_size": 2, "gradient_accumulation": 2}), tmp_path / "on")

    # Other images, or the same in another order, would have other losses and gradients. After its first step Adam makes
    # much of what rounding did to gradients that are nearly zero.
    whole, on = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "on"))
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):
        ours, theirs = ([line[name] for line in lines if name in line] for lines in (whole, on))
        assert len(ours) == 4
        assert theirs[:3] == pytest.approx(ours[:3], rel=tolerance)
    assert [line["loss"] for line in on if "loss" in line] == pytest.approx(
        [line["loss"] for line in whole if "loss" in line], rel=1e-3
    )


@pytest.mark.parametrize(
    "changes", [{"gradient_accumulation": 2}, {"sizes": (96,), "batch_size": 1, "gradient_accumulation": 2},
                {"loss": ADVERSARIAL, "batch_size": 1, "gradient_accumulation": 2}],
    ids=["another product", "several buckets", "terms of a whole batch"],
)  # fmt: skip
def test_what_another_split_would_change_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    recipe = autoencoder_recipe(tmp_path, tmp_path, **changes)
    before = recipe.model_copy(update={"batch_size": 2, "gradient_accumulation": 1})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.toml").write_text(before.to_toml())
    refused = pytest.raises(CheckpointError, match="gradient_accumulation = 1")
    with refused, claim_folder(recipe, tmp_path, Ranks()):
        pass
