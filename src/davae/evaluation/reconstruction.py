"""How well images survive an autoencoder: PSNR, SSIM and LPIPS, beside the base's bounds and other tokenizers."""

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
    enlarge_base,
    make_tokenizer,
    randomise_detail,
    unshuffle_base,
    zero_detail,
)
from davae.method.metrics import METRICS, EfficientNetLite0Features, compare_images, describe_directions, kid
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import check_base_encoder
from davae.run.ranks import Ranks
from davae.run.record import environment
from davae.run.storage import write_json

Way = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] -> reconstructions of the same shape and range."""
BATCH_SIZE = 8

# Names in the numbers of `reconstruct`.
OURS, ZEROED, RANDOMISED = "davae", "davae, detail zeroed", "davae, detail randomised"
SMALL = {2: "base at half size, bicubic", 4: "base at a quarter of the size, bicubic"}
FULL, UNSHUFFLED = "base at full size", "base at full size, unshuffled"


@torch.no_grad()
def measure(pictures: PictureSet, ways: Mapping[str, Way], *, lpips: LPIPS) -> dict[str, dict[str, float]]:
    """Means of `METRICS` over all images, by the name of the way; the ranks share the images."""

    def measure_chunk(indices: Tensor) -> Tensor:
        image = pictures.batch(indices.tolist()).to(lpips.shift.device)
        return torch.stack([compare_images(_apply(way, image), image, lpips) for way in ways.values()])

    chunks = torch.arange(len(pictures)).split(BATCH_SIZE)
    means = torch.cat(Ranks().map_chunks(chunks, measure_chunk), dim=-1).mean(dim=-1).tolist()
    return {name: dict(zip(METRICS, row, strict=True)) for name, row in zip(ways, means, strict=True)}


@torch.no_grad()
def measure_kid(
    pictures: PictureSet, ways: Mapping[str, Way], extract: Callable[[Tensor], Tensor], *, device: torch.device
) -> dict[str, float]:
    """KID of each way's reconstructions against their originals, in place of rFID, which needs far more images.

    It is unbiased: for a way that changes nothing it is a little below 0.
    """
    real: list[Tensor] = []
    features: dict[str, list[Tensor]] = {name: [] for name in ways}
    for indices in torch.arange(len(pictures)).split(BATCH_SIZE):
        image = pictures.batch(indices.tolist()).to(device)
        real.append(extract(image))
        for name, way in ways.items():
            features[name].append(extract(_apply(way, image)))
    return {name: kid(torch.cat(rows), torch.cat(real)) for name, rows in features.items()}


@torch.no_grad()
def make_gallery(
    pictures: PictureSet,
    indices: Iterable[int],
    ways: Mapping[str, Way],
    *,
    differences: Iterable[str] = (),
    device: torch.device | str = "cpu",
) -> ImageGrid:
    """Originals, their reconstructions, and for the ways in `differences` 4 times the error on grey."""
    indices = list(indices)
    image = pictures.batch(indices).to(device)
    columns = {"original": image}
    for name, way in ways.items():
        columns[name] = _apply(way, image)
    for name in differences:
        columns[f"4 x error, {name}"] = (2 * (columns[name] - image)).clamp(-1, 1)

    labels, cells = [], []
    for row, index in enumerate(indices):
        labels.append(pictures.captions[index])
        cells.append([to_bytes(column[row]).cpu() for column in columns.values()])
    return ImageGrid(list(columns), labels, cells, caption=f"Held-out images at {pictures.size} px.")


def make_table(values: Mapping[str, Mapping[str, float]], *, caption: str = "") -> Table:
    """The numbers of `measure` as a table."""
    rows = []
    for name, row in values.items():
        rows.append([name, *(f"{row[key]:.{metric.decimals}f}" for key, metric in METRICS.items())])
    return Table(["", *(metric.title for metric in METRICS.values())], rows, caption=caption)


def make_tokenizer_table(
    values: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, Mapping[str, Any]],
    kids: Mapping[str, float],
    *,
    patch: int,
) -> Table:
    """The cost of each tokenizer beside the numbers of `measure`; `kids` may be empty."""
    quality = make_table(values)
    header = ["", "as", "numbers / pixel", f"tokens, p = {patch}", "p of equal tokens", *quality.header[1:]]
    if kids:
        header.append(f"KID x 1000 ({EfficientNetLite0Features.name})")

    # A row: name, cost, quality.
    rows = []
    for (name, cost), numbers in zip(costs.items(), quality.rows, strict=True):
        row = [name, cost["brief"], f"{cost['numbers_per_pixel']:.4g}"]
        row += ["-" if cost[key] is None else str(cost[key]) for key in ("tokens", "patch_at_equal_tokens")]
        row += numbers[1:]
        if kids:
            row.append(f"{1000 * kids[name]:.2f}")
        rows.append(row)

    caption = (
        "fXcYpZ: downsample factor of the measured images, latent channels, patch of a transformer. "
        f"The patch of equal tokens gives as many tokens as {OURS} has. {describe_directions()}"
    )
    return Table(header, rows, caption=caption)


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
    """Encode and decode held-out images; write result.json and a page to `out`, whose path is returned.

    The table is like the paper's Table 2: the cost of each tokenizer, and the quality of its reconstructions. With the
    VAE `base` it has three bounds: the base at 1/s of the size and enlarged, at full size, and at full size with its
    latents unshuffled onto the grid of `autoencoder`. `ablate_detail` adds the rows of the paper's Fig. S2.

    Raises:
        SettingsError: a factor does not divide `size`, `base` is another autoencoder's, KID is asked for without
            `davae[eval]`, or `ablate_detail` for an autoencoder whose latents are all new.
        DataError: there are no usable images.
    """
    # Refuse before anything is decoded.
    tokenizers = _choose_tokenizers(autoencoder, base, compare or {}, ablate_detail=ablate_detail)
    for name in sorted(tokenizers, key=lambda name: name != OURS):
        factor = tokenizers[name].factor
        if size % factor:
            raise SettingsError(f"size={size} must be a multiple of {factor}, the downsample factor of {name}")
    device, ranks = autoencoder.device, Ranks()
    features = EfficientNetLite0Features(device) if with_kid else None

    # Measure, on all ranks.
    heldout = open_pictures(pictures, size=size, split="heldout", limit=limit, captions=False)
    heldout = heldout.sound(out / "refused.json" if ranks.first else None)
    values = measure(heldout, tokenizers, lpips=LPIPS.alex().to(device))
    kids = {} if features is None else measure_kid(heldout, tokenizers, features, device=device)

    # Costs, at the patch of the caller and at the patch that makes all tokens equal.
    tokens = tokenizers[OURS].count_tokens(size, patch)
    costs = {}
    for name, tokenizer in tokenizers.items():
        costs[name] = tokenizer.count_cost(size=size, patch=patch, equal_tokens=tokens)
    result = {"values": values, "tokenizers": costs, "count": len(heldout), "size": size, "patch": patch}
    if features is not None:
        result |= {"kid": kids, "features": features.name}
    result |= {"device": str(device), "environment": environment()}
    ranks.on_first(lambda: write_json(out / "result.json", result))

    table = make_tokenizer_table(values, costs, kids, patch=patch)
    ranks.on_first(lambda: _write_page(out / "index.html", heldout, tokenizers, table, device))
    return out / "index.html"


def _choose_tokenizers(
    autoencoder: AutoencoderDA, base: ModelMixin | None, others: Mapping[str, Tokenizer], *, ablate_detail: bool
) -> dict[str, Tokenizer]:
    """The rows of the table of `reconstruct`, by name and in order."""
    # An autoencoder with a frozen base encoder is compared with that base only.
    if base is not None and autoencoder.config.base_channels:
        check_base_encoder(autoencoder, base)
    tokenizers = {OURS: make_tokenizer(autoencoder)}
    if ablate_detail:
        tokenizers |= {ZEROED: zero_detail(autoencoder), RANDOMISED: randomise_detail(autoencoder)}
    tokenizers |= others
    if base is None:
        return tokenizers

    # The base at the same tokens comes first, its upper bounds last.
    factor = autoencoder.config.resolution_factor
    bounds = {FULL: make_tokenizer(base), UNSHUFFLED: unshuffle_base(base, factor=factor)}
    return {SMALL[factor]: enlarge_base(base, autoencoder), **tokenizers, **bounds}


def _write_page(
    path: Path, heldout: PictureSet, tokenizers: Mapping[str, Tokenizer], table: Table, device: torch.device
) -> None:
    shown = sorted({len(heldout) * row // 8 for row in range(8)})
    grid = make_gallery(heldout, shown, tokenizers, differences=[OURS], device=device)
    lead = f"{len(heldout)} held-out images at {heldout.size} px through f{tokenizers[OURS].factor} latents."
    sections = [Section("Numbers", heldout.refusals_summary(), table), Section("Images", "", grid)]
    write_page(path, Report("Reconstruction", lead, sections))


def _apply(way: Way, image: Tensor) -> Tensor:
    return way(image).float().clamp(-1, 1)
