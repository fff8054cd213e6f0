"""Measure a slim decoder beside the shipped full one: reconstruction, pictures from prompts, and time.

    davae train-autoencoder recipes/small_pair/slim_decoder.toml --out runs/slim_decoder
    python recipes/small_pair/measure_slim.py runs/slim_decoder runs/slim_measure

writes the second folder's result.json (copied into experiments/results/slim_decoder.json). Reconstruction is of all
held-out pictures; of prompts, both decoders get the same latents, and the full one's pictures are the target. KID is of
measure.py's prompts, seeds and settings.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline

from davae import assets, demo
from davae.cost.timing import compute_paired_ratios, compute_spread, measure_interleaved
from davae.data.sources import open_pictures
from davae.evaluation import reconstruction, tokenizers
from davae.evaluation.generation import repeat_captions, sample_many
from davae.method.metrics import EfficientNetLite0Features, psnr
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import with_autoencoder
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator

BATCH = 8
FULL, START, TRAINED = "full decoder", "slim decoder, start", "slim decoder, trained"


def kid_of(pipeline: DiffusionPipeline, folder: Path, count: int) -> dict[str, list[float]]:
    """Of measure.py's prompts, seeds and settings; the pictures go to `folder`."""
    real = open_pictures(assets.pictures(), size=demo.SIZE, limit=count)
    made = sample_many(pipeline, repeat_captions(real, count), folder, label=TRAINED, seed=0, **demo.SAMPLING)
    return demo.measure_kid({TRAINED: made}, real, 0)


@torch.no_grad()
def main(
    run: Path,
    out: Path,
    count: Annotated[int, typer.Option(help="Prompts of both decoders, evenly spread over all captions.")] = 32,
    kid_count: Annotated[int, typer.Option(help="Prompts for KID.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Of each timing.")] = 15,
) -> None:
    """Measure, and write the numbers."""
    pipeline = load_pipeline(assets.base_pipeline(), adapter=assets.upgrade())
    pipeline.set_progress_bar_config(disable=True)
    pipelines = {FULL: pipeline}
    for name, folder in ((START, "start"), (TRAINED, "autoencoder")):
        pipelines[name] = with_autoencoder(pipeline, load_autoencoder(run / folder))
    decoders = {name: each.vae for name, each in pipelines.items()}
    lpips = LPIPS.alex()
    heldout = open_pictures(assets.pictures(), size=demo.SIZE, split="heldout")
    ways = {name: tokenizers.make_tokenizer(vae) for name, vae in decoders.items()}
    quality = reconstruction.measure(heldout, ways, lpips=lpips)
    features = EfficientNetLite0Features()
    for name, value in reconstruction.measure_kid(heldout, ways, features, device=torch.device("cpu")).items():
        quality[name]["kid"] = value
    typer.echo(quality)

    prompts = repeat_captions(open_pictures(assets.pictures(), size=demo.SIZE, limit=count), count)
    names = ("num_inference_steps", "guidance_scale", "max_sequence_length")
    stock = dict(zip(names, demo.SAMPLING.values(), strict=True))
    distances = []
    for start in range(0, count, BATCH):
        told = {**stock, "generator": generator(0, "slim", start), "output_type": "latent"}
        latents = pipeline(prompts[start : start + BATCH], **told).images
        pictures = {name: vae.decode(vae.from_units(latents)).sample.clamp(-1, 1) for name, vae in decoders.items()}
        pair = pictures[TRAINED], pictures[FULL]
        distances.append(torch.stack([psnr(*pair), lpips(*pair).flatten()]))
    to_full = dict(zip(("psnr", "lpips"), torch.cat(distances, dim=1).mean(dim=1).tolist(), strict=True))
    typer.echo(to_full)

    one = latents[:1]
    runs = {name: lambda vae=decoders[name]: vae.decode(one) for name in (FULL, TRAINED)}
    timed = measure_interleaved(runs, torch.device("cpu"), repeats=repeats, warm_up=2)
    seconds = [timed[name].seconds for name in (FULL, TRAINED)]
    speed = {
        "milliseconds": [1000 * compute_spread(each).median for each in seconds],
        "ratio": dataclasses.asdict(compute_paired_ratios(*seconds)),
    }
    typer.echo(speed)
    kid = kid_of(pipelines[TRAINED], out / "pictures", kid_count)
    typer.echo(kid)

    found = {"kid": kid, "reconstruction_256": quality, "prompts_against_full": to_full, "decode_float32": speed}
    counts = {"heldout": len(heldout), "prompts": count, "prompts for KID": kid_count}
    write_json(out / "result.json", {**found, "counts": counts, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
