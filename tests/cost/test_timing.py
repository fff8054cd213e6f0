"""The logic of timing; how long anything takes is never asserted."""

import os
import time

import pytest
import torch

from davae.cost.timing import (
    Spread,
    compute_paired_ratios,
    compute_spread,
    find_dense_peak,
    measure_ceilings,
    measure_interleaved,
)

CPU = torch.device("cpu")


def test_a_spread_is_of_all_values_and_of_one() -> None:
    assert compute_spread([float(value) for value in range(10, -1, -1)]) == Spread(5.0, 1.0, 9.0, 0.0, 10.0, 11)
    assert compute_spread([2.5]) == Spread(2.5, 2.5, 2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="no values"):
        compute_spread([])


def test_ratios_are_of_pairs_not_of_medians() -> None:
    # The machine was three times slower in the second pair: that is no reason for another ratio.
    ratios = compute_paired_ratios([2.0, 6.0, 2.2], [1.0, 3.0, 1.0])
    assert (ratios.median, ratios.least, ratios.most) == (2.0, 2.0, 2.2)
    with pytest.raises(ValueError, match="shorter"):
        compute_paired_ratios([1.0, 2.0], [1.0])


def test_runs_are_interleaved_and_numbers_kept_apart() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    runs = {"a": lambda: run("a", 0), "b": lambda: run("b", 0.1), "c": lambda: run("c", 0)}
    found = measure_interleaved(runs, CPU, repeats=2, warm_up=1, shortest=0.0)
    assert order == list("abcabcabc")
    assert list(found) == list("abc")
    assert min(found["b"].seconds) >= 0.1
    assert max(found["a"].seconds + found["c"].seconds) < 0.1


def test_the_warm_up_is_run_and_not_counted() -> None:
    order: list[str] = []

    def first() -> None:
        time.sleep(0 if "first" in order else 0.2)
        order.append("first")

    found = measure_interleaved(
        {"first": first, "second": lambda: order.append("second")}, CPU, repeats=4, warm_up=2, shortest=0.0
    )
    assert order == ["first", "second"] * 6
    assert found["first"].cold >= 0.2
    assert len(found["first"].seconds) == 4
    assert max(found["first"].seconds) < 0.2


def test_short_runs_are_repeated_within_a_measurement_and_long_ones_are_not() -> None:
    called = dict.fromkeys(("short", "long"), 0)

    def run(name: str, seconds: float) -> None:
        called[name] += 1
        time.sleep(seconds)

    runs = {"short": lambda: run("short", 0.01), "long": lambda: run("long", 0.15)}
    found = measure_interleaved(runs, CPU, repeats=2, warm_up=1, shortest=0.1)
    assert found["long"].calls == 1
    assert 1 < found["short"].calls <= 10
    assert called == {name: 1 + 2 * found[name].calls for name in called}
    assert min(found["short"].seconds) >= 0.002
    assert max(found["short"].seconds) < found["short"].calls * 0.02, "seconds are of one call"


def test_nothing_is_kept_for_a_backward_pass() -> None:
    weight, outputs = torch.ones(2, requires_grad=True), []
    measure_interleaved({"run": lambda: outputs.append(2 * weight)}, CPU, repeats=1, warm_up=1, shortest=0.0)
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system tells no peak of memory")
def test_the_peak_of_memory_is_each_runs_own() -> None:
    held = torch.ones(2**24)  # 64 MiB that are there all the time
    runs = {"large": lambda: torch.ones(2**25).sum(), "small": lambda: torch.ones(2**10).sum()}
    found = measure_interleaved(runs, CPU, repeats=2, warm_up=1, shortest=0.0)
    assert found["large"].added_bytes > 100 * 2**20  # of 128 MiB: what was freed before may be in use still
    assert found["small"].added_bytes < 16 * 2**20
    assert found["large"].peak_bytes > found["large"].added_bytes + held.nbytes
    assert found["small"].peak_bytes > held.nbytes


def test_ceilings_are_rates_of_what_was_done() -> None:
    began = time.perf_counter()
    found = measure_ceilings(CPU, torch.float32, side=64, copied_bytes=2**16)
    passed = time.perf_counter() - began
    assert found.products > 2 * 64**3 / passed
    assert found.copy > 2 * 2**16 / passed


def test_a_cpu_has_no_data_sheet() -> None:
    assert find_dense_peak(CPU, torch.bfloat16) is None
