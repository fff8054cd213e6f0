"""Stable Diffusion 3.5 Medium at its true size, random weights: the base against its upgrade, eager and compiled.

    python benchmarks/true_size.py runs/true_size                     # a GPU; about six minutes
    python benchmarks/true_size.py runs/true_size --round graphs      # CUDA graphs, on their own
    python benchmarks/true_size.py runs/try --device cpu --layers 1 --small    # tries the script, measures nothing

Each round is a folder of `davae bench` in RUN, and its table is printed. "eager" and "compiled" are of one picture of
1024 px; "batch" of ten; "large" of one of 2048 px; compiled ones share one graph for all sizes. "graphs" captures a
step of either model as one CUDA graph, uncompiled (RUN/captured.json); then it compiles all blocks and records each
as a CUDA graph. RUN/compiling.json says how often torch compiled. `--compile-decoder` compiles the decoders'
stages and lays them out with channels last.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from torch._dynamo.utils import counters

from davae.cost.bench import CEILINGS, bench, load_pair, make_cases, quicken
from davae.cost.cases import make_runs
from davae.cost.timing import (
    Ceilings,
    Run,
    compute_paired_ratios,
    compute_spread,
    measure_ceilings,
    measure_interleaved,
)
from davae.errors import SettingsError
from davae.run.record import environment
from davae.run.storage import write_json
from davae.training.sharding import blocks_of

PARTS = ("text", "step", "decode", "to-cpu", "whole")
SOME = ("step", "decode", "whole")


@dataclass(frozen=True)
class Round:
    """The settings of one table."""

    compiled: bool
    size: int = 1024
    batch: int = 1
    parts: tuple[str, ...] = PARTS
    whole_repeats: int = 5
    equal_pixels_only: bool = False
    """Leave out the base at as many tokens."""


ROUNDS = {
    "eager": Round(compiled=False, parts=SOME, whole_repeats=3),
    "compiled": Round(compiled=True),
    "batch": Round(compiled=True, batch=10, parts=SOME, whole_repeats=2, equal_pixels_only=True),
    "large": Round(compiled=True, size=2048, parts=SOME, whole_repeats=3, equal_pixels_only=True),
}
"""By name; those that are compiled come behind those that are not."""
GRAPHS = "graphs"


def measure_round(
    pair: Mapping[str, DiffusionPipeline], round_: Round, out: Path, ceilings: Ceilings, settings: dict[str, Any]
) -> str:
    """One round's table."""
    pixels = [round_.size] if round_.equal_pixels_only else []
    cases = make_cases(pair, size=round_.size, against_sizes=pixels, batch=round_.batch, **settings)
    repeats = {"repeats": 7, "warm_up": 2, "whole_repeats": round_.whole_repeats}
    return bench(cases, out, parts=round_.parts, ceilings=ceilings, **repeats)


@torch.no_grad()
def capture(run: Run) -> Run:
    """The launches of a run as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_captured(pair: Mapping[str, DiffusionPipeline], size: int, out: Path) -> str:
    """A guided step of one picture at equal pixels, each model's as one CUDA graph, against its own launches."""
    cases, runs = make_cases(pair, size=size, against_sizes=[size]), {}
    for case in cases:
        runs[f"{case.name}, launched"] = run = make_runs(case, ["step"])["step"]
        runs[f"{case.name}, one graph"] = capture(run)
    measured = measure_interleaved(runs, cases[0].pipeline.device, repeats=7, warm_up=2)

    # Each pair of runs, the slower one over the faster one.
    launched, graph, base_launched, base_graph = runs
    ratios = {
        f"{above} over {below}": asdict(compute_paired_ratios(measured[above].seconds, measured[below].seconds))
        for above, below in ((base_graph, graph), (base_launched, launched), (launched, graph))
    }
    seconds = {name: asdict(compute_spread(times.seconds)) for name, times in measured.items()}
    write_json(out / "captured.json", {"seconds": seconds, "ratios": ratios, "environment": environment()})

    lines = [f"{name}: {1000 * value['median']:.2f} ms" for name, value in seconds.items()]
    lines += [f"{name}: {v['median']:.3f} [{v['least']:.3f}, {v['most']:.3f}]" for name, v in ratios.items()]
    return "\n".join(lines)


def main(
    run: Path,
    round_: Annotated[
        list[str] | None, typer.Option("--round", help=f"Some of {', '.join(ROUNDS)}, or {GRAPHS} alone.")
    ] = None,
    device: Annotated[str, typer.Option()] = "cuda",
    layers: Annotated[int | None, typer.Option(help="Blocks that are kept.")] = None,
    steps: Annotated[int, typer.Option()] = 28,
    compile_decoder: Annotated[bool, typer.Option("--compile-decoder", help="In all rounds.")] = False,
    small: Annotated[bool, typer.Option(help="Pictures of 128 px, two at most: to try the script.")] = False,
) -> None:
    """Build the pair once, measure all rounds, and print their tables."""
    names = list(ROUNDS) if round_ is None else round_
    if unknown := set(names) - {*ROUNDS, GRAPHS}:
        raise SettingsError(f"round {unknown.pop()!r}: allowed are {', '.join(ROUNDS)} and {GRAPHS}")

    # Build the pair.
    where = torch.device(device)
    settings: dict[str, Any] = {"adapter": (), "layers": layers, "parts": (), "dtype": "bfloat16", "device": device}
    began = time.monotonic()
    pair = load_pair(None, None, geometry="sd35m", **settings)
    typer.echo(f"built in {time.monotonic() - began:.0f} s")
    ceilings = measure_ceilings(where, torch.bfloat16, **CEILINGS[where.type])

    if compile_decoder:
        quicken(pair.values(), compiled=False, channels_last=True)
        decoders = [getattr(p.vae, "joint_decoder", None) or p.vae.decoder for p in pair.values()]
        for decoder in decoders:
            for stage in decoder.up_blocks:
                stage.compile(fullgraph=True, dynamic=True)

    # Compiled rounds come last, so that the others run as they are.
    compiling, compiled = {}, False
    for name in [*(each for each in ROUNDS if each in names), *([GRAPHS] if GRAPHS in names else [])]:
        chosen = ROUNDS.get(name, Round(compiled=False, parts=SOME, whole_repeats=3, equal_pixels_only=True))
        if small:
            chosen = replace(chosen, size=chosen.size // 8, batch=min(2, chosen.batch), whole_repeats=1)

        if name == GRAPHS:
            typer.echo(f"\n{measure_captured(pair, chosen.size, run)}")
            for pipeline in pair.values():
                for block in blocks_of(pipeline.transformer):
                    block.compile(fullgraph=True, dynamic=True, mode="reduce-overhead")

        if chosen.compiled and not compiled:  # once: the rounds share the graphs
            quicken(pair.values(), compiled=True, channels_last=False)
            compiled = True
        began = time.monotonic()
        typer.echo(f"\n## {name}\n\n{measure_round(pair, chosen, run / name, ceilings, {'steps': steps})}")
        compiling[name] = {"seconds": time.monotonic() - began, "graphs so far": counters["stats"]["unique_graphs"]}
        write_json(run / "compiling.json", compiling)


if __name__ == "__main__":
    typer.run(main)
