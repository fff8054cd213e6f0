r"""The value of detail latents: reconstructions with them as they are, another image's, random, zero, guessed.

    python recipes/small_pair/measure_detail.py runs/detail "another one"=runs/stage1/autoencoder

measures the shipped autoencoder and the named ones on the held-out images, beside base + bicubic, and writes
RUN/result.json (copied into experiments/results/detail.json). Cases that have numbers are skipped. The paper's
Fig. S2: rFID 0.47, with random detail 8.25, with zeroed detail 2.93.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from davae import assets, demo
from davae.data.pictures import to_bytes
from davae.data.sources import PictureSet, open_pictures
from davae.evaluation.generation import extract_features
from davae.evaluation.tokenizers import enlarge_base
from davae.method.metrics import EfficientNetLite0Features, kid, psnr, ssim
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator

SHIPPED = assets.upgrade()
Change = Callable[[Tensor, Tensor], Tensor]
"""Base and detail latents [B, C or D, h, w] of some pictures, in units -> what stands for the detail latents."""


def changes(autoencoder: AutoencoderDA) -> dict[str, Change]:
    """What replaces the detail latents; in units each of their channels has mean 0 and deviation 1."""
    zero = -(autoencoder.detail_mean / autoencoder.detail_std).view(1, -1, 1, 1)
    weight = guess(autoencoder)
    return {
        "as they are": lambda base, detail: detail,
        "their mean": lambda base, detail: torch.zeros_like(detail),
        "zero before standardisation": lambda base, detail: zero.expand_as(detail),
        "guessed from the base": lambda base, detail: F.conv2d(base, weight[:, :-1, None, None], weight[:, -1]),
        "random": lambda base, detail: torch.randn(detail.shape, generator=generator(0, "random detail")),
        "of another picture": lambda base, detail: detail.roll(1, dims=0),
    }


def guess(autoencoder: AutoencoderDA) -> Tensor:
    """Weight and bias, [D, C + 1], of base latents -> detail latents by least squares on training pictures."""
    pictures = open_pictures(assets.pictures(), size=demo.SIZE, split="train", limit=96)
    both = latents(autoencoder, pictures).transpose(0, 1).flatten(1).double()
    base, detail = both[: autoencoder.config.base_channels], both[autoencoder.config.base_channels :]
    source = torch.cat([base, torch.ones_like(base[:1])])
    return torch.linalg.lstsq(source.T, detail.T).solution.T.float()


def latents(autoencoder: AutoencoderDA, pictures: PictureSet) -> Tensor:
    """Of all pictures in units, [N, C + D, h, w]."""
    batches = [pictures.batch(indices.tolist()) for indices in torch.arange(len(pictures)).split(8)]
    return torch.cat([autoencoder.to_units(autoencoder.encode(batch).latent_dist.mode()) for batch in batches])


def numbers(made: Tensor, pictures: PictureSet, real: Tensor, lpips: LPIPS) -> dict[str, float]:
    """PSNR, SSIM and LPIPS averaged over the pictures, and KID x 1000 against these pictures."""
    rows = []
    for indices in torch.arange(len(pictures)).split(8):
        image = pictures.batch(indices.tolist())
        rows.append(torch.stack([metric(made[indices], image) for metric in (psnr, ssim, lpips)]))
    values = torch.cat(rows, dim=1).mean(dim=1).tolist()
    distance = 1000 * kid(extract_features(list(to_bytes(made)), side=demo.SIZE), real)
    return dict(zip(("psnr", "ssim", "lpips", "kid"), [*values, distance], strict=True))


@torch.no_grad()
def measure(path: Path, folder: Path, pictures: PictureSet, real: Tensor, lpips: LPIPS) -> dict[str, Any]:
    """The numbers of one autoencoder for each change of its detail latents; those in `path` are not repeated."""
    cases: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    autoencoder = load_autoencoder(folder, base=load_base_vae(str(assets.base_pipeline())))
    base, detail = autoencoder.split(latents(autoencoder, pictures))
    for name, change in changes(autoencoder).items():
        if name not in cases:
            changed = autoencoder.from_units(torch.cat([base, change(base, detail)], dim=1))
            made = torch.cat([autoencoder.decode(part).sample.clamp(-1, 1) for part in changed.split(8)])
            cases[name] = numbers(made, pictures, real, lpips)
            write_json(path, cases)
            typer.echo(f"{name}: {cases[name]}")
    return cases


@torch.no_grad()
def measure_base(pictures: PictureSet, real: Tensor, lpips: LPIPS) -> dict[str, dict[str, float]]:
    """The numbers of the base autoencoder at half the size, enlarged with bicubic."""
    vae = load_base_vae(str(assets.base_pipeline()))
    way = enlarge_base(vae, load_autoencoder(SHIPPED, base=vae))
    batches = [pictures.batch(indices.tolist()) for indices in torch.arange(len(pictures)).split(8)]
    return {"": numbers(torch.cat([way(batch).clamp(-1, 1) for batch in batches]), pictures, real, lpips)}


def main(
    run: Path,
    autoencoders: Annotated[list[str] | None, typer.Argument(help="NAME=FOLDER of each.")] = None,
    count: Annotated[int | None, typer.Option(help="Held-out pictures; all of them if not given.")] = None,
) -> None:
    """Measure the cases that have no numbers yet."""
    lpips = LPIPS.alex()
    pictures = open_pictures(assets.pictures(), size=demo.SIZE, split="heldout", limit=count)
    real = extract_features([pictures.image(index) for index in range(len(pictures))], side=demo.SIZE)
    named = [entry.rpartition("=") for entry in autoencoders or ()]

    path = run / "base.json"
    if not path.is_file():
        write_json(path, measure_base(pictures, real, lpips))
    rows: dict[str, Any] = {"base + bicubic": json.loads(path.read_bytes())}
    for name, folder in {"shipped": SHIPPED, **{name: Path(folder) for name, _, folder in named}}.items():
        rows[name] = measure(run / f"{name.replace(' ', '-')}.json", folder, pictures, real, lpips)

    facts = {"heldout": len(pictures), "features": EfficientNetLite0Features.name}
    write_json(run / "result.json", {"rows": rows, **facts, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
