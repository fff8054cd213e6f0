"""The timestep shift that a flow model's scheduler applies, for a picture of a number of tokens."""

import math
from typing import Any

from davae.errors import SettingsError


def timestep_shift(scheduler: Any, tokens: int) -> float:
    """The s of sigma = s t / (1 + (s - 1) t), as the stock pipelines of flow models sample with.

    Static if the scheduler's config says so (`shift`, or `flow_shift` of the DPM solvers). With dynamic shifting it is
    exp(mu), or mu where `time_shift_type` is "linear", and mu a straight line through `base_shift` at
    `base_image_seq_len` tokens and `max_shift` at `max_image_seq_len`. An upgrade keeps the tokens, so it keeps s.

    Raises:
        SettingsError: the scheduler is no flow model's.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        shift = config.get("shift", config.get("flow_shift"))
        if shift is None:
            raise SettingsError(
                f"the scheduler, a {type(scheduler).__name__}, has neither shift nor flow_shift: it is no flow "
                "model's. Give the pipeline its own scheduler, or the recipe a shift"
            )
        return float(shift)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - first) / (last - first)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
