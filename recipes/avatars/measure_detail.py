"""The value of detail latents: reconstructions with them as they are, another image's, random, zero, guessed.

    python recipes/avatars/measure_detail.py runs/detail SHARDS "another one"=runs/stage1/autoencoder

measures the shipped autoencoder and the named ones on the held-out images of SHARDS, beside base + bicubic, and writes
RUN/result.json. Cases that have numbers are skipped. The paper's Fig. S2: rFID 0.47, with random detail 8.25, with
zeroed detail 2.93.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import ModelMixin
from torch import Tensor

from davae import assets
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

Change = Callable[[Tensor, Tensor], Tensor]
"""Base and detail latents [B, C or D, h, w] of some pictures, in units -> what stands for the detail latents."""


def changes(autoencoder: AutoencoderDA, fitted: PictureSet) -> dict[str, Change]:
    """What replaces the detail latents; in units each of their channels has mean 0 and deviation 1."""
    zero = -(autoencoder.detail_mean / autoencoder.detail_std).view(1, -1, 1, 1)
    weight = guess(autoencoder, fitted)
    return {
        "as they are": lambda base, detail: detail,
        "their mean": lambda base, detail: torch.zeros_like(detail),
        "zero before standardisation": lambda base, detail: zero.expand_as(detail),
        "guessed from the base": lambda base, detail: F.conv2d(base, weight[:, :-1, None, None], weight[:, -1]),
        "random": lambda base, detail: torch.randn(detail.shape, generator=generator(0, "random detail")),
        "of another picture": lambda base, detail: detail.roll(1, dims=0),
    }


def guess(autoencoder: AutoencoderDA, fitted: PictureSet) -> Tensor:
    """Weight and bias, [D, C + 1], of base latents -> detail latents by least squares on training pictures."""
    both = latents(autoencoder, fitted).transpose(0, 1).flatten(1).double()
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
    distance = 1000 * kid(extract_features(list(to_bytes(made)), side=made.shape[-1]), real)
    return dict(zip(("psnr", "ssim", "lpips", "kid"), [*values, distance], strict=True))


@torch.no_grad()
def measure(
    path: Path, autoencoder: AutoencoderDA, fitted: PictureSet, pictures: PictureSet, real: Tensor, lpips: LPIPS
) -> dict[str, Any]:
    """The numbers of one autoencoder for each change of its detail latents; those in `path` are not repeated."""
    cases: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    base, detail = autoencoder.split(latents(autoencoder, pictures))
    for name, change in changes(autoencoder, fitted).items():
        if name not in cases:
            changed = autoencoder.from_units(torch.cat([base, change(base, detail)], dim=1))
            made = torch.cat([autoencoder.decode(part).sample.clamp(-1, 1) for part in changed.split(8)])
            cases[name] = numbers(made, pictures, real, lpips)
            write_json(path, cases)
            typer.echo(f"{name}: {cases[name]}")
    return cases


@torch.no_grad()
def measure_base(
    vae: ModelMixin, autoencoder: AutoencoderDA, pictures: PictureSet, real: Tensor, lpips: LPIPS
) -> dict[str, dict[str, float]]:
    """The numbers of the base autoencoder at half the size, enlarged with bicubic."""
    way = enlarge_base(vae, autoencoder)
    batches = [pictures.batch(indices.tolist()) for indices in torch.arange(len(pictures)).split(8)]
    return {"": numbers(torch.cat([way(batch).clamp(-1, 1) for batch in batches]), pictures, real, lpips)}


def main(
    run: Path,
    shards: Annotated[Path, typer.Argument(help="The images of `davae data avatars`.")],
    autoencoders: Annotated[list[str] | None, typer.Argument(help="NAME=FOLDER of each.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base pipeline; by default the shipped one.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Its upgrade; by default the shipped one.")] = None,
    size: Annotated[int, typer.Option(help="Side of the images.")] = 256,
    count: Annotated[int | None, typer.Option(help="Held-out pictures; all of them if not given.")] = None,
) -> None:
    """Measure the cases that have no numbers yet."""
    lpips = LPIPS.alex()
    fitted = open_pictures(shards, size=size, split="train", limit=96)
    pictures = open_pictures(shards, size=size, split="heldout", limit=count)
    real = extract_features([pictures.image(index) for index in range(len(pictures))], side=size)

    # The shipped autoencoder, and those that were named.
    vae = load_base_vae(str(base or assets.base_pipeline()))
    folders = {"shipped": adapter or assets.upgrade()}
    for entry in autoencoders or ():
        name, _, folder = entry.rpartition("=")
        folders[name] = Path(folder)

    path = run / "base.json"
    if not path.is_file():
        shipped = load_autoencoder(folders["shipped"], base=vae)
        write_json(path, measure_base(vae, shipped, pictures, real, lpips))
    rows: dict[str, Any] = {"base + bicubic": json.loads(path.read_bytes())}
    for name, folder in folders.items():
        autoencoder = load_autoencoder(folder, base=vae)
        rows[name] = measure(run / f"{name.replace(' ', '-')}.json", autoencoder, fitted, pictures, real, lpips)

    facts = {"heldout": len(pictures), "features": EfficientNetLite0Features.name}
    write_json(run / "result.json", {"rows": rows, **facts, "environment": environment()})


if __name__ == "__main__":
    typer.run(main)
