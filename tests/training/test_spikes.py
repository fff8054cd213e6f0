"""Spikes of loss and gradient norm: seen, logged with their samples, skipped if asked to, remembered by a resume."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from davae.run.record import read_metrics
from davae.seeds import generator
from davae.training.guards import SIGMAS, WINDOW, Spikes
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState
from hashes import digests
from tiny_training import constant_rate

STEPS, BAD = 300, (100, 150, 200)


def test_above_six_deviations_of_the_last_steps() -> None:
    numbers = torch.randn(WINDOW, generator=generator(0, "losses"), dtype=torch.float64)
    for name, position in (("loss", 0), ("norm", 1)):
        spikes = Spikes((n, n) for n in numbers.tolist())
        limit = (numbers.mean() + SIGMAS * numbers.std()).item()
        usual = [numbers.mean().item()] * 2
        for value, expected in ((limit - 1e-9, False), (limit + 1e-9, True), (-limit, False)):
            pair = [*usual]
            pair[position] = value
            assert Spikes(spikes.recent).see(*pair) is expected, (name, value)


def test_there_is_no_telling_before_half_a_window() -> None:
    spikes = Spikes()
    for step in range(WINDOW // 2):
        assert not spikes.see(1e9 if step % 7 == 6 else 1.0, 1.0)
    assert spikes.count == 0
    assert spikes.see(1e12, 1.0)
    assert spikes.count == 1


def test_a_new_level_is_usual_after_some_steps() -> None:
    spikes = Spikes()
    for level in (1.0, 1000.0):
        for number in torch.randn(WINDOW, generator=generator(0, "level"), dtype=torch.float64).tolist():
            spikes.see(level + number, 1.0)
    assert 1 < spikes.count < WINDOW // 2
    assert not spikes.see(1000.0, 1.0)


def train(folder: Path, *, bad: tuple[int, ...] = BAD, stop: int = STEPS, skip_spikes: bool = True) -> Tensor:
    """Least squares by a linear layer, with a batch a hundred times too large at the steps `bad`; its held-out loss."""
    model = nn.Linear(8, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    recipe = OptimisationRecipe(
        steps=STEPS,
        betas=(0.9, 0.999),
        precision="float32",
        checkpoint_every=10,
        skip_spikes=skip_spikes,
        **constant_rate(1e-2),
    )
    state = TrainingState(recipe, folder, {"model": model}, model.parameters())

    def loss(purpose: str, step: int, factor: float = 1.0) -> Tensor:
        batch = factor * torch.randn(64, 8, generator=generator(0, purpose, step))
        noise = torch.randn(64, 1, generator=generator(1, purpose, step))
        return (model(batch) - batch.sum(1, keepdim=True) - noise).square().mean()

    for step in state.steps():
        if step == stop:
            break
        state.update(loss("batch", step, 100.0 if step in bad else 1.0), samples=[f"picture {step}"])
    return torch.stack([loss("heldout", step).detach() for step in range(20)]).mean()


@pytest.mark.soak("R8")
@pytest.mark.parametrize("skip_spikes", [False, True])
def test_three_bad_batches_are_seen_and_bounded(tmp_path: Path, skip_spikes: bool, caplog) -> None:
    clean = train(tmp_path / "clean", bad=())
    found = train(tmp_path / "bad", skip_spikes=skip_spikes)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "bad" / "metrics.jsonl")}
    assert [step for step, line in lines.items() if "spike" in line] == list(BAD)
    for step in BAD:
        assert lines[step]["samples"] == [f"picture {step}"]
        assert ("skipped" in lines[step]) == skip_spikes
        assert f"step {step}: " in caplog.text
        assert f"picture {step}" in caplog.text
    assert not [line for line in read_metrics(tmp_path / "clean" / "metrics.jsonl") if "spike" in line]
    assert math.isclose(found, clean, rel_tol=0.01)


def test_a_resumed_run_remembers_what_is_usual(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "parts", stop=95)
    train(tmp_path / "parts")
    assert digests(tmp_path / "parts", "step-00000300/*.safetensors") == digests(
        tmp_path / "whole", "step-00000300/*.safetensors"
    )
    plain = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [line["loss_hex"] for line in plain[0]] == [line["loss_hex"] for line in plain[1]]
