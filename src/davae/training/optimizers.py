"""The optimisers that a recipe may name: torch's AdamW, one whose moments have 8 bits, one that needs no schedule."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from davae.errors import SettingsError
from davae.run.ranks import Ranks
from davae.training.recipes import OptimisationRecipe, OptimizerName

LIBRARIES = {"AdamW": "torch.optim", "AdamW8bit": "bitsandbytes.optim", "AdamWScheduleFree": "schedulefree"}
"""The module of each class. Its package has the name of the extra of davae that installs it."""
STATE_BYTES = {"AdamW": 8.0, "AdamW8bit": 2 + 8 / 256, "AdamWScheduleFree": 8.0}
"""For each trained number; AdamW8bit has two scales for 256 numbers, and 8 bytes in tensors of less than 4096."""
COUNTS = ("k", "weight_sum", "lr_max")
"""What schedule-free keeps beside its tensors: steps, the sum of their weights, the largest learning rate."""


def check_optimizer(name: OptimizerName, ranks: Ranks) -> None:
    """Refuse an optimiser that cannot be used here: its package is not installed, or FSDP2 cannot shard it."""
    if name == "AdamW8bit" and ranks.sharded:
        raise SettingsError(
            f'optimizer="{name}" with FSDP2: its moments share scales in blocks of 256, which sharding would cut. '
            "Launch with recipes/launch/ddp.yaml, or take AdamW, whose moments FSDP2 shards"
        )
    package = LIBRARIES[name].partition(".")[0]
    try:
        import_module(package)
    except ImportError as error:
        raise SettingsError(
            f"optimizer=\"{name}\" needs {package}: {error}. Install it: pip install 'davae[{package}]'"
        ) from error


def make_optimizer(recipe: OptimisationRecipe, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser of these weights, in training mode if it has one."""
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "AdamW":
        settings["fused"] = True  # the fastest of torch's kernels
    if recipe.optimizer == "AdamW8bit":
        # Its first step would do it, but a resumed run has no first step.
        for weight in weights:
            weight.data = weight.data.contiguous()

    # Schedule-free has a mode for training and one for use.
    optimizer_class = getattr(import_module(LIBRARIES[recipe.optimizer]), recipe.optimizer)
    optimizer: torch.optim.Optimizer = optimizer_class(weights, **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer
