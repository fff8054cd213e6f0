"""Measure the shipped pair: reconstruction of all held-out images, KID of many prompts, speed.

    python recipes/small_pair/measure.py runs/measure --count 1000

writes RUN/result.json (copied into experiments/results/) and RUN/samples.png, a grid of 32 base samples. Images that
are there already are not generated again, so two processes may first generate for one pipeline each with --only.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from davae import assets, demo
from davae.data.pictures import write_png
from davae.data.sources import open_pictures
from davae.evaluation import generation, reconstruction, tokenizers
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.run.record import environment
from davae.run.storage import write_json

SEED = 0
SAMPLING = {"seed": SEED, **demo.SAMPLING}
GRID = (4, 8)


def main(
    run: Path,
    count: Annotated[int, typer.Option(help="Prompts, evenly spread over all captions.")] = 1000,
    only: Annotated[str | None, typer.Option(help="Generate with this pipeline and leave.")] = None,
) -> None:
    """Measure, and write the numbers."""
    pipelines = {
        demo.BASE: lambda: load_pipeline(assets.base_pipeline()),
        demo.SHIPPED: lambda: load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()),
    }

    # Generate with each pipeline; the base also at twice its size.
    real = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    prompts = generation.repeat_captions(real, count)
    made = {}
    for name, load in {**pipelines, demo.NATIVE: pipelines[demo.BASE]}.items():
        if only in (None, name):
            settings = {**SAMPLING, "size": demo.SIZE} if name == demo.NATIVE else SAMPLING
            made[name] = generation.sample_many(load(), prompts, run / name, label=name, **settings)
    if only:
        return

    # A grid of the base's images, evenly spread.
    height, width = GRID
    shown = [made[demo.BASE][count * position // (height * width)] for position in range(height * width)]
    rows = [torch.cat(shown[start : start + width], dim=2) for start in range(0, len(shown), width)]
    write_png(run / "samples.png", torch.cat(rows, dim=1))
    made[demo.ENLARGED] = [demo.enlarge(image) for image in made.pop(demo.BASE)]

    # Reconstruct the held-out images.
    heldout = open_pictures(assets.pictures(), size=demo.SIZE, split="heldout")
    vae = load_base_vae(str(assets.base_pipeline()))
    autoencoder = load_autoencoder(assets.upgrade(), base=vae)
    ways = {
        demo.ENLARGED: tokenizers.enlarge_base(vae, autoencoder),
        demo.SHIPPED: tokenizers.make_tokenizer(autoencoder),
        demo.FULL: tokenizers.make_tokenizer(vae),
    }
    small = open_pictures(assets.pictures(), size=demo.SIZE // 2, split="heldout")
    lpips = LPIPS.alex()

    kid = demo.measure_kid(made, real, SEED)
    speed = demo.measure_speed({name: load() for name, load in pipelines.items()}, demo.PLANS["short"], SEED)
    result = {
        "reconstruction_256": reconstruction.measure(heldout, ways, lpips=lpips),
        "base_reconstruction_128": reconstruction.measure(small, {demo.BASE: lambda x: vae(x).sample}, lpips=lpips),
        "kid": kid,
        "kid_ratio": kid[demo.SHIPPED][0] / kid[demo.ENLARGED][0],
        "speed": speed,
        "counts": {"heldout": len(heldout), "generated": count, "real": len(real)},
        "sampling": SAMPLING,
    }
    write_json(run / "result.json", {**result, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
