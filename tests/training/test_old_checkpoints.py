"""Checkpoints that older versions of davae wrote, one for each format version, go on in this one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from davae.errors import CheckpointError
from davae.run.ranks import Ranks
from davae.seeds import generator
from davae.training.companion import Companion
from davae.training.folders import claim_folder
from davae.training.recipes import OptimisationRecipe
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.state import TrainingState
from tiny_training import constant_rate

KEPT = Path(__file__).parents[1] / "checkpoints"
"""format-N holds what `train(folder, total_steps=3)` left of checkpoints with format version N."""


class OldRecipe(OptimisationRecipe):
    """A recipe with the digest in the manifests of these checkpoints."""

    def digest(self) -> str:
        return "0ld" * 20


def small() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def train(folder: Path, *, total_steps: int) -> TrainingState:
    """A model with a buffer and a companion beside it."""
    recipe = OldRecipe(
        steps=total_steps, betas=(0.9, 0.999), checkpoint_every=100, precision="float32", **constant_rate(1e-2)
    )
    model, second = small(), Companion("second", small(), recipe)
    state = TrainingState(recipe, folder, {"model": model}, model.parameters(), companion=second)
    for step in state.steps():
        batch = torch.randn(8, 4, generator=generator(0, "batch", step))
        state.update((model(batch) - 1).square().mean())
        second.update((second.model(batch) + 1).square().mean())
    return state


def test_of_every_format_version_there_is_one_and_they_are_small() -> None:
    from davae.run.checkpoint import FORMAT_VERSION

    folders = sorted(path.name for path in KEPT.iterdir())
    assert folders == [f"format-{version}" for version in range(1, FORMAT_VERSION + 1)]
    for folder in KEPT.iterdir():
        manifest = json.loads((folder / "step-00000003" / "manifest.json").read_text())
        assert folder.name == f"format-{manifest['format_version']}"
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 30_000


@pytest.mark.soak("R19")
@pytest.mark.parametrize("folder", sorted(KEPT.iterdir()), ids=lambda path: path.name)
def test_an_old_checkpoint_goes_on(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "checkpoints")
    state = train(tmp_path / "run", total_steps=8)
    assert (state.step, state.guard.skipped) == (8, 0)
    new = train(tmp_path / "new", total_steps=8)
    found, expected = (
        {path.name: path.stat().st_size for path in (run.record.folder / "checkpoints").glob("*/*.safetensors")}
        for run in (state, new)
    )
    assert found == expected, "the same tensors of the same shapes as of a run that never stopped"
    ours, theirs = (
        {name: tensor.norm().item() for name, tensor in run.weights.optimizer.state_dict()["state"][0].items()}
        for run in (state, new)
    )
    assert ours == pytest.approx(theirs, rel=1e-2), "moments and all, up to the machine's last digits"


def test_a_run_from_before_a_setting_was_added_goes_on(tmp_path: Path) -> None:
    recipe = AutoencoderRecipe(steps=7)
    (tmp_path / "checkpoints").mkdir()
    lines = recipe.to_toml().splitlines(keepends=True)
    (tmp_path / "recipe.toml").write_text("".join(line for line in lines if not line.startswith("skip_spikes")))
    with claim_folder(recipe, tmp_path, Ranks()):
        pass
    other = AutoencoderRecipe(steps=7, skip_spikes=True)
    with pytest.raises(CheckpointError, match="skip_spikes = False"), claim_folder(other, tmp_path, Ranks()):
        pass
