"""A short run on as many ranks as there are, of a model with nothing random inside."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from davae.errors import RankError
from davae.run.ranks import Ranks
from davae.seeds import generator
from davae.training.recipes import OptimisationRecipe, OptimizerName
from davae.training.state import TrainingState

STEPS, BATCH = 40, 8


def train(
    folder: Path,
    *,
    timeout: float = 60.0,
    before: Callable[[int, int], object] = lambda step, rank: None,
    optimizer: OptimizerName = "AdamW",
) -> TrainingState:
    """Train, and call `before` with step and rank in the middle of every step."""
    ranks = Ranks(timeout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.ModuleList([nn.Linear(16, 16)])[0], nn.Linear(16, 1))

    settings = {"optimizer": optimizer, "betas": (0.9, 0.999), "ema_decay": 0.9, "precision": "float32"}
    settings |= {"learning_rate": 1e-3, "warmup_steps": 5}
    settings |= {"final_learning_rate": 1e-4} if optimizer == "AdamW" else {}
    recipe = OptimisationRecipe(**settings, steps=STEPS, seed=7, checkpoint_every=3, log_every=1)
    folder.mkdir(parents=True, exist_ok=True)

    # What a rank says when another is missing is kept for the test.
    try:
        with ranks.together("a step"):
            state = TrainingState(recipe, folder, {"mlp": model}, model.parameters())
            for step in state.steps():
                batch = ranks.share(torch.randn(BATCH, 4, generator=generator(7, "batch", step)))
                loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
                before(step, ranks.rank)
                state.update(loss, {"size": loss.new_tensor(BATCH)})
    except RankError as error:
        with (folder / "rank_errors").open("a") as file:
            file.write(f"{error}\n")
        raise
    return state


def signalled(signum: int, at_step: int, of_rank: int) -> Callable[[int, int], object]:
    """A `before` that sends a signal to a rank's own process."""

    def before(step: int, rank: int) -> None:
        if (step, rank) == (at_step, of_rank):
            os.kill(os.getpid(), signum)

    return before
