"""Timing that can be trusted: interleaved runs, a warm-up, medians with their spread, measured ceilings."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Run = Callable[[], object]

# Least seconds of one measurement: a shorter run is repeated within it, and the mean counts.
SHORTEST = 0.2
# Calls of a run within one measurement, at most.
MOST_CALLS = 100
# Dense bfloat16 operations a second from the data sheets, by a part of the device's name.
DENSE_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}

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


@dataclass
class Measured:
    """The measurements of one run."""

    cold: float  # seconds of the first call, compilation and caches included
    calls: int  # within one measurement
    seconds: list[float] = field(default_factory=list)  # of one call, for each measurement after the warm-up
    # Peak memory during a measurement, with weights and all other cases: allocated by torch on a GPU, resident on the
    # CPU. None where the system does not report it.
    peak_bytes: int | None = None
    added_bytes: int | None = None  # the same above the memory in use when that measurement began


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of the machine."""

    products: float  # operations a second of a large matrix product, in the requested precision
    copy: float  # bytes a second, read and written, of a large copy


def compute_spread(values: Sequence[float]) -> Spread:
    """Median, tenths and extremes, linear between neighbours."""
    if not values:
        raise ValueError("compute_spread() was given no values")
    p10, p90 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    return Spread(statistics.median(values), p10.item(), p90.item(), min(values), max(values), len(values))


def compute_paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of ratios of numbers that were measured one right after the other."""
    return compute_spread([above / below for above, below in zip(numerators, denominators, strict=True)])


@torch.no_grad()
def measure_interleaved(
    runs: Mapping[str, Run], device: torch.device, *, repeats: int, warm_up: int, shortest: float = SHORTEST
) -> dict[str, Measured]:
    """Time runs against each other, without gradients: `repeats` measurements of at least `shortest` seconds each."""
    warm: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in _interleave(runs, warm_up):
        warm[name].append(_time(run, 1, device))

    # The warm-up says how many calls a measurement needs.
    measured = {}
    for name, seconds in warm.items():
        calls = math.ceil(shortest / max(seconds[-1], 1e-9))
        measured[name] = Measured(cold=seconds[0], calls=min(MOST_CALLS, max(1, calls)))

    for name, run in _interleave(runs, repeats):
        own, before = measured[name], _reset_peak(device)
        own.seconds.append(_time(run, own.calls, device))
        if before is not None:
            peak = _read_peak(device)
            own.peak_bytes = max(own.peak_bytes or 0, peak)
            own.added_bytes = max(own.added_bytes or 0, peak - before)
    return measured


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, side: int, copied_bytes: int) -> Ceilings:
    """Time a product of two `side` x `side` matrices and a copy of `copied_bytes`; the median of 5 each.

    The numbers are random, because products with zeros are faster than real ones.
    """
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn_like(left)
    source = torch.randint(0, 255, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}

    measured = measure_interleaved(runs, device, repeats=5, warm_up=2)
    # A multiplication and its addition are two operations; a copy reads and writes.
    product = statistics.median(measured["product"].seconds)
    copy = statistics.median(measured["copy"].seconds)
    return Ceilings(products=2 * side**3 / product, copy=2 * copied_bytes / copy)


def find_dense_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second from the data sheet; None for a device or precision that is not in `DENSE_PEAKS`."""
    if device.type != "cuda" or dtype not in {torch.bfloat16, torch.float16}:
        return None
    for name, peak in DENSE_PEAKS.items():
        if name in torch.cuda.get_device_name(device):
            return peak
    return None


def _interleave(runs: Mapping[str, Run], rounds: int) -> Iterator[tuple[str, Run]]:
    """The runs in the order A B C A B C: what slows the machine down slows down all."""
    for _ in range(rounds):
        yield from runs.items()


def _time(run: Run, calls: int, device: torch.device) -> float:
    """Seconds of one call, the mean of several."""
    began = _read_clock(device)
    for _ in range(calls):
        run()
    return (_read_clock(device) - began) / calls


def _read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak of memory and return the memory in use; None where the system reports no peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not os.access(_RESET, os.W_OK):
        return None
    _RESET.write_text("5", encoding="utf-8")  # the peak of resident memory, see proc(5)
    return _read_resident("VmRSS")


def _read_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _read_resident("VmHWM")


def _read_resident(field_name: str) -> int:
    after = _STATUS.read_text(encoding="utf-8").split(f"{field_name}:")[1]
    return 1024 * int(after.split()[0])
