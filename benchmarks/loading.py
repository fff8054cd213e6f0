"""How fast pictures are loaded, beside how fast stage 1 uses them up; and JPEGs decoded small against decoded whole.

    OMP_NUM_THREADS=1 python benchmarks/loading.py                  # avatars and the shipped pair
    OMP_NUM_THREADS=1 python benchmarks/loading.py --pictures DIR   # yours; --size 1024 for their size

prints pictures a second: read and decoded from files that were just read, fitted, with one thread and with all of the
loader's; what the last steps of a short stage 1 on the shipped pair use; and the ratio. Then a synthetic JPEG
of 12 million pixels for a size of 512, whole and small (median of pairs, least and most).
"""

import io
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from davae.cost.timing import compute_paired_ratios, compute_spread, measure_interleaved
from davae.data.avatar_shards import write_avatar_shards
from davae.data.buckets import Bucket, fit
from davae.data.loading import WORKERS, in_threads
from davae.data.pictures import read_picture
from davae.data.sources import PictureSet, open_pictures
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder

COUNT = 256


def measure_loader(pictures: PictureSet, *, alone: bool) -> float:
    """Images a second that the loader decodes."""
    began = time.perf_counter()
    in_threads(pictures.decode, range(len(pictures)), alone=alone)
    return len(pictures) / (time.perf_counter() - began)


def measure_stage_one(batch_size: int, avatars: Path) -> float:
    """Pictures a second of stage 1 on the shipped pair, evaluation left out."""
    counts = {"limit": 64, "heldout_pictures": 1, "calibration_pictures": 16, "fit_pictures": 16}
    recipe = AutoencoderRecipe(steps=21, batch_size=batch_size, pictures=str(avatars), **counts)
    with tempfile.TemporaryDirectory() as folder:
        train_autoencoder(recipe, Path(folder))
        lines = [line for line in read_metrics(Path(folder, "metrics.jsonl")) if "loss" in line]
    first, last = lines[-2:]
    return (last["step"] - first["step"]) * batch_size / (last["seconds"] - first["seconds"])


def make_photograph() -> bytes:
    """A JPEG of 4000x3000 pixels, with structure of all sizes."""
    random = np.random.default_rng(0)
    layers = [
        Image.fromarray(random.integers(0, 256, (3000 // step, 4000 // step, 3), np.uint8)).resize((4000, 3000))
        for step in (4, 20, 100)
    ]
    stream = io.BytesIO()
    Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def main(
    pictures: Annotated[str | None, typer.Option(help="A source of pictures; avatars by default.")] = None,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Of stage 1.")] = 8,
    repeats: Annotated[int, typer.Option(help="Measurements of the JPEG.")] = 7,
) -> None:
    """Print the rates and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        avatars = write_avatar_shards(Path(folder, "avatars"), training=COUNT, held_out=16)
        images = open_pictures(pictures or avatars, size=size, limit=COUNT, captions=False).sound()
        rates = [measure_loader(images, alone=alone) for alone in (True, False)]
        typer.echo(f"loader: {rates[0]:.0f} pictures/s with one thread, {rates[1]:.0f} with {WORKERS}")
        used = measure_stage_one(batch_size, avatars)
    typer.echo(f"stage 1, batches of {batch_size}: {used:.1f} pictures/s; the loader has {rates[0] / used:.1f}x that")

    # A large JPEG, decoded whole and small.
    data, bucket = make_photograph(), Bucket(512, 512)
    runs = {
        "whole": lambda: fit(read_picture(data, "whole"), bucket),
        "small": lambda: fit(read_picture(data, "small", enough=2 * 512), bucket),
    }
    times = measure_interleaved(runs, torch.device("cpu"), repeats=repeats, warm_up=1)
    for name, measured in times.items():
        typer.echo(f"JPEG of 12 million pixels, {name}: {1000 * compute_spread(measured.seconds).median:.0f} ms")

    ratio = compute_paired_ratios(times["whole"].seconds, times["small"].seconds)
    typer.echo(f"{ratio.median:.2f}x [{ratio.least:.2f}, {ratio.most:.2f}]")
    error = (fit(read_picture(data, "a"), bucket).float() - runs["small"]().float()).square().mean()
    typer.echo(f"PSNR of small against whole: {10 * torch.log10(255**2 / error):.1f} dB")


if __name__ == "__main__":
    typer.run(main)
