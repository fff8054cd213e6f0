"""How well pictures survive an autoencoder: PSNR, SSIM and LPIPS, beside the base's bounds and other tokenizers."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from davae.data.listing import PictureSource
from davae.data.pictures import to_bytes
from davae.data.sources import PictureSet, open_pictures
from davae.errors import SettingsError
from davae.evaluation.report import ImageGrid, Report, Section, Table, write_page
from davae.evaluation.tokenizers import (
    Tokenizer,
    base_at_full_size,
    base_enlarged,
    base_unshuffled,
    detail_randomised,
    detail_zeroed,
    facts,
    upgraded,
)
from davae.method.metrics import METRICS, EfficientNetLite0Features, compare_images, describe_directions, kid
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.upgrade import check_base_encoder
from davae.run.ranks import Ranks
from davae.run.record import environment
from davae.run.storage import write_json

Way = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] -> reconstructions of the same shape and range."""
BATCH = 8
OURS, ZEROED, RANDOMISED = "davae", "davae, detail zeroed", "davae, detail randomised"
SMALL = {2: "base at half size, bicubic", 4: "base at a quarter of the size, bicubic"}
FULL, UNSHUFFLED = "base at full size", "base at full size, unshuffled"
"""Names in the numbers of `reconstruct`."""


@torch.no_grad()
def measure(pictures: PictureSet, ways: Mapping[str, Way], *, lpips: LPIPS) -> dict[str, dict[str, float]]:
    """Means over all pictures of PSNR (dB), SSIM and LPIPS, by the name of the way; the ranks share the pictures."""

    def of_chunk(indices: Tensor) -> Tensor:
        image = pictures.batch(indices.tolist()).to(lpips.shift.device)
        made = [way(image).float().clamp(-1, 1) for way in ways.values()]
        return torch.stack([compare_images(each, image, lpips) for each in made])

    values = torch.cat(Ranks().map_chunks(torch.arange(len(pictures)).split(BATCH), of_chunk), dim=-1).mean(dim=-1)
    return {name: dict(zip(METRICS, row, strict=True)) for name, row in zip(ways, values.tolist(), strict=True)}


@torch.no_grad()
def reconstruction_kid(
    pictures: PictureSet, ways: Mapping[str, Way], extract: Callable[[Tensor], Tensor], *, device: torch.device
) -> dict[str, float]:
    """KID of each way's reconstructions against the pictures that they are of; name the features beside it.

    It stands where others give rFID, which needs the features of InceptionV3 and far more pictures. Of a way that
    changes nothing it is a little below 0, since it is unbiased.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in ["", *ways]}
    for indices in torch.arange(len(pictures)).split(BATCH):
        image = pictures.batch(indices.tolist()).to(device)
        rows[""].append(extract(image))
        for name, way in ways.items():
            rows[name].append(extract(way(image).float().clamp(-1, 1)))
    real = torch.cat(rows.pop(""))
    return {name: kid(torch.cat(features), real) for name, features in rows.items()}


@torch.no_grad()
def gallery(
    pictures: PictureSet,
    indices: Iterable[int],
    ways: Mapping[str, Way],
    *,
    differences: Iterable[str] = (),
    device: torch.device | str = "cpu",
) -> ImageGrid:
    """Originals, their reconstructions by every way, and for the ways in `differences` 4 times the error on grey."""
    indices = list(indices)
    image = pictures.batch(indices).to(device)
    columns = {"original": image} | {name: way(image).float().clamp(-1, 1) for name, way in ways.items()}
    for name in differences:
        columns[f"4 x error, {name}"] = (2 * (columns[name] - image)).clamp(-1, 1)
    return ImageGrid(
        columns=list(columns),
        rows=[pictures.captions[index] for index in indices],
        cells=[[to_bytes(column[row]).cpu() for column in columns.values()] for row in range(len(indices))],
        caption=f"Held-out pictures at {pictures.size} px.",
    )


def table(values: Mapping[str, Mapping[str, float]], *, caption: str = "") -> Table:
    """The numbers of `measure` as a table."""
    return Table(
        ["", *(metric.title for metric in METRICS.values())],
        [
            [name, *(f"{row[key]:.{metric.decimals}f}" for key, metric in METRICS.items())]
            for name, row in values.items()
        ],
        caption=caption,
    )


def tokenizer_table(
    values: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, Mapping[str, Any]],
    kids: Mapping[str, float],
    *,
    patch: int,
) -> Table:
    """What each tokenizer costs, and the numbers of `measure`, as a table; `kids` may be empty."""
    quality = table(values)
    header = ["", "as", "numbers / pixel", f"tokens, p = {patch}", "p of equal tokens", *quality.header[1:]]
    rows = []
    for (name, cost), row in zip(costs.items(), quality.rows, strict=True):
        shown = ["-" if cost[key] is None else str(cost[key]) for key in ("tokens", "patch_at_equal_tokens")]
        extra = [f"{1000 * kids[name]:.2f}"] if kids else []
        rows.append([name, cost["brief"], f"{cost['numbers_per_pixel']:.4g}", *shown, *row[1:], *extra])
    caption = (
        "fXcYpZ: downsample factor of the pictures measured here, latent channels, patch of a transformer. "
        f"The patch of equal tokens gives as many tokens as {OURS} has. {describe_directions()}"
    )
    return Table([*header, *(["KID x 1000 (EfficientNet-Lite0)"] if kids else [])], rows, caption=caption)


def reconstruct(
    autoencoder: AutoencoderDA,
    pictures: PictureSource,
    out: Path,
    *,
    base: ModelMixin | None = None,
    compare: Mapping[str, Tokenizer] | None = None,
    size: int = 256,
    limit: int | None = None,
    patch: int = 2,
    ablate_detail: bool = False,
    with_kid: bool = False,
) -> Path:
    """Encode and decode the held-out pictures of a set; numbers in `out`/result.json, and a page.

    One table of the kind of the paper's Table 2: what each tokenizer costs, and what it keeps.

    Args:
        autoencoder: the autoencoder to look at.
        pictures: a folder of captioned pictures or shards.
        out: where the results go.
        base: the base pipeline's VAE, for the bounds that it sets: at 1/s of the size and enlarged, at full size, and
            at full size with its latents unshuffled onto the grid of `autoencoder`; left out, they are not shown.
        compare: other tokenizers by name, see `tokenizers.load_tokenizer`.
        size: side of the pictures in pixels.
        limit: at most so many pictures.
        patch: patch size of a transformer, for the numbers of tokens.
        ablate_detail: show what is left with the detail latents zeroed, and randomised (the paper's Fig. S2).
        with_kid: measure KID of the reconstructions as well.

    Returns:
        The path of the page.

    Raises:
        SettingsError: a factor does not divide `size`, `base` is another autoencoder's, or there is no extra
            `davae[eval]` for KID, or `ablate_detail` of an autoencoder all of whose latents are new.
        DataError: no usable pictures.
    """
    tokenizers = compared(autoencoder, base, compare or {}, ablate_detail=ablate_detail)
    for name in sorted(tokenizers, key=lambda name: name != OURS):
        if size % tokenizers[name].factor:
            factor = tokenizers[name].factor
            raise SettingsError(f"size={size} must be a multiple of {factor}, the downsample factor of {name}")
    features = EfficientNetLite0Features(autoencoder.device) if with_kid else None
    ranks = Ranks()
    heldout = open_pictures(pictures, size=size, split="heldout", limit=limit, captions=False)
    heldout = heldout.sound(out / "refused.json" if ranks.first else None)
    values = measure(heldout, tokenizers, lpips=LPIPS.alex().to(autoencoder.device))
    kids = {} if features is None else reconstruction_kid(heldout, tokenizers, features, device=autoencoder.device)
    tokens = tokenizers[OURS].tokens(size, patch)
    costs = {name: facts(tokenizer, size=size, patch=patch, tokens=tokens) for name, tokenizer in tokenizers.items()}
    result = {"values": values, "tokenizers": costs, "count": len(heldout), "size": size, "patch": patch}
    if features is not None:
        result |= {"kid": kids, "features": features.name}
    where, numbers = {"device": str(autoencoder.device)}, tokenizer_table(values, costs, kids, patch=patch)
    ranks.on_first(lambda: write_json(out / "result.json", {**result, **where, "environment": environment()}))
    ranks.on_first(lambda: _write_page(out / "index.html", heldout, tokenizers, numbers, autoencoder))
    return out / "index.html"


def compared(
    autoencoder: AutoencoderDA, base: ModelMixin | None, others: Mapping[str, Tokenizer], *, ablate_detail: bool
) -> dict[str, Tokenizer]:
    """What stands in the table of `reconstruct`, whose arguments these are, by name and in order.

    Raises:
        SettingsError: `base` is another autoencoder's, or `ablate_detail` of one all of whose latents are new.
    """
    if base is not None and autoencoder.config.base_channels:
        check_base_encoder(autoencoder, base)
    tokenizers = {OURS: upgraded(autoencoder)}
    if ablate_detail:
        tokenizers |= {ZEROED: detail_zeroed(autoencoder), RANDOMISED: detail_randomised(autoencoder)}
    tokenizers |= others
    if base is None:
        return tokenizers
    factor = autoencoder.config.resolution_factor
    bounds = {FULL: base_at_full_size(base), UNSHUFFLED: base_unshuffled(base, factor=factor)}
    return {SMALL[factor]: base_enlarged(base, autoencoder), **tokenizers, **bounds}


def _write_page(
    path: Path, heldout: PictureSet, ways: Mapping[str, Way], numbers: Table, autoencoder: AutoencoderDA
) -> None:
    shown = [len(heldout) * row // 8 for row in range(8)] if len(heldout) > 8 else range(len(heldout))
    drawn = gallery(heldout, shown, ways, differences=[OURS], device=autoencoder.device)
    lead = f"{len(heldout)} held-out pictures at {heldout.size} px through f{autoencoder.downsample_factor} latents."
    sections = [Section("Numbers", heldout.refusals_summary(), numbers), Section("Images", "", drawn)]
    write_page(path, Report("Reconstruction", lead, sections))
