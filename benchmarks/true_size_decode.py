"""Decoding at Stable Diffusion 3.5 Medium's true size, random weights, in bfloat16: times, memory, tiles, kernels.

    python benchmarks/true_size_decode.py runs/decode.json                          # a GPU; about a minute
    python benchmarks/true_size_decode.py runs/try.json --device cpu --size 64      # tries the script

At each size interleaved: the upgrade's decoder as it is and with channels last; the base's, at as many pixels; a slim
decoder; the upgrade's compiled; at sizes above `--tile` also its tiles. Memory is the peak
that a decode adds. Tiles and the whole are compared in the pictures' 255 steps, beside the whole in float32.
"""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from davae import AutoencoderDA, assets
from davae.cost.timing import Run, compute_paired_ratios, compute_spread, measure_interleaved
from davae.cost.workload import count_decode_flops
from davae.method.slim_start import slimmed
from davae.models.base_autoencoders import downsample_factor
from davae.run.record import environment
from davae.run.storage import write_json

SLIM_WIDTHS, SLIM_DEPTHS = (64, 128, 256, 256), (0, 0, 0, 0)
Vae = AutoencoderDA | AutoencoderKL


def to_channels_last(vae: Vae) -> Vae:
    """A copy with channels last."""
    return nn.Module.to(copy.deepcopy(vae), memory_format=torch.channels_last)


def compile_stages(vae: AutoencoderDA) -> AutoencoderDA:
    """A copy with channels last whose decoder's stages are compiled one by one."""
    made = to_channels_last(vae)
    for stage in made.joint_decoder.up_blocks:
        stage.compile(fullgraph=True, dynamic=True)
    return made


def enable_tiles(vae: AutoencoderDA, storage: str, tile: int) -> AutoencoderDA:
    """A copy with channels last that decodes over tiles."""
    made = to_channels_last(vae)
    made.enable_tiling()
    made.tile_sample_size, made.tile_storage = tile, storage
    return made


def find_longest_kernels(run: Run, device: torch.device) -> dict[str, float]:
    """Milliseconds of the twelve kernels, or operators on a CPU, that take the most of a run."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with torch.no_grad(), profile(activities=kinds) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    took = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in profiled.key_averages()}
    return {name[:150]: took[name] / 1000 for name in sorted(took, key=took.__getitem__, reverse=True)[:12]}


def search_convolutions(run: Run) -> Run:
    """The same with cuDNN's search for the fastest convolutions."""

    def searched() -> object:
        torch.backends.cudnn.benchmark = True
        try:
            return run()
        finally:
            torch.backends.cudnn.benchmark = False

    return searched


def compare(picture: Tensor, other: Tensor) -> dict[str, float]:
    """Largest and mean difference of two pictures in [-1, 1], in their 255 steps."""
    apart = 127.5 * (picture.float() - other.float()).abs()
    return {"most": apart.max().item(), "mean": apart.mean().item()}


def measure_size(upgrade: AutoencoderDA, base: AutoencoderKL, size: int, *, tile: int) -> dict[str, Any]:
    """All numbers at one size."""
    device, dtype = upgrade.device, upgrade.dtype
    slim = nn.Module.to(slimmed(upgrade, SLIM_WIDTHS, SLIM_DEPTHS), device=device, dtype=dtype)
    ways: dict[str, Vae] = {
        "upgrade": upgrade,
        "upgrade, channels last": to_channels_last(upgrade),
        "base, channels last": to_channels_last(base),
        "slim, channels last": to_channels_last(slim),
        "upgrade, channels last, compiled": compile_stages(upgrade),
    }
    if size > tile:
        ways["tiles, kept in main memory"] = enable_tiles(upgrade, "cpu", tile)
        ways["tiles, kept on the device"] = enable_tiles(upgrade, str(device), tile)

    # The same noise for all decoders of one shape.
    inputs = {}
    for name, vae in ways.items():
        side = size // downsample_factor(vae.config)
        random = torch.Generator().manual_seed(0)
        inputs[name] = torch.randn(1, vae.config.latent_channels, side, side, generator=random).to(device, dtype)
    runs = {name: lambda name=name, vae=vae: vae.decode(inputs[name]).sample for name, vae in ways.items()}

    # Where the time goes.
    kernels = {}
    for name in ("upgrade", "upgrade, channels last", "slim, channels last", "upgrade, channels last, compiled"):
        with torch.no_grad():
            runs[name]()
        kernels[f"kernels, {name}"] = find_longest_kernels(runs[name], device)
        typer.echo(f"{size} px, {name}: {kernels[f'kernels, {name}']}")
    if device.type == "cuda":
        name = "upgrade, channels last, cuDNN's search"
        ways[name], inputs[name] = ways["upgrade, channels last"], inputs["upgrade, channels last"]
        runs[name] = search_convolutions(runs["upgrade, channels last"])

    # Times, interleaved.
    times = measure_interleaved(runs, device, repeats=7, warm_up=2)
    plain = times["upgrade, channels last"].seconds
    values: dict[str, Any] = {
        name: {
            "seconds": asdict(compute_spread(measured.seconds)),
            "against channels last": asdict(compute_paired_ratios(measured.seconds, plain)),
            "added_bytes": measured.added_bytes,
            "cold_seconds": measured.cold,
            "flops": count_decode_flops(ways[name], inputs[name].shape[-1]),
        }
        for name, measured in times.items()
    }

    values |= kernels
    if size > tile:
        values |= compare_tiles(upgrade, runs, inputs["upgrade"], tile=tile)
    return values


@torch.no_grad()
def compare_tiles(upgrade: AutoencoderDA, runs: dict[str, Run], latents: Tensor, *, tile: int) -> dict[str, Any]:
    """Tiles against the whole in both precisions, and the whole against the whole in float32."""
    whole, pieces = runs["upgrade, channels last"](), runs["tiles, kept on the device"]()
    exact = nn.Module.to(copy.deepcopy(upgrade), dtype=torch.float32)
    precise = exact.decode(latents.float()).sample
    exact.enable_tiling()
    exact.tile_sample_size, exact.tile_storage = tile, str(upgrade.device)
    precise_pieces = exact.decode(latents.float()).sample

    return {
        "tiles and whole, 255ths": compare(pieces, whole),
        "tiles and whole in float32, 255ths": compare(precise_pieces, precise),
        "whole and float32, 255ths": compare(whole, precise),
    }


def main(
    out: Path,
    device: Annotated[str, typer.Option()] = "cuda",
    size: Annotated[list[int] | None, typer.Option(help="1024 and 2048 if none is given. Repeatable.")] = None,
    tile: Annotated[int, typer.Option(help="Side of the tiles in pixels.")] = 512,
) -> None:
    """Measure, print and write."""
    folder, where = assets.geometry() / "stable-diffusion-3.5-medium", torch.device(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")).eval()
        upgrade = AutoencoderDA.from_base(base, detail_channels=base.config.latent_channels).eval()
    for vae in (base, upgrade):
        nn.Module.to(vae, device=where, dtype=torch.bfloat16)

    values = {}
    for each in size or [1024, 2048]:
        values[f"{each} px"] = measure_size(upgrade, base, each, tile=tile)
        for name, value in values[f"{each} px"].items():
            if "seconds" not in value:
                continue
            seconds, ratio = value["seconds"], value["against channels last"]
            rate, added = value["flops"] / seconds["median"] / 1e12, (value["added_bytes"] or 0) / 2**30
            typer.echo(
                f"{each} px, {name}: {1000 * seconds['median']:.1f} ms, {ratio['median']:.3f}x "
                f"[{ratio['least']:.3f}, {ratio['most']:.3f}] of channels last, adds {added:.2f} GiB, "
                f"{rate:.0f} TFLOP/s, first call {value['cold_seconds']:.1f} s"
            )
        write_json(out, {"values": values, "tile": tile, "device": device, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
