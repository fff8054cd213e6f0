"""Which steps are taken: steps whose numbers are not finite are skipped, spikes are noticed."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from davae.errors import NumericsError

MAX_SKIPPED_IN_A_ROW = 5
WINDOW = 128
SIGMAS = 6.0
"""The window and the factor of OLMo's SkipStepOptimizer (allenai/OLMo-core, optim/skip_step_optimizer.py).

There a spike enters the statistics as it is, and hides the next ones; here it enters cut to the limit.
"""


class StepGuard:
    """Counts the steps that the model, or the training, of a name has skipped; ends a run after five in a row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped = self.skipped_in_a_row = 0

    def see(self, loss: float, norm: float, *, finite: bool, skipped: bool) -> None:
        """Count a step of this loss and gradient norm; a NumericsError if it is the fifth in a row not `finite`."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if skipped:
            self.skipped += 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"{self.name}: loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (at last: loss "
                f"{loss}, gradient norm {norm}). The weights are as before these steps; look at their data, or lower "
                "the learning rate"
            )

    def values(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take back the counts."""
        self.skipped, self.skipped_in_a_row = values["skipped"], values["skipped_in_a_row"]


class Spikes:
    """The losses and gradient norms of the last `WINDOW` steps, cut where spikes begin: a new level is soon usual."""

    def __init__(self, recent: Iterable[tuple[float, float]] = (), count: int = 0) -> None:
        """Go on from the (loss, gradient norm) pairs of former steps, oldest first, and from the count of spikes."""
        self.recent, self.count = deque(recent, maxlen=WINDOW), count

    def see(self, loss: float, norm: float) -> bool:
        """Whether one of two finite numbers is above the mean of those before by over `SIGMAS` standard deviations.

        The answer is no until half a window is full. A fall is no spike.
        """
        limits = [math.inf, math.inf]
        if len(self.recent) >= WINDOW // 2:
            deviations, means = torch.std_mean(torch.tensor(list(self.recent), dtype=torch.float64), dim=0)
            limits = (means + SIGMAS * deviations).tolist()

        # A spike is stored cut to the limit, so that it does not hide the next one.
        spike = loss > limits[0] or norm > limits[1]
        self.recent.append((min(loss, limits[0]), min(norm, limits[1])))
        if spike:
            self.count += 1
        return spike
