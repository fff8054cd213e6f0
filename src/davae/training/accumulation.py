"""The batches of one step whose gradients are added up: what the step logs of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Logs = Mapping[str, Tensor | float]


def means(batches: Sequence[tuple[Tensor, Logs]]) -> tuple[Tensor, Logs]:
    """The mean of the losses and of each log over a step's batches; of a single batch its own, bit for bit."""
    losses, logs = zip(*batches, strict=True)
    if len(batches) == 1:
        return losses[0], logs[0]
    return torch.stack(losses).mean(), {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
