"""The shipped upgrade with weights of eight bits: error of the velocity, of images, and bytes.

    python benchmarks/quantised.py experiments/results/quantised.json      # needs the `quant` extra

Velocities are of 16 captions at noise levels from 0.05 to 0.95, against float32; root mean square of the error over
the root mean square of the velocity, for base and detail channels. "bfloat16" is the layers' own precision.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from davae import assets
from davae.backbones import backbone_of
from davae.data.avatar_shards import write_avatar_shards
from davae.data.sources import open_pictures
from davae.pipelines.loading import load_pipeline
from davae.run.record import environment
from davae.run.storage import write_json

COUNT, PROMPT_TOKENS, SEED = 16, 20, 0


def eight_bits(transformer: SD3Transformer2DModel, config: object, *, ports: bool) -> SD3Transformer2DModel:
    """A copy in bfloat16 whose linear layers have weights of eight bits, the ports' too if asked."""
    from torchao.quantization import quantize_

    copied = nn.Module.to(copy.deepcopy(transformer), dtype=torch.bfloat16)
    kept = backbone_of(transformer).ports

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (ports or name not in (kept.input, kept.output))

    quantize_(copied, config, chosen)
    return copied


def weight_bytes(transformer: SD3Transformer2DModel) -> int:
    """Bytes of all weights, of quantised ones those of their parts."""
    total = 0
    for parameter in transformer.parameters():
        parts = getattr(parameter, "__tensor_flatten__", None)
        names = parts()[0] if parts is not None and type(parameter) is not nn.Parameter else []
        total += sum(getattr(parameter, name).nbytes for name in names) if names else parameter.nbytes
    return total


@torch.no_grad()
def main(out: Path) -> None:
    """Measure, print and write."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # an extra; other scripts need none

    pipeline = load_pipeline(assets.base_pipeline(), adapter=assets.upgrade())
    whole, channels = pipeline.transformer, pipeline.vae.config.base_channels
    backbone = backbone_of(whole)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_avatar_shards(Path(folder), training=0, held_out=COUNT)
        pictures = open_pictures(shards, size=256, split="heldout")
        images = pictures.batch(range(COUNT))
    condition = backbone.condition(pipeline, pictures.captions, max_sequence_length=PROMPT_TOKENS)
    latents = pipeline.vae.standardise(pipeline.vae.encode(images).latent_dist.mode())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED))
    sigma = torch.linspace(0.05, 0.95, COUNT)
    noisy = torch.lerp(latents, noise, sigma[:, None, None, None])

    def velocity(transformer: SD3Transformer2DModel) -> Tensor:
        dtype = transformer.dtype
        told = {name: tensor.to(dtype) for name, tensor in condition.items()}
        return backbone.velocity(transformer, noisy.to(dtype), sigma.to(dtype), told).float()

    ways: dict[str, Callable[[], SD3Transformer2DModel]] = {
        "bfloat16": lambda: nn.Module.to(copy.deepcopy(whole), dtype=torch.bfloat16),
        "int8": lambda: eight_bits(whole, Int8WeightOnlyConfig(), ports=False),
        "int8, output port too": lambda: eight_bits(whole, Int8WeightOnlyConfig(), ports=True),
        "fp8": lambda: eight_bits(whole, Float8WeightOnlyConfig(), ports=False),
        "fp8, output port too": lambda: eight_bits(whole, Float8WeightOnlyConfig(), ports=True),
    }
    exact, values = velocity(whole), {}
    for name, make in ways.items():
        transformer = make()
        error = velocity(transformer) - exact
        halves = {"base": slice(channels), "detail": slice(channels, None)}
        values[name] = {
            f"{half} error": (error[:, part].square().mean() / exact[:, part].square().mean()).sqrt().item()
            for half, part in halves.items()
        } | {"bytes": weight_bytes(transformer)}
        typer.echo(f"{name}: {values[name]}")
    counts = {"captions": COUNT}
    write_json(out, {"values": values, "counts": counts, "seed": SEED, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
