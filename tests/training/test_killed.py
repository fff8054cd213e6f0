"""Both stages, killed or stopped at any moment and started again by the same call, end with the same bits."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from davae import cli
from davae.run import faults
from davae.run.recipe import Recipe
from davae.training.interruption import SIGNALS
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from forks import exit_code, forked
from stages import ADVERSARIAL, autoencoder_recipe, finetune_recipe, newest_step, outcome, steps_done
from trials import Trials

RUNS = [
    "stage 1",
    "stage 2, accumulated",
    pytest.param("stage 1, random start", marks=pytest.mark.slow),
    pytest.param("stage 1, adversarial", marks=pytest.mark.slow),
    pytest.param("stage 2", marks=pytest.mark.slow),
    pytest.param("stage 2, full", marks=pytest.mark.slow),
]
STEPS = 8
"""More than an epoch, with two checkpoints on the way."""
MOST_SAVE_OPERATIONS = 115
"""About as many file operations as a run's saves have together."""


@dataclass(frozen=True)
class Stage:
    """A stage as a program and as a command, and what a run leaves that nothing disturbed."""

    recipe: Recipe
    finished: Path
    outcome: dict[str, object]
    seconds: float

    def program(self, folder: Path) -> Path:
        return (
            finetune(self.recipe, folder)
            if isinstance(self.recipe, FinetuneRecipe)
            else train_autoencoder(self.recipe, folder)
        )

    def command(self, folder: Path) -> Callable[[], None]:
        file = folder.with_suffix(".toml")
        file.write_text(self.recipe.to_toml())
        verb = "finetune" if isinstance(self.recipe, FinetuneRecipe) else "train-autoencoder"
        return lambda: cli.main([verb, str(file), "--out", str(folder)])


@pytest.fixture(scope="module", params=RUNS)
def stage(request, base_folder, autoencoder_folder, picture_folder, tmp_path_factory) -> Stage:
    first, second = (base_folder, picture_folder), (base_folder, autoencoder_folder, picture_folder)
    recipes = {
        "stage 1": lambda: autoencoder_recipe(*first, steps=STEPS),
        "stage 1, random start": lambda: autoencoder_recipe(*first, steps=STEPS, start="random"),
        "stage 1, adversarial": lambda: autoencoder_recipe(
            *first, steps=STEPS, loss=ADVERSARIAL, gradient_accumulation=2
        ),
        "stage 2": lambda: finetune_recipe(*second, steps=STEPS),
        "stage 2, accumulated": lambda: finetune_recipe(*second, steps=STEPS, batch_size=1, gradient_accumulation=2),
        "stage 2, full": lambda: finetune_recipe(*second, steps=STEPS, trained="full", skip_spikes=True),
    }
    folder = tmp_path_factory.mktemp("undisturbed")
    stage = Stage(recipes[request.param](), folder, {}, 0.0)
    began = time.monotonic()
    assert exit_code(forked(lambda: stage.program(folder))) == 0
    return Stage(stage.recipe, folder, outcome(folder), time.monotonic() - began)


def killed(program: Callable[[], object], chance: random.Random, seconds: float) -> int:
    """The exit code of a program that is killed at a random moment: in half of the cases, of a save."""
    if chance.random() < 0.5:
        nth = chance.randint(1, MOST_SAVE_OPERATIONS)

        def killed_in_a_save() -> None:
            faults.arm(f"save:kill:{nth}")
            program()

        return exit_code(forked(killed_in_a_save))
    pid = forked(program)
    time.sleep(chance.uniform(0.05, 0.7) * seconds)
    os.kill(pid, signal.SIGKILL)
    return exit_code(pid)


@pytest.mark.soak("R1", ci=25, full=250)
def test_killed_at_random_moments(stage: Stage, trials: Trials, tmp_path: Path) -> None:
    """Up to five kills in a row, then to the end; a kill costs no more than the steps since the last checkpoint."""
    for chance in trials:
        folder, kills = tmp_path / str(trials.number), 0
        program = lambda folder=folder: stage.program(folder)  # noqa: E731
        while kills < 5 and (code := killed(program, chance, stage.seconds)):
            assert code == -signal.SIGKILL
            assert steps_done(folder) - newest_step(folder) <= stage.recipe.checkpoint_every
            kills += 1
        if kills == 5:
            assert exit_code(forked(program)) == 0
        assert outcome(folder) == stage.outcome
        assert not list(folder.rglob("*.tmp-*"))
        trials.done += kills - 1
        shutil.rmtree(folder)


@pytest.mark.soak("R5", ci=15, full=50)
def test_stopped_by_a_signal_at_a_random_moment(stage: Stage, trials: Trials, tmp_path: Path) -> None:
    """The command leaves soon, with 128 + the signal; in the training loop with a checkpoint of the step it was in.

    Outside the loop there is nothing to save: the signal acts as in any program, and to a shell its code is the same.
    """
    for chance in trials:
        folder, signum = tmp_path / str(trials.number), chance.choice(SIGNALS)
        command = stage.command(folder)
        pid = forked(command)
        time.sleep(chance.uniform(0.05, 0.9) * stage.seconds)
        os.kill(pid, signum)
        began = time.monotonic()
        code = exit_code(pid)
        assert time.monotonic() - began < 60
        assert code in (128 + signum, -signum, 0)
        in_the_loop = 0 < steps_done(folder) < stage.recipe.steps
        if code == 128 + signum and in_the_loop:
            assert newest_step(folder) == steps_done(folder)
        assert code != 0 or not in_the_loop
        assert exit_code(forked(command)) == 0
        assert outcome(folder) == stage.outcome
        shutil.rmtree(folder)


def test_killed_before_any_rename_of_what_it_leaves(stage: Stage, tmp_path: Path) -> None:
    """From the last checkpoint but one: the results are there from before, and are written anew."""

    def killed_at(folder: Path, operation: int) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event == "os.rename" and "checkpoints" not in str(arguments[0]):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        stage.program(folder)

    for operation in range(1, 40):
        folder = tmp_path / str(operation)
        shutil.copytree(stage.finished, folder)
        shutil.rmtree(max((folder / "checkpoints").glob("step-*")))
        code = exit_code(forked(lambda folder=folder, operation=operation: killed_at(folder, operation)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert exit_code(forked(lambda folder=folder: stage.program(folder))) == 0
        assert outcome(folder) == stage.outcome
    assert operation > 4, f"only {operation - 1} renames?"


def test_a_discriminator_killed_between_checkpoints_ends_with_the_same_bits(
    base_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    """Killed before its second checkpoint has its name, it goes on from the first, in which the discriminator is."""
    loss = ADVERSARIAL.model_copy(update={"adversarial_start": 1, "lpips": 0.0})
    changes = {"loss": loss, "steps": 4, "checkpoint_every": 2, "evaluate_every": 5}
    recipe = autoencoder_recipe(base_folder, picture_folder, **changes)

    def killed(folder: Path) -> None:
        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.rename" and str(arguments[1]).endswith("step-00000004"):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        train_autoencoder(recipe, folder)

    assert exit_code(forked(lambda: train_autoencoder(recipe, tmp_path / "whole"))) == 0
    assert exit_code(forked(lambda: killed(tmp_path / "parts"))) == -signal.SIGKILL
    newest = max((tmp_path / "parts" / "checkpoints").glob("step-????????"))
    assert newest.name == "step-00000002"
    assert load_file(newest / "discriminator_optimizer.safetensors")
    assert exit_code(forked(lambda: train_autoencoder(recipe, tmp_path / "parts"))) == 0
    expected = outcome(tmp_path / "whole")
    assert {"discriminator.safetensors", "discriminator_optimizer.safetensors"} <= expected["last"][1].keys()
    assert outcome(tmp_path / "parts") == expected
