"""How well pictures survive the autoencoder: PSNR, SSIM and LPIPS beside the two bounds that the base sets."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from davae.autoencoder_da import AutoencoderDA
from davae.data.png import to_bytes
from davae.data.sources import PictureSet, open_pictures
from davae.errors import SettingsError
from davae.metrics import psnr, ssim
from davae.perceptual import LPIPS
from davae.record import environment
from davae.report import Pictures, Report, Section, Table, write_page
from davae.storage import write_json
from davae.upgrade import check_base_encoder

Way = Callable[[Tensor], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] -> reconstructions of the same shape and range."""
METRICS = ("psnr", "ssim", "lpips")
BATCH = 8


def base_at_full_size(vae: AutoencoderKL | AutoencoderTiny) -> Way:
    """The base autoencoder on the picture itself: the bound that four times the tokens would buy."""
    return lambda image: vae(image).sample


def base_enlarged(vae: AutoencoderKL | AutoencoderTiny, autoencoder: AutoencoderDA) -> Way:
    """The base autoencoder on the picture at half size, enlarged with bicubic: what equal tokens give without davae."""
    factor = autoencoder.config.resolution_factor
    return lambda image: F.interpolate(
        vae(autoencoder.base_picture(image)).sample.float().clamp(-1, 1), scale_factor=factor, mode="bicubic"
    )


def upgraded(autoencoder: AutoencoderDA) -> Way:
    """The AutoencoderDA, with the mode of its posterior."""
    return lambda image: autoencoder(image).sample


@torch.no_grad()
def measure(pictures: PictureSet, ways: Mapping[str, Way], *, lpips: LPIPS) -> dict[str, dict[str, float]]:
    """Means over all pictures of PSNR (dB), SSIM and LPIPS, by the name of the way."""
    rows: dict[str, list[Tensor]] = {name: [] for name in ways}
    for indices in torch.arange(len(pictures)).split(BATCH):
        image = pictures.batch(indices.tolist()).to(lpips.shift.device)
        for name, way in ways.items():
            made = way(image).float().clamp(-1, 1)
            rows[name].append(torch.stack([metric(made, image) for metric in (psnr, ssim, lpips)]))
    means = {name: torch.cat(values, dim=1).mean(dim=1).tolist() for name, values in rows.items()}
    return {name: dict(zip(METRICS, values, strict=True)) for name, values in means.items()}


@torch.no_grad()
def gallery(
    pictures: PictureSet,
    indices: Iterable[int],
    ways: Mapping[str, Way],
    *,
    differences: Iterable[str] = (),
    device: torch.device | str = "cpu",
) -> Pictures:
    """Originals, their reconstructions by every way, and for the ways in `differences` 4 times the error on grey."""
    indices = list(indices)
    image = pictures.batch(indices).to(device)
    columns = {"original": image} | {name: way(image).float().clamp(-1, 1) for name, way in ways.items()}
    for name in differences:
        columns[f"4 x error, {name}"] = (2 * (columns[name] - image)).clamp(-1, 1)
    return Pictures(
        columns=list(columns),
        rows=[pictures.captions[index] for index in indices],
        cells=[[to_bytes(column[row]).cpu() for column in columns.values()] for row in range(len(indices))],
        caption=f"Held-out pictures at {pictures.size} px.",
    )


def table(values: Mapping[str, Mapping[str, float]], *, caption: str = "") -> Table:
    """The numbers of `measure` as a table."""
    return Table(
        ["", "PSNR, dB", "SSIM", "LPIPS (AlexNet)"],
        [[name, f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['lpips']:.4f}"] for name, row in values.items()],
        caption=caption,
    )


def reconstruct(
    autoencoder: AutoencoderDA,
    pictures: Path,
    out: Path,
    *,
    base: AutoencoderKL | AutoencoderTiny | None = None,
    size: int = 256,
    limit: int | None = None,
) -> Path:
    """Encode and decode the held-out pictures of a set; numbers in `out`/result.json, and a page.

    Args:
        autoencoder: the autoencoder to look at.
        pictures: a folder of captioned pictures or shards.
        out: where the results go.
        base: the base pipeline's VAE, for the two bounds; left out, they are not shown.
        size: side of the pictures in pixels.
        limit: at most so many pictures.

    Returns:
        The path of the page.

    Raises:
        SettingsError: the factor does not divide `size`, or `base` is another autoencoder's.
        DataError: no usable pictures.
    """
    if base is not None:
        check_base_encoder(autoencoder, base)
    if size % autoencoder.downsample_factor:
        raise SettingsError(f"size={size} must be a multiple of {autoencoder.downsample_factor}, the downsample factor")
    heldout = open_pictures(pictures, size=size, split="heldout", limit=limit).sound(out / "refused.json")
    ways = {"davae": upgraded(autoencoder)}
    if base is not None:
        bounds = (base_enlarged(base, autoencoder), base_at_full_size(base))
        ways = {"base at half size, bicubic": bounds[0], **ways, "base at full size": bounds[1]}
    values = measure(heldout, ways, lpips=LPIPS.alex().to(autoencoder.device))
    shown = [len(heldout) * row // 8 for row in range(8)] if len(heldout) > 8 else range(len(heldout))
    drawn = gallery(heldout, shown, ways, differences=["davae"], device=autoencoder.device)
    facts = {"values": values, "count": len(heldout), "size": size, "device": str(autoencoder.device)}
    facts["environment"] = environment()
    write_json(out / "result.json", facts)
    lead = f"{len(heldout)} held-out pictures at {size} px through f{autoencoder.downsample_factor} latents."
    page = Report(
        "Reconstruction",
        lead,
        [
            Section("Numbers", heldout.refusals_summary(), table(values)),
            Section("Pictures", "", drawn),
        ],
    )
    write_page(out / "index.html", page)
    return out / "index.html"
