"""A tiny model with everything that a training state must keep, its run, and what the run leaves."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from davae.run.record import read_metrics
from davae.seeds import generator
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState

STEPS = 40


def constant_rate(rate: float) -> dict[str, float]:
    """Settings of a recipe whose learning rate is the same at every step."""
    return {"learning_rate": rate, "final_learning_rate": rate, "warmup_steps": 0}


def tiny_recipe(**changes: object) -> OptimisationRecipe:
    settings = {
        "steps": STEPS,
        "learning_rate": 1e-2,
        "final_learning_rate": 1e-3,
        "warmup_steps": 5,
        "seed": 7,
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "ema_decay": 0.9,
        "precision": "float32",
        "checkpoint_every": 5,
        "log_every": 1,
    }
    return OptimisationRecipe(**(settings | changes))


def tiny_model() -> nn.Sequential:
    """Linear layers around a buffer that training moves, dropout from the global generator, and a frozen layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4), nn.Linear(4, 1))
    model[4].requires_grad_(False)
    return model


def tiny_state(folder: Path, model: nn.Module, **changes: object) -> TrainingState:
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainingState(tiny_recipe(**changes), folder, {"mlp": model}, trained)


def loss_of(state: TrainingState, model: nn.Module, step: int) -> Tensor:
    batch = torch.randn(8, 4, generator=generator(7, "batch", step)).to(state.device)
    with state.autocast():
        prediction = model(batch)
    return (prediction.float() - batch.sum(1, keepdim=True)).square().mean()


def train(folder: Path, *, before: Callable[[int], object] = lambda step: None, **changes: object) -> TrainingState:
    """The program that is killed and started again: bfloat16, an evaluation every ten steps.

    `before` is called with the step in the middle of every step, and with the number of all steps by the last save.
    """
    model = tiny_model()
    state = tiny_state(folder, model, precision="bf16", **changes)
    schedule = state.learning_rate

    def learning_rate(step: int) -> float:
        before(step)
        return schedule(step)

    state.learning_rate = learning_rate
    for step in state.steps():
        if step % 10 == 0:
            with state.ema_weights():
                state.log({"heldout_norm": model[0].weight.norm()})
        state.update(loss_of(state, model, step), {"weight": model[0].weight.norm()})
    return state


def snapshot(state: TrainingState, model: nn.Module) -> dict[str, Tensor]:
    """Copies of weights, optimiser tensors and EMA."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    for position, values in state.weights.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{position}.{key}": value for key, value in values.items()}
    with state.ema_weights():
        tensors |= {f"ema.{name}": p.detach().clone() for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def outcome(folder: Path) -> tuple[dict[str, str], list[dict]]:
    """SHA-256 of every tensor file of the last checkpoint, and the metrics without their wall times."""
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    lines = read_metrics(folder / "metrics.jsonl")
    return digests, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
