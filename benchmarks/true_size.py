"""Stable Diffusion 3.5 Medium at its true size, random weights: the base against its upgrade, eager, compiled, recorded.

    python benchmarks/true_size.py runs/true_size                     # a GPU; about five minutes
    python benchmarks/true_size.py runs/true_size --round graphs      # CUDA graphs, on their own
    python benchmarks/true_size.py runs/try --device cpu --layers 1 --small    # tries the script, measures nothing

Each round is a folder of `davae bench` in RUN, and its table is printed. "eager" and "compiled" are of one picture of
1024 px; "batch" of ten; "large" of one of 2048 px; compiled ones share one graph for all sizes. "graphs" compiles the
upgrade's blocks for one size and records them as CUDA graphs. RUN/compiling.json says how often torch compiled.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from torch._dynamo.utils import counters

from davae.benchmark.bench import CEILINGS, bench, cases_of, load_pair, quicken
from davae.benchmark.timing import Ceilings, measure_ceilings
from davae.errors import SettingsError
from davae.storage import write_json
from davae.training.sharding import blocks_of

PARTS = ("text", "step", "decode", "to-cpu", "whole")


@dataclass(frozen=True)
class Round:
    """What is measured in one go."""

    compiled: bool
    size: int = 1024
    batch: int = 1
    parts: tuple[str, ...] = PARTS
    whole_repeats: int = 5
    equal_pixels_only: bool = False
    """Leave out the base at as many tokens."""


ROUNDS = {
    "eager": Round(compiled=False, parts=("step", "decode", "whole"), whole_repeats=3),
    "compiled": Round(compiled=True),
    "batch": Round(compiled=True, batch=10, parts=("step", "decode", "whole"), whole_repeats=2, equal_pixels_only=True),
    "large": Round(
        compiled=True, size=2048, parts=("step", "decode", "whole"), whole_repeats=3, equal_pixels_only=True
    ),
}
"""By name; those that are compiled come behind those that are not."""
GRAPHS = "graphs"


def measure_round(
    pair: Mapping[str, DiffusionPipeline], round_: Round, out: Path, ceilings: Ceilings, settings: dict[str, Any]
) -> str:
    """One round's table."""
    quicken(pair.values(), compiled=round_.compiled, channels_last=True)
    pixels = [round_.size] if round_.equal_pixels_only else []
    cases = cases_of(pair, size=round_.size, against_sizes=pixels, batch=round_.batch, **settings)
    repeats = {"repeats": 7, "warm_up": 2, "whole_repeats": round_.whole_repeats}
    return bench(cases, out, parts=round_.parts, ceilings=ceilings, **repeats)


def record_graphs(pipeline: DiffusionPipeline) -> None:
    """Compile the transformer's blocks for one size, and record each as a CUDA graph."""
    for block in blocks_of(pipeline.transformer):
        block.compile(fullgraph=True, mode="reduce-overhead")


def main(
    run: Path,
    round_: Annotated[
        list[str] | None, typer.Option("--round", help=f"Some of {', '.join(ROUNDS)}, or {GRAPHS} alone.")
    ] = None,
    device: Annotated[str, typer.Option()] = "cuda",
    layers: Annotated[int | None, typer.Option(help="Blocks that are kept.")] = None,
    steps: Annotated[int, typer.Option()] = 28,
    small: Annotated[bool, typer.Option(help="Pictures of 128 px, two at most: to try the script.")] = False,
) -> None:
    """Build the pair once, measure all rounds, and print their tables."""
    wanted = list(ROUNDS) if round_ is None else round_
    if unknown := set(wanted) - {*ROUNDS, GRAPHS}:
        raise SettingsError(f"round {unknown.pop()!r}: allowed are {', '.join(ROUNDS)} and {GRAPHS}")
    where = torch.device(device)
    settings: dict[str, Any] = {"adapter": (), "layers": layers, "parts": (), "dtype": "bfloat16", "device": device}
    began = time.monotonic()
    pair = load_pair(None, None, geometry="sd35m", **settings)
    typer.echo(f"built in {time.monotonic() - began:.0f} s")
    ceilings = measure_ceilings(where, torch.bfloat16, **CEILINGS[where.type])
    compiling = {}
    for name in [*(each for each in ROUNDS if each in wanted), *([GRAPHS] if GRAPHS in wanted else [])]:
        chosen = ROUNDS.get(name, Round(compiled=False))
        if small:
            chosen = Round(
                chosen.compiled, chosen.size // 8, min(2, chosen.batch), chosen.parts, 1, chosen.equal_pixels_only
            )
        measured = dict(pair)
        if name == GRAPHS:
            measured = dict([next(iter(pair.items()))])
            record_graphs(next(iter(measured.values())))
        began = time.monotonic()
        typer.echo(f"\n## {name}\n\n{measure_round(measured, chosen, run / name, ceilings, {'steps': steps})}")
        compiling[name] = {"seconds": time.monotonic() - began, "graphs so far": counters["stats"]["unique_graphs"]}
        write_json(run / "compiling.json", compiling)


if __name__ == "__main__":
    typer.run(main)
