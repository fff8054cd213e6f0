"""The levers of docs/speed.md, each against the plain form; interleaved.

    OMP_NUM_THREADS=1 python benchmarks/levers.py                            # the shipped upgrade
    OMP_NUM_THREADS=1 python benchmarks/levers.py --lever embeddings --lever channels-last
    python benchmarks/levers.py --pipeline runs/finetune/pipeline --device cuda --out levers.json
    python benchmarks/levers.py --geometry sd35m --device cuda --dtype bfloat16 --batch 4      # random weights

"int8" and "fp8" (the `quant` extra, a GPU) have weights and activations of eight bits in all blocks, compiled, against
the same compiled as it is.

prints for each the ratio of times, plain over lever: median of pairs, least and most.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from davae import assets
from davae.backbones import backbone_of
from davae.cost.bench import load_pair
from davae.cost.cases import Case, make_runs
from davae.cost.timing import Run, compute_paired_ratios, compute_spread, measure_interleaved
from davae.errors import SettingsError
from davae.method.slim_start import slimmed
from davae.pipelines.loading import load_pipeline
from davae.run.record import environment
from davae.run.storage import write_json
from davae.training.sharding import blocks_of

PROMPT = "a smiling man with a big beard"
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def with_part(case: Case, **parts: nn.Module) -> Case:
    """The same case of a pipeline with other parts."""
    pipeline = type(case.pipeline)(**{**case.pipeline.components, **parts})
    return dataclasses.replace(case, pipeline=pipeline)


def make_pair(case: Case, part: str, **parts: nn.Module) -> dict[str, Run]:
    """A part of the case, and that of the same pipeline with other parts."""
    return {"plain": make_runs(case, [part])[part], "lever": make_runs(with_part(case, **parts), [part])[part]}


def compile_step(case: Case) -> dict[str, Run]:
    """A guided step, every block compiled."""
    transformer = copy.deepcopy(case.pipeline.transformer)
    for block in transformer.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True)
    return make_pair(case, "step", transformer=transformer)


def eight_bits(case: Case, config: object) -> dict[str, Run]:
    """A guided step, every block compiled; the lever's linear layers are quantised by one of torchao's configs."""
    from torchao.quantization import quantize_  # an extra

    plain, quantised = (copy.deepcopy(case.pipeline.transformer) for _ in range(2))
    for block in blocks_of(quantised):
        quantize_(block, config)
    for block in [*blocks_of(plain), *blocks_of(quantised)]:
        block.compile(fullgraph=True)
    return make_pair(with_part(case, transformer=plain), "step", transformer=quantised)


def int8(case: Case) -> dict[str, Run]:
    """See `eight_bits`."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return eight_bits(case, Int8DynamicActivationInt8WeightConfig())


def fp8(case: Case) -> dict[str, Run]:
    """See `eight_bits`; a scale for each row."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return eight_bits(case, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def embeddings(case: Case) -> dict[str, Run]:
    """A whole image, with the embeddings of both prompts computed before."""
    pipeline = case.pipeline
    with torch.no_grad():
        embedded = pipeline.encode_prompt(
            PROMPT, None, None, negative_prompt="", max_sequence_length=case.prompt_tokens
        )
    named = dict(zip(EMBEDDINGS, embedded, strict=True))
    settings = {"num_inference_steps": case.steps, "max_sequence_length": case.prompt_tokens}
    settings |= {"height": case.size, "width": case.size}
    return {"plain": lambda: pipeline(PROMPT, **settings), "lever": lambda: pipeline(**named, **settings)}


def one_batch(case: Case) -> dict[str, Run]:
    """A guided step as one call of two rows, against two calls of one."""
    pipeline, backbone = case.pipeline, case.backbone
    with torch.no_grad():
        condition = backbone.condition(pipeline, [PROMPT, ""], max_sequence_length=case.prompt_tokens)
    dtype = pipeline.transformer.dtype
    channels, side = pipeline.vae.config.latent_channels, case.latent_side
    latents = torch.randn(2, channels, side, side).to(pipeline.device, dtype)
    sigma = torch.full((2,), 0.5, device=pipeline.device, dtype=dtype)

    def call(rows: slice) -> object:
        conditions = {name: tensor[rows] for name, tensor in condition.items()}
        return backbone.predict(pipeline.transformer, latents[rows], sigma[rows], conditions)

    return {"plain": lambda: (call(slice(1)), call(slice(1, 2))), "lever": lambda: call(slice(2))}


def channels_last(case: Case) -> dict[str, Run]:
    """Decoding, the autoencoder's weights in channels last."""
    vae = copy.deepcopy(case.pipeline.vae).to(memory_format=torch.channels_last)
    return make_pair(case, "decode", vae=vae)


def compiled_decode(case: Case) -> dict[str, Run]:
    """Decoding, the decoder's outermost stage compiled."""
    vae = copy.deepcopy(case.pipeline.vae)
    vae.joint_decoder.up_blocks[-1].compile(fullgraph=True)
    return make_pair(case, "decode", vae=vae)


def slim_decoder(case: Case) -> dict[str, Run]:
    """Decoding, by half the widths and one residual block to a stage; its weights are those of no training."""
    widths = case.pipeline.vae.config.base_config["block_out_channels"]
    vae = slimmed(case.pipeline.vae, [width // 2 for width in widths], [0] * len(widths))
    return make_pair(case, "decode", vae=vae)


LEVERS: dict[str, Callable[[Case], dict[str, Run]]] = {
    "compile": compile_step,
    "embeddings": embeddings,
    "one-batch": one_batch,
    "channels-last": channels_last,
    "compile-decode": compiled_decode,
    "slim-decoder": slim_decoder,
}
QUANTISED: dict[str, Callable[[Case], dict[str, Run]]] = {"int8": int8, "fp8": fp8}
"""These only if they are named."""


def main(
    pipeline: Annotated[
        str | None, typer.Option(help="A Stable Diffusion 3, upgraded or not; else the shipped one.")
    ] = None,
    geometry: Annotated[str | None, typer.Option(help="Instead: random weights of this size, upgraded.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks that a --geometry keeps.")] = None,
    size: Annotated[int | None, typer.Option(help="Of the pictures; the pipeline's default.")] = None,
    batch: Annotated[int, typer.Option()] = 1,
    lever: Annotated[
        list[str] | None,
        typer.Option(help=f"Some of {', '.join(LEVERS)}; these if none. Also {', '.join(QUANTISED)}."),
    ] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    steps: Annotated[int, typer.Option()] = 16,
    repeats: Annotated[int, typer.Option()] = 7,
    out: Annotated[Path | None, typer.Option(help="JSON of all ratios.")] = None,
) -> None:
    """Measure each, print and, if asked, write."""
    settings = {"dtype": getattr(torch, dtype), "device": device}
    if geometry is not None:
        source: dict[str, Any] = {"adapter": (), "layers": layers, "parts": (), "dtype": dtype, "device": device}
        loaded = next(iter(load_pair(None, None, geometry=geometry, **source).values()))
    elif pipeline is None:
        loaded = load_pipeline(assets.base_pipeline(), adapter=assets.upgrade(), **settings)
    else:
        loaded = load_pipeline(pipeline, **settings)
    loaded.set_progress_bar_config(disable=True)

    side = backbone_of(loaded.transformer).picture_side(loaded, size)
    shipped = pipeline is None and geometry is None
    case = Case("levers", loaded, side, batch=batch, steps=steps, prompt_tokens=20 if shipped else 256)

    # Each lever against its plain form, interleaved.
    values = {}
    for name in lever or LEVERS:
        if name not in LEVERS | QUANTISED:
            raise SettingsError(f"lever {name!r}: allowed are {', '.join(LEVERS | QUANTISED)}")
        times = measure_interleaved((LEVERS | QUANTISED)[name](case), torch.device(device), repeats=repeats, warm_up=2)
        ratio = compute_paired_ratios(times["plain"].seconds, times["lever"].seconds)
        typer.echo(f"{name}: {ratio.median:.3f}x [{ratio.least:.3f}, {ratio.most:.3f}]")
        cold = times["lever"].cold
        milliseconds = {kind: 1000 * compute_spread(measured.seconds).median for kind, measured in times.items()}
        values[name] = {**dataclasses.asdict(ratio), "cold_seconds": cold, "milliseconds": milliseconds}

    if out is not None:
        counts = {"repeats": repeats, "steps": steps, "size": side, "batch": batch}
        write_json(out, {"values": values, "counts": counts, "device": device, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
