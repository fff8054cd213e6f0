"""How OpenMP's threads should wait for each other: the shipped upgrade samples, alone or beside busy processes.

    python benchmarks/waiting.py --busy 1

prints the seconds of five sampling steps with two threads, for each policy in turns, and their ratio. The command line
sets OMP_WAIT_POLICY=PASSIVE unless the variable is set.
"""

import os
import statistics
import subprocess
import sys
from typing import Annotated

import typer

POLICIES = ("PASSIVE", "ACTIVE")
SAMPLE = """
import time
from davae import assets, load_pipeline
from davae.pipelines.sampling import sample

pipeline = load_pipeline(assets.base_pipeline(), adapter=assets.upgrade())
pipeline.set_progress_bar_config(disable=True)
settings = {"seed": 0, "prompt_tokens": 20}
sample(pipeline, [""], steps=1, **settings)
began = time.perf_counter()
sample(pipeline, [""], steps=5, **settings)
print(time.perf_counter() - began)
"""
SPIN = "while True: pass"


def time_sampling(policy: str, threads: int) -> float:
    """Seconds of the five steps, in a process of its own, since OpenMP reads the policy once."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", SAMPLE], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(
    busy: Annotated[int, typer.Option(help="Processes that spin beside it.")] = 1,
    threads: Annotated[int, typer.Option(help="OpenMP threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each policy.")] = 3,
) -> None:
    """Print the medians and their ratio."""
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    try:
        for _ in range(repeats):
            for policy in POLICIES:
                times[policy].append(time_sampling(policy, threads))
    finally:
        for process in others:
            process.kill()
            process.wait()

    medians = {policy: statistics.median(values) for policy, values in times.items()}
    for policy, seconds in medians.items():
        typer.echo(f"{policy:8} {seconds:6.2f} s {[round(value, 2) for value in times[policy]]}")
    typer.echo(f"beside {busy} busy processes: ACTIVE takes {medians['ACTIVE'] / medians['PASSIVE']:.2f} times as long")


if __name__ == "__main__":
    typer.run(main)
