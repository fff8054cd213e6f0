"""Measure the upgrade beside its rivals of equal training: a latent upscaler, and a native 256 px model.

    python recipes/small_pair/measure_rivals.py RUN NATIVE_PIPELINE UPSCALER_RUN/result.json SLIM_RUN/autoencoder

samples the native pipeline (train_base_transformer.py with native_256.toml) with measure.py's prompts, seeds and
settings, times it against the upgrade with its own and with the slim decoder (slim_decoder.toml) at batch sizes 1 and
16, whole and in parts, in turns, and writes RUN/result.json (copied into experiments/results/rivals.json). All decode
one image at a time (`enable_slicing`), which is faster here than a batch at once. Images that are there already are
not generated again; without the upscaler's result the script generates them and leaves.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from davae import assets, demo
from davae.backbones import sd3
from davae.cost.cases import Case, make_runs
from davae.cost.timing import measure_interleaved
from davae.data.sources import open_pictures
from davae.evaluation import generation
from davae.pipelines.adapter import find_target_layers
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import with_autoencoder
from davae.run.record import environment, read_metrics
from davae.run.storage import write_json

BATCHES = (1, 16)
PARTS = ("step", "decode", "whole")
SLIM = "shipped upgrade, slim decoder"
UPGRADE_STEPS = 22_000
"""Of stage2.toml."""
T5_LENGTHS = {12: 0.9, 64: 0.07, 256: 0.03}
"""How often train_base_transformer.py pads captions to which length."""


def count_training_flops(upgraded: DiffusionPipeline, native: DiffusionPipeline) -> dict[str, float]:
    """Operations of one image in a training step, forward and backward, attention included.

    The upgrade's are stage2.toml's: the image stream's layers and both ports are trained, captions are encoded
    once. The native run trains all of it, text encoders included.
    """
    upgraded.transformer.train().requires_grad_(False)
    layers = find_target_layers(upgraded.transformer, demo.SMALL_PAIR_TARGETS)
    for name in (*layers, sd3.BACKBONE.ports.input, sd3.BACKBONE.ports.output):
        upgraded.transformer.get_submodule(name).requires_grad_(True)
    parts = (native.transformer, native.text_encoder, native.text_encoder_2, native.text_encoder_3)
    for part in parts:
        part.train().requires_grad_(True)

    def count(pipeline: DiffusionPipeline, tokens: int, *, text: bool) -> int:
        side = demo.SIZE // pipeline.vae_scale_factor
        latents = torch.randn(1, pipeline.transformer.config.in_channels, side, side)
        with FlopCounterMode(display=False) as whole, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted
            with torch.set_grad_enabled(text), FlopCounterMode(display=False) as encoding:
                condition = sd3.condition(pipeline, ["red apple"], max_sequence_length=tokens)
            sd3.velocity(pipeline.transformer, latents, torch.tensor([0.5]), condition).square().mean().backward()
        return whole.get_total_flops() - (0 if text else encoding.get_total_flops())

    flops = {tokens: count(native, tokens, text=True) for tokens in T5_LENGTHS}
    mean = sum(share * flops[tokens] for tokens, share in T5_LENGTHS.items())
    return {"upgrade": count(upgraded, demo.PROMPT_TOKENS, text=False), "native": mean}


def measure_times(pipelines: dict[str, DiffusionPipeline], batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds per image of a guided step, decoding and the whole, interleaved after one warm-up."""
    settings = {"batch": batch, "steps": demo.SAMPLING["steps"], "prompt_tokens": demo.PROMPT_TOKENS}
    runs = {}
    for name, pipeline in pipelines.items():
        for part, run in make_runs(Case(name, pipeline, demo.SIZE, **settings), PARTS).items():
            runs[f"{name}: {part}"] = run
    measured = measure_interleaved(runs, torch.device("cpu"), repeats=repeats, warm_up=1)

    times: dict[str, dict[str, float]] = {name: {} for name in pipelines}
    for name in pipelines:
        for part in PARTS:
            times[name][part] = statistics.median(measured[f"{name}: {part}"].seconds) / batch
    return times


def main(
    run: Path,
    native: Path,
    upscaler: Path,
    slim: Path,
    count: Annotated[int, typer.Option(help="Prompts, evenly spread over all captions.")] = 1000,
    training: Annotated[Path | None, typer.Option(help="The native model's run, for its steps and loss.")] = None,
    repeats: int = 5,
) -> None:
    """Sample, measure, time."""
    real = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    prompts = generation.repeat_captions(real, count)
    pipelines = {
        demo.SHIPPED: load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()),
        demo.NATIVE: load_pipeline(native),
    }
    pipelines[SLIM] = with_autoencoder(pipelines[demo.SHIPPED], load_autoencoder(slim))
    for pipeline in pipelines.values():
        pipeline.vae.enable_slicing()

    # The native model's images; the others are measure.py's.
    images = generation.sample_many(
        pipelines[demo.NATIVE], prompts, run / "native", label="native", size=demo.SIZE, seed=0, **demo.SAMPLING
    )
    if not upscaler.is_file():
        raise typer.Exit()

    trained = [line for line in read_metrics(training / "metrics.jsonl") if "loss" in line] if training else []
    facts: dict[str, Any] = {
        "kid": demo.measure_kid({"native 256 px model": images}, real, 0),
        "seconds_per_picture": {str(batch): measure_times(pipelines, batch, repeats) for batch in BATCHES},
        # After all else: it leaves both in training mode.
        "training_flops": count_training_flops(pipelines[demo.SHIPPED], pipelines[demo.NATIVE]),
        "upgrade_steps": UPGRADE_STEPS,
        "native_steps": trained[-1]["step"] + 1 if trained else None,
        "upscaler": json.loads(upscaler.read_bytes()),
        "counts": {"generated": count, "real": len(real)},
        "sampling": {"seed": 0, **demo.SAMPLING},
    }
    write_json(run / "result.json", {**facts, "environment": environment()})
    typer.echo(facts)


if __name__ == "__main__":
    typer.run(main)
