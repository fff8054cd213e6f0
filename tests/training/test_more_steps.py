"""A run takes more steps than it began with: the same bits as if it had begun with them, or a refusal that says how."""

import json
from pathlib import Path

import pytest

from davae.errors import CheckpointError, SettingsError
from davae.run import faults
from davae.run.comparison import read_run
from davae.training.interruption import Interrupted
from davae.training.recipes import schedule_learning_rate
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_run import finetune
from hashes import digests
from stages import autoencoder_recipe, finetune_recipe
from tiny_training import constant_rate, tiny_recipe

CONSTANT = constant_rate(1e-2)
SHORT = {"checkpoint_every": 1, "validation_steps": 1}


@pytest.mark.parametrize("trained", ["lora", "layers", "full", "ports"])
def test_a_finished_run_at_a_constant_rate_goes_on(
    trained: str, base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(
        base_folder, autoencoder_folder, picture_folder, trained=trained, steps=4, **SHORT, **CONSTANT
    )
    for steps in (2, 4):
        finetune(recipe.model_copy(update={"steps": steps}), tmp_path / "on")
    finetune(recipe, tmp_path / "whole")
    for result in ("pipeline", *(() if trained == "full" else ("adapter",))):
        assert digests(tmp_path / "on" / result) == digests(tmp_path / "whole" / result)
    assert json.loads((tmp_path / "on" / "result.json").read_text())["counts"]["steps"] == 4

    # Fewer steps than were taken are another run.
    with pytest.raises(CheckpointError, match="where steps = 4"):
        finetune(recipe.model_copy(update={"steps": 2}), tmp_path / "on")


def test_stage_one_goes_on_too(base_folder: Path, picture_folder: Path, tmp_path: Path) -> None:
    short = {"evaluate_every": 2, "heldout_pictures": 2, "calibration_pictures": 4, "checkpoint_every": 1}
    recipe = autoencoder_recipe(base_folder, picture_folder, steps=3, **short, **CONSTANT)
    for steps in (2, 3):
        train_autoencoder(recipe.model_copy(update={"steps": steps}), tmp_path / "on")
    train_autoencoder(recipe, tmp_path / "whole")
    assert digests(tmp_path / "on" / "autoencoder") == digests(tmp_path / "whole" / "autoencoder")


def test_a_falling_rate_begins_anew_only_when_it_is_told_to(
    base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(base_folder, autoencoder_folder, picture_folder, steps=3, warmup_steps=0, **SHORT)
    finetune(recipe, tmp_path / "on")
    before = digests(tmp_path / "on", "*")
    with pytest.raises(CheckpointError, match=r"falls until step 3, .* --set steps=5 --set 'restarts=\[3\]'"):
        finetune(recipe.model_copy(update={"steps": 5}), tmp_path / "on")
    assert digests(tmp_path / "on", "*") == before

    # The advice holds, and the recipe alone says what was done.
    longer = recipe.model_copy(update={"steps": 5, "restarts": (3,)})
    for folder in ("on", "whole"):
        finetune(longer, tmp_path / folder)
    assert digests(tmp_path / "on" / "pipeline") == digests(tmp_path / "whole" / "pipeline")


def test_a_run_that_goes_on_is_not_finished(
    base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(base_folder, autoencoder_folder, picture_folder, steps=1, **SHORT, **CONSTANT)
    finetune(recipe, tmp_path)
    assert (read_run(tmp_path).state, read_run(tmp_path).step) == ("finished", 1)
    faults.arm("step:term:1")
    with pytest.raises(Interrupted):
        finetune(recipe.model_copy(update={"steps": 3}), tmp_path)
    faults.arm("")
    assert (read_run(tmp_path).state, read_run(tmp_path).step) == ("stopped", 2)


def test_restarts_are_cycles_of_their_own() -> None:
    recipe = tiny_recipe(steps=30, restarts=(10, 18), warmup_steps=3)
    rate = schedule_learning_rate(recipe)
    for start, end in ((0, 10), (10, 18), (18, 30)):
        alone = schedule_learning_rate(tiny_recipe(steps=end - start, warmup_steps=3))
        assert [rate(step) for step in range(start, end)] == [alone(step) for step in range(end - start)]
    assert rate(30) == recipe.final_learning_rate
    assert tiny_recipe(steps=30, restarts=(27,), warmup_steps=5).late_settings()


@pytest.mark.parametrize("restarts", [(2, 2), (3, 2), (8,)])
def test_restarts_rise_and_end_before_the_run(restarts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising numbers under steps = 8"):
        tiny_recipe(steps=8, restarts=restarts)


def test_an_upgraded_base_gets_advice_that_fits(
    base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    recipe = finetune_recipe(base_folder, autoencoder_folder, picture_folder, steps=0)
    pipeline = finetune(recipe, tmp_path / "run")
    for autoencoder in (autoencoder_folder, tmp_path / "run" / "adapter"):
        again = recipe.model_copy(update={"base": str(pipeline), "autoencoder": str(autoencoder)})
        with pytest.raises(SettingsError, match=r"is upgraded already, .* in its own folder, with --set steps=N"):
            finetune(again, tmp_path / "again")
