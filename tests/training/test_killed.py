"""Both stages, killed at any moment and started again by the same call, end with the same bits."""

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

from davae.record import read_metrics
from davae.training.autoencoder import AutoencoderRecipe, LossWeights, train_autoencoder
from davae.training.finetune import FinetuneRecipe, finetune
from forks import exit_code, forked
from hashes import digests

KILLS = 10
"""Of each stage, at least."""


RUNS = [
    "stage 1",
    "stage 2",
    pytest.param("stage 1, random start", marks=pytest.mark.slow),
    pytest.param("stage 1, adversarial", marks=pytest.mark.slow),
    pytest.param("stage 2, full", marks=pytest.mark.slow),
]


ADVERSARIAL = LossWeights(
    adversarial=0.1, adversarial_start=2, adversarial_ramp_steps=4, adaptive_adversarial=True, adaptive_alignment=True
)


@dataclass(frozen=True)
class Stage:
    """A stage as a program, and what a run leaves that nothing disturbed."""

    program: Callable[[Path], Path]
    finished: Path
    outcome: dict[str, object]
    seconds: float


def outcome(folder: Path) -> dict[str, object]:
    """SHA-256 of every tensor file outside and inside the last checkpoint, and the metrics without their times.

    The cache is left out: what is in which of its files depends on when a run was killed (test_caching.py).
    """
    last = max((folder / "checkpoints").glob("step-*"))
    tensors = {name: value for name, value in digests(folder).items() if not name.startswith(("checkpoints", "cache"))}
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder / "metrics.jsonl")]
    return {"tensors": tensors, "last": (last.name, digests(last)), "metrics": lines}


@pytest.fixture(scope="module", params=RUNS)
def stage(request, base_folder, autoencoder_folder, picture_folder, tmp_path_factory) -> Stage:
    shared = {"base": str(base_folder), "pictures": str(picture_folder), "size": 64, "batch_size": 2, "warmup_steps": 2}
    autoencoder = AutoencoderRecipe(
        **shared, crop=32, detail_channels=12, steps=10, fit_pictures=4, checkpoint_every=3, evaluate_every=4
    )
    transformer = FinetuneRecipe(
        **shared,
        autoencoder=str(autoencoder_folder),
        steps=12,
        lora_rank=2,
        detail_warmup_steps=4,
        prompt_tokens=8,
        checkpoint_every=3,
    )
    programs: dict[str, Callable[[Path], Path]] = {
        "stage 1": lambda folder: train_autoencoder(autoencoder, folder),
        "stage 1, random start": lambda folder: train_autoencoder(
            autoencoder.model_copy(update={"start": "random"}), folder
        ),
        "stage 1, adversarial": lambda folder: train_autoencoder(
            autoencoder.model_copy(update={"loss": ADVERSARIAL}), folder
        ),
        "stage 2": lambda folder: finetune(transformer, folder),
        "stage 2, full": lambda folder: finetune(transformer.model_copy(update={"trained": "full"}), folder),
    }
    folder, program = tmp_path_factory.mktemp("undisturbed"), programs[request.param]
    began = time.monotonic()
    assert exit_code(forked(lambda: program(folder))) == 0
    return Stage(program, folder, outcome(folder), time.monotonic() - began)


def test_killed_at_random_moments(stage: Stage, tmp_path: Path) -> None:
    chance = random.Random(11)
    kills = trial = 0
    while kills < KILLS:
        folder = tmp_path / str(trial)
        for _ in range(5):
            pid = forked(lambda folder=folder: stage.program(folder))
            time.sleep(chance.uniform(0.05, 0.7) * stage.seconds)
            os.kill(pid, signal.SIGKILL)
            if (code := exit_code(pid)) == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        else:
            assert exit_code(forked(lambda folder=folder: stage.program(folder))) == 0
        assert outcome(folder) == stage.outcome
        trial += 1
        assert trial < 10, "the runs were over before they could be killed"


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
    recipe = AutoencoderRecipe(
        **{"base": str(base_folder), "pictures": str(picture_folder), "size": 64, "crop": 32, "batch_size": 2},
        **{"detail_channels": 12, "fit_pictures": 4, "steps": 4, "checkpoint_every": 2, "evaluate_every": 5},
        loss=ADVERSARIAL.model_copy(update={"adversarial_start": 1, "lpips": 0.0}),
    )

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
