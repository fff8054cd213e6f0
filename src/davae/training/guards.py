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
    """Counts the steps that are skipped, and ends a run after five steps in a row that were not finite."""

    def __init__(self, name: str) -> None:
        """The guard of the model, or the training, of that name."""
        self.name = name
        self.skipped = 0
        self.skipped_in_a_row = 0

    def see(self, *, finite: bool, skipped: bool) -> None:
        """Count a step."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if skipped:
            self.skipped += 1

    def values(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take back the counts."""
        self.skipped, self.skipped_in_a_row = values["skipped"], values["skipped_in_a_row"]

    def check(self, loss: float, norm: float) -> None:
        """End the run if too many steps were skipped, after a step with this loss and gradient norm.

        Raises:
            NumericsError: they were.
        """
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"{self.name}: loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row (at last: loss "
                f"{loss}, gradient norm {norm}). The weights are as before these steps; look at their data, or lower "
                "the learning rate"
            )


class Spikes:
    """The losses and gradient norms of the last `WINDOW` steps, cut where spikes begin: a new level is soon usual."""

    def __init__(self, recent: Iterable[tuple[float, float]] = ()) -> None:
        """Go on from the (loss, gradient norm) pairs of former steps, oldest first."""
        self.recent = deque(recent, maxlen=WINDOW)
        self.count = 0

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
