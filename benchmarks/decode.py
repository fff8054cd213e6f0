"""Decoding in float32, as the weights lie, against bfloat16 with channels last; or a slim decoder against the full one.

    OMP_NUM_THREADS=1 python benchmarks/decode.py                  # the shipped upgrade's decoder, 256 px
    OMP_NUM_THREADS=1 python benchmarks/decode.py --true-size      # SD3.5-Medium's geometry upgraded, 512 px
    OMP_NUM_THREADS=1 python benchmarks/decode.py --widths 16,32,48,64 --depths 0,0,0,0
    OMP_NUM_THREADS=1 python benchmarks/decode.py --true-size --size 256 --widths 64,128,256,256 --depths 0,0,0,0

Interleaved; prints milliseconds (median of 7) and the ratio (median of pairs, least and most). Slim and full decoder
both run in bfloat16 with channels last, and the counted ratio stands beside the measured one.
"""

import copy
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL
from torch import nn

from davae import AutoencoderDA, assets
from davae.cost.timing import compute_paired_ratios, compute_spread, measure_interleaved
from davae.cost.workload import count_decode_flops
from davae.method.slim_start import slimmed
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae


def autoencoder(*, true_size: bool) -> AutoencoderDA:
    """The shipped one; or SD3.5-Medium's, upgraded, with random weights."""
    if not true_size:
        return load_autoencoder(assets.upgrade(), base=load_base_vae(str(assets.base_pipeline())))
    folder = assets.geometry() / "stable-diffusion-3.5-medium"
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
    return AutoencoderDA.from_base(vae, detail_channels=vae.config.latent_channels).eval()


def to_half(plain: AutoencoderDA) -> AutoencoderDA:
    """A copy in bfloat16, channels last."""
    return nn.Module.to(copy.deepcopy(plain), dtype=torch.bfloat16, memory_format=torch.channels_last)


def main(
    true_size: Annotated[bool, typer.Option(help="SD3.5-Medium's geometry instead of the shipped pair.")] = False,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.")] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each.")] = 7,
    widths: Annotated[str | None, typer.Option(help="Widths of a slim decoder's stages, the outermost first.")] = None,
    depths: Annotated[str | None, typer.Option(help="Depths of its stages.")] = None,
) -> None:
    """Print both times and their ratio."""
    plain = autoencoder(true_size=true_size)
    half = to_half(plain)
    side = (size or (512 if true_size else 256)) // plain.downsample_factor
    latents = torch.randn(1, plain.config.latent_channels, side, side)
    last = latents.to(torch.bfloat16, memory_format=torch.channels_last)

    # Both precisions, or both decoders in the lower one.
    if widths is None and depths is None:
        runs = {"float32": lambda: plain.decode(latents), "bfloat16, channels last": lambda: half.decode(last)}
    else:
        stages = ([int(number) for number in each.split(",")] if each else () for each in (widths, depths))
        slim = slimmed(plain, *stages)
        thin = to_half(slim)
        runs = {"full decoder": lambda: half.decode(last), "slim decoder": lambda: thin.decode(last)}
        typer.echo(f"{count_decode_flops(plain, side) / count_decode_flops(slim, side):.2f}x fewer operations, counted")

    times = measure_interleaved(runs, torch.device("cpu"), repeats=repeats, warm_up=1)
    for name, measured in times.items():
        typer.echo(f"{name}: {1000 * compute_spread(measured.seconds).median:.1f} ms")
    ratio = compute_paired_ratios(*(measured.seconds for measured in times.values()))
    typer.echo(f"{ratio.median:.2f}x [{ratio.least:.2f}, {ratio.most:.2f}]")


if __name__ == "__main__":
    typer.run(main)
