"""Measure the upgrade beside its rivals of equal training: a latent upscaler, and a native 256 px model.

    python recipes/small_pair/measure_rivals.py RUN NATIVE_PIPELINE UPSCALER_RUN/result.json --count 1000

samples the native pipeline (train_base_transformer.py with native_256.toml) with measure.py's prompts, seeds and
settings, times it against the upgrade at batch sizes 1 and 16, in turns, and writes RUN/result.json (copied into
experiments/results/rivals.json). Pictures that are there already are not made again; without the upscaler's result it
makes them and leaves.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import DiffusionPipeline
from rich.progress import track

from davae import assets, demo
from davae.data.sources import open_pictures
from davae.evaluation import generation
from davae.record import environment, read_metrics
from davae.storage import write_json
from davae.upgrade import load_pipeline

SAMPLING: dict[str, Any] = {"seed": 0, "steps": 20, "guidance_scale": 2.5, "prompt_tokens": demo.PROMPT_TOKENS}
BATCHES = (1, 16)


def times(pipelines: dict[str, DiffusionPipeline], batch: int, repeats: int) -> dict[str, float]:
    """Median seconds per picture of each pipeline, in turns, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in track(range(repeats + 1), f"timing, batches of {batch}"):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            generation.sample(pipeline, ["red apple"] * batch, size=demo.SIZE, **SAMPLING)
            if repeat:
                seconds[name].append((time.perf_counter() - start) / batch)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(
    run: Path,
    native: Path,
    upscaler: Path,
    count: Annotated[int, typer.Option(help="Prompts, evenly spread over all captions.")] = 1000,
    training: Annotated[Path | None, typer.Option(help="The native model's run, for its steps and loss.")] = None,
    repeats: int = 5,
) -> None:
    """Sample, measure, time."""
    real = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    prompts = generation.evaluation_prompts(real, count)
    pipelines = {
        demo.SHIPPED: load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()),
        demo.NATIVE: load_pipeline(native),
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    made = generation.sample_many(
        pipelines[demo.NATIVE], prompts, run / "native", label="native", size=demo.SIZE, **SAMPLING
    )
    if not upscaler.is_file():
        raise typer.Exit()
    trained = [line for line in read_metrics(training / "metrics.jsonl") if "loss" in line] if training else []
    facts: dict[str, Any] = {
        "kid": demo.measure_kid({"native 256 px model": made}, real, 0),
        "seconds_per_picture": {str(batch): times(pipelines, batch, repeats) for batch in BATCHES},
        "native_steps": trained[-1]["step"] + 1 if trained else None,
        "upscaler": json.loads(upscaler.read_bytes()),
        "counts": {"generated": count, "real": len(real)},
        "sampling": SAMPLING,
    }
    write_json(run / "result.json", {**facts, "environment": environment()})
    typer.echo(facts)


if __name__ == "__main__":
    typer.run(main)
