"""Steps whose loss or gradient norm stands out from those before: noticed, and skipped if the run says so."""

import math
from collections import deque
from collections.abc import Iterable

import torch

WINDOW = 128
SIGMAS = 6.0
"""The window and the factor of OLMo's SkipStepOptimizer (allenai/OLMo-core, optim/skip_step_optimizer.py).

There a spike enters the statistics as it is, and hides the next ones; here only as far as it is none.
"""


class Spikes:
    """The losses and gradient norms of the last `WINDOW` steps, cut where spikes begin: a new level is soon usual."""

    def __init__(self, recent: Iterable[tuple[float, float]] = ()) -> None:
        """Go on from the (loss, gradient norm) pairs of former steps, oldest first."""
        self.recent = deque(recent, maxlen=WINDOW)
        self.count = 0

    def see(self, loss: float, norm: float) -> bool:
        """Whether one of two finite numbers is above the mean of those before by over `SIGMAS` standard deviations.

        Before half a window is full there is no telling, and the answer is no. A fall is no spike.
        """
        limits = [math.inf, math.inf]
        if len(self.recent) >= WINDOW // 2:
            deviations, means = torch.std_mean(torch.tensor(list(self.recent), dtype=torch.float64), dim=0)
            limits = (means + SIGMAS * deviations).tolist()
        spike = loss > limits[0] or norm > limits[1]
        self.recent.append((min(loss, limits[0]), min(norm, limits[1])))
        self.count += spike
        return spike
