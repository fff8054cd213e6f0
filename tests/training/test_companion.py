"""A second model with an optimiser of its own beside a training state."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from davae.errors import CheckpointError, NumericsError
from davae.seeds import generator
from davae.training.companion import Companion
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState
from tiny_training import constant_rate, tiny_recipe

SETTINGS = {"learning_rate": 1e-2, "betas": (0.5, 0.9), "weight_decay": 0.01, "clip_norm": 0.5}


def companion(**changes: object) -> Companion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return Companion("second", model, OptimisationRecipe(**SETTINGS, **changes))


def begun(folder: Path, second: Companion | None) -> tuple[TrainingState, nn.Module]:
    first = nn.Linear(4, 4)
    nn.init.eye_(first.weight)
    nn.init.zeros_(first.bias)
    recipe = tiny_recipe(steps=8, checkpoint_every=3, **constant_rate(1e-2))
    return TrainingState(recipe, folder, {"first": first}, first.parameters(), companion=second), first


def loss_of(second: Companion, step: int) -> Tensor:
    return (second.model(torch.randn(8, 4, generator=generator(0, "batch", step))) - 1).square().mean()


def train(folder: Path, *, stop_after: int | None = None) -> Companion:
    second = companion()
    state, first = begun(folder, second)
    for step in state.steps():
        if step == stop_after:
            break
        state.update(first.weight.square().sum())
        if step >= 2:  # it has no moments in the first checkpoint of a run that stops early
            second.update(loss_of(second, step))
    return second


def tensors(second: Companion) -> dict[str, Tensor]:
    """Weights, buffers and moments, copied."""
    return {
        f"{group}/{name}": tensor.clone() for group, held in second.groups().items() for name, tensor in held.items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_it_resumes_from_the_states_checkpoint_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=stop_after)
    assert same(tensors(train(tmp_path / "parts")), tensors(whole))


def test_an_empty_optimiser_is_saved_and_loaded(tmp_path: Path) -> None:
    second = companion()
    state, first = begun(tmp_path, second)
    for step in state.steps():
        if step == 4:
            break
        state.update(first.weight.square().sum())
    again = companion()
    state, _ = begun(tmp_path, again)
    assert state.step == 3
    assert again.groups()["second_optimizer"] == {}
    assert same(tensors(again), tensors(second))


def test_its_step_is_adamw_with_its_own_settings(tmp_path: Path) -> None:
    """Loshchilov and Hutter 1711.05101 in numpy float64, gradients clipped to their norm, first step."""
    second = companion()
    loss = loss_of(second, 0)
    weights = [p.detach().double().numpy().copy() for p in second.model.parameters()]
    gradients = [g.double().numpy() for g in torch.autograd.grad(loss, list(second.model.parameters()))]
    norm = math.sqrt(sum((g**2).sum() for g in gradients))
    assert norm > 0.5
    second.update(loss_of(second, 0))
    for parameter, weight, gradient in zip(second.model.parameters(), weights, gradients, strict=True):
        clipped = gradient * 0.5 / (norm + 1e-6)
        expected = weight * (1 - 1e-2 * 0.01) - 1e-2 * clipped / (abs(clipped) + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_change_nothing_buffers_included(bad: float) -> None:
    second = companion()
    second.update(loss_of(second, 0))
    before = tensors(second)
    picture = torch.full((8, 4), bad)
    loss = second.model(picture).square().mean()
    assert not same(tensors(second), before), "BatchNorm has seen them"
    second.update(loss)
    assert same(tensors(second), before)
    assert second.guard.values() == {"skipped": 1, "skipped_in_a_row": 1}
    second.update(loss_of(second, 1))
    assert second.guard.values() == {"skipped": 1, "skipped_in_a_row": 0}
    assert not same(tensors(second), before)


def test_five_skipped_steps_in_a_row_end_the_run() -> None:
    second = companion()
    for _ in range(4):
        second.update(loss_of(second, 0) * math.nan)
    with pytest.raises(NumericsError, match="second: loss or gradient was not finite in 5 steps in a row"):
        second.update(loss_of(second, 0) * math.nan)


def test_a_checkpoint_without_it_is_refused(tmp_path: Path) -> None:
    state, first = begun(tmp_path, None)
    for _ in state.steps():
        state.update(first.weight.square().sum())
    with pytest.raises(CheckpointError, match=r"second\.safetensors does not fit: the model, not the checkpoint"):
        begun(tmp_path, companion())


def test_batches_of_a_step_are_one_batch_in_parts() -> None:
    whole, parts = companion(), companion(gradient_accumulation=2)
    for second in (whole, parts):
        second.model.eval()  # BatchNorm would see another batch
    before = tensors(parts)
    batch = torch.randn(8, 4, generator=generator(0, "batch", 0))
    whole.update((whole.model(batch) - 1).square().mean())
    for index, half in enumerate(batch.chunk(2)):
        assert same(tensors(parts), before) is (index < 2)
        parts.update((parts.model(half) - 1).square().mean())
    found, expected = tensors(parts), tensors(whole)
    assert found.keys() == expected.keys() != before.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
