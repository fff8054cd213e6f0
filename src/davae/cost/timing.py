"""Timing that can be trusted: interleaved runs, warm-up apart, medians with their spread, measured ceilings."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]

SHORTEST = 0.2
"""Seconds that one measurement lasts at least: a shorter run is repeated within it, and the mean taken."""
MOST_CALLS = 100
"""Of a run within one measurement."""
DENSE_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, as the data sheets say, by a part of the device's name."""
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Spread:
    """A number that was measured several times."""

    median: float
    p10: float
    p90: float
    least: float
    most: float
    count: int


@dataclass(frozen=True)
class Measured:
    """What the measurements of one run found."""

    cold: float
    """Seconds of the very first call, compilation and caches included."""
    calls: int
    """Calls within one measurement."""
    seconds: tuple[float, ...]
    """Of one call, by measurement; warm-up left out."""
    peak_bytes: int | None
    """The most memory in use at any moment of a measurement, weights and all other cases included: allocated by torch
    on a GPU, resident on the CPU. None where the system does not tell."""
    added_bytes: int | None
    """The same without what was in use when that measurement began."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured, not read off a data sheet."""

    products: float
    """Operations a second of a large matrix product, in the dtype that was asked for."""
    copy: float
    """Bytes a second, read and written, of a large copy."""


def spread(values: Sequence[float]) -> Spread:
    """Median, tenths and extremes, linear between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("spread() was given no values")
    p10, p90 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    return Spread(statistics.median(values), p10.item(), p90.item(), min(values), max(values), len(values))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of ratios of numbers that were measured one right after the other."""
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def interleaved(runs: Mapping[str, Run], repeats: int, measure: Callable[[str, Run], float]) -> dict[str, list[float]]:
    """What `measure` says of each run, `repeats` times, in the order A B C A B C: what slows the machine slows all."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(measure(name, run))
    return found


@torch.no_grad()
def measure_interleaved(
    runs: Mapping[str, Run], device: torch.device, *, repeats: int, warm_up: int, shortest: float = SHORTEST
) -> dict[str, Measured]:
    """Time runs against each other.

    Args:
        runs: by name; each is called without arguments, without gradients, and its result thrown away.
        device: that the runs use. Its queue is emptied before the clock is read.
        repeats: measurements of each run.
        warm_up: calls of each run before that, 1 or more; the first is recorded as `cold`.
        shortest: seconds that one measurement lasts at least; 0 for one call each.
    """
    warm = interleaved(runs, warm_up, lambda name, run: _seconds(run, 1, device))
    calls = {name: min(MOST_CALLS, max(1, math.ceil(shortest / max(found[-1], 1e-9)))) for name, found in warm.items()}
    peaks: dict[str, list[tuple[int, int]]] = {name: [] for name in runs}

    def measure(name: str, run: Run) -> float:
        began = _reset_peak(device)
        seconds = _seconds(run, calls[name], device)
        if began is not None:
            peaks[name].append((_peak(device), began))
        return seconds

    found = interleaved(runs, repeats, measure)
    return {
        name: Measured(
            cold=warm[name][0],
            calls=calls[name],
            seconds=tuple(found[name]),
            peak_bytes=max((peak for peak, _ in peaks[name]), default=None),
            added_bytes=max((peak - began for peak, began in peaks[name]), default=None),
        )
        for name in runs
    }


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, side: int, copied_bytes: int) -> Ceilings:
    """Time a product of two random `side` x `side` matrices and a copy of `copied_bytes`; the median of 5 each.

    Random numbers, for products with zeros are faster than any real ones.
    """
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(0, 255, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    found = measure_interleaved(runs, device, repeats=5, warm_up=2)
    product, copy = (statistics.median(found[name].seconds) for name in ("product", "copy"))
    return Ceilings(products=2 * side**3 / product, copy=2 * copied_bytes / copy)


def dense_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of the data sheet; None for a device or a dtype that `DENSE_PEAKS` does not speak of."""
    if device.type != "cuda" or dtype not in {torch.bfloat16, torch.float16}:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DENSE_PEAKS.items() if part in name), None)


def _seconds(run: Run, calls: int, device: torch.device) -> float:
    began = _now(device)
    for _ in range(calls):
        run()
    return (_now(device) - began) / calls


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak of memory, and say how much is in use now; None where the system tells no peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not os.access(_RESET, os.W_OK):
        return None
    _RESET.write_text("5")  # the peak of resident memory, see proc(5)
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
