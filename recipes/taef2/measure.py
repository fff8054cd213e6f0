r"""Measure the TAEF2 runs on all held-out pictures beside the two bounds: numbers, and crops to look at.

    python recipes/taef2/measure.py runs/taef2/base runs/taef2 experiments/taef2 r1=runs/taef2/r1/autoencoder \
        r3=runs/taef2/r3/autoencoder

Each named autoencoder is measured on the held-out textures (512 px), the photographs (352 px) and the large pictures
(1024 px) that build_pictures.py made, with davae's own evaluation. Names that OUTPUT/results.json has
already are not measured again. OUTPUT/pictures.jpg shows crops of native pixels.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from PIL import Image
from torch import Tensor

from davae.data.pictures import to_bytes
from davae.data.sources import PictureSet, open_pictures
from davae.evaluation.reconstruction import measure
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.run.record import environment
from davae.run.storage import write_json

SETS: dict[str, tuple[str, int, int | None]] = {
    "curve": ("textures", 512, 8),
    "textures": ("textures", 512, None),
    "photographs": ("photographs", 352, None),
    "large": ("large", 1024, None),
}
"""Folder, size, and how many; the first is what the recipes evaluate on as they train."""
SHOWN = {"textures": (14, 44), "photographs": (20, 34)}
"""Which held-out pictures the comparison shows."""
CROP = 96


def draw(sets: dict[str, PictureSet], ways: dict[str, Callable[[Tensor], Tensor]], path: Path) -> None:
    """Rows of images: the original, then every way; the middle CROP pixels of each, as they are."""
    rows = []
    for name, shown in SHOWN.items():
        pictures = sets[name]
        image = pictures.batch(shown)
        columns = [image, *(way(image).float().clamp(-1, 1) for way in ways.values())]
        first = (pictures.size - CROP) // 2
        middle = slice(first, first + CROP)
        rows += list(torch.cat([column[..., middle, middle] for column in columns], dim=3))
    Image.fromarray(to_bytes(torch.cat(rows, dim=1)).permute(1, 2, 0).numpy()).save(path, quality=80, optimize=True)


@torch.no_grad()
def main(base: Path, pictures: Path, output: Path, autoencoders: list[str] | None = typer.Argument(None)) -> None:
    """Measure AUTOENCODERS, each NAME=FOLDER, made on BASE, on the sets in PICTURES; results go to OUTPUT."""
    vae = load_base_vae(str(base)).to(memory_format=torch.channels_last)
    folders = dict(entry.split("=", 1) for entry in autoencoders or ())
    models = {name: load_autoencoder(Path(folder)) for name, folder in folders.items()}
    for model in models.values():
        model.to(memory_format=torch.channels_last)

    untrained = AutoencoderDA.from_base(vae, detail_channels=vae.config.latent_channels)
    ways = {
        "base at half size, bicubic": enlarge_base(vae, untrained),
        **{name: make_tokenizer(model) for name, model in models.items()},
        "base at full size": make_tokenizer(vae),
    }

    # Measure whatever the results lack.
    path = output / "results.json"
    facts = json.loads(path.read_text()) if path.is_file() else {}
    sets, lpips = {}, LPIPS.alex()
    for name, (folder, size, limit) in SETS.items():
        heldout = open_pictures(pictures / folder, size=size, split="heldout", limit=limit)
        sets[name] = heldout
        known = facts.setdefault(name, {"count": len(heldout), "size": heldout.size, "values": {}})["values"]
        for way, run in ways.items():
            if way not in known:
                known |= measure(heldout, {way: run}, lpips=lpips)
                typer.echo(f"{name}: {way}: {known[way]}")
                write_json(path, {**facts, "environment": environment()})

    draw(sets, ways, output / "pictures.jpg")


if __name__ == "__main__":
    typer.run(main)
