"""What base and detail latents look like beside each other: does the detail half keep the base half's structure?

The paper shows it as a t-SNE plot of both halves, with and without alignment. Here that is drawn, and told in numbers:
neighbourhood agreement, correlation of channels, spectra.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int64
from torch import Tensor

from davae.data.listing import Source
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation.embedding import MOST_POINTS, principal_components, tsne
from davae.evaluation.figures import matrix_tile, place_colours, scatter_tile
from davae.evaluation.report import Curves, Pictures, Report, Section, Series, Table, write_figure, write_page
from davae.evaluation.structure import (
    at_positions,
    by_chance,
    channel_correlation,
    group_mean_correlation,
    neighbourhood_agreement,
    radial_spectrum,
)
from davae.method.losses import detail_alignment_loss
from davae.models.autoencoder_da import AutoencoderDA
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator

BATCH = 8
PERPLEXITY = 30.0
FLAT = 4 / 127.5
"""Range of a position's pixels, in [-1, 1], up to which it is background: its latents are like all others of such."""


@dataclass(frozen=True)
class Halves:
    """Latents of one set of pictures, float32 on the CPU."""

    base: Float[Tensor, "n base h w"]
    """In the transformer's units."""
    detail: Float[Tensor, "n detail h w"]
    """In the transformer's units: standardised, once the autoencoder is calibrated."""
    unscaled: Float[Tensor, "n detail h w"]
    """The same before standardisation: what the alignment loss sees."""
    own_base: bool
    """Whether the base latents are the autoencoder's own; where all of its latents are new they are another's."""


@torch.no_grad()
def encode_halves(autoencoder: AutoencoderDA, pictures: PictureSet, *, base: Tensor | None = None) -> Halves:
    """Modes of both posteriors of whole pictures; `base` stands for the base latents that an autoencoder has not."""
    rows: dict[str, list[Tensor]] = {"base": [], "detail": [], "unscaled": []}
    mean, deviation = (b.view(1, -1, 1, 1) for b in (autoencoder.detail_mean, autoencoder.detail_std))
    for indices in torch.arange(len(pictures)).split(BATCH):
        image = pictures.batch(indices.tolist()).to(autoencoder.device, autoencoder.dtype)
        unscaled = autoencoder.encode_detail(image)[0]
        parts = (autoencoder.encode_base(image), (unscaled - mean) / deviation, unscaled)
        for name, part in zip(rows, parts, strict=True):
            rows[name].append(part.float().cpu())
    own, detail, unscaled = (torch.cat(parts) for parts in rows.values())
    return Halves(own if base is None else base, detail, unscaled, own_base=base is None)


def chosen_positions(pictures: PictureSet, factor: int, count: int, *, seed: int) -> Int64[Tensor, "p"]:
    """At most `count` of the rows of `at_positions`, drawn from those that are not flat background, in order.

    Raises:
        DataError: fewer than 16 are there.
    """
    spread = []
    for indices in torch.arange(len(pictures)).split(BATCH):
        image, patch = pictures.batch(indices.tolist()), {"p": factor, "q": factor}
        largest, smallest = (reduce(image, "n c (h p) (w q) -> n c h w", how, **patch) for how in ("max", "min"))
        spread.append((largest - smallest).amax(dim=1).flatten())
    varied = (torch.cat(spread) > FLAT).nonzero().flatten()
    if len(varied) < 16:
        raise DataError(f"{len(varied)} latent positions are not flat, 16 are needed: give more or larger pictures")
    drawn = torch.randperm(len(varied), generator=generator(seed, "latent positions"))[:count]
    return varied[drawn.sort().values]


def describe(halves: Halves, rows: Int64[Tensor, "p"], *, neighbours: int) -> dict[str, Any]:
    """The numbers of one autoencoder, as JSON values; `rows` are those of `chosen_positions`."""
    base, detail = (at_positions(half)[rows] for half in (halves.base, halves.detail))
    facts: dict[str, Any] = {
        "base_channels": halves.base.shape[1],
        "detail_channels": halves.detail.shape[1],
        "base_latents": "its own" if halves.own_base else "another autoencoder's",
        "positions": len(rows),
        "agreement_positions": neighbourhood_agreement(base, detail, neighbours).item(),
        "by_chance_positions": by_chance(len(rows), neighbours),
        "agreement_pictures": None,
        "by_chance_pictures": None,
    }
    count = len(halves.base)
    if count > neighbours + 1:
        whole = neighbourhood_agreement(halves.base.flatten(1), halves.detail.flatten(1), neighbours)
        facts |= {"agreement_pictures": whole.item(), "by_chance_pictures": by_chance(count, neighbours)}
    correlation = channel_correlation(halves.base, halves.detail)
    grouped = halves.detail.shape[1] % halves.base.shape[1] == 0
    return facts | {
        "alignment_loss": detail_alignment_loss(halves.unscaled.double(), halves.base.double()).item()
        if grouped
        else None,
        "group_mean_correlation": group_mean_correlation(halves.base, halves.unscaled) if grouped else None,
        "largest_correlation": correlation.abs().amax(dim=1).mean().item(),
        "channel_correlation": correlation.tolist(),
        "base_spectrum": radial_spectrum(halves.base).tolist(),
        "detail_spectrum": radial_spectrum(halves.detail).tolist(),
    }


def draw_latents(
    autoencoders: Mapping[str, AutoencoderDA],
    pictures: Source,
    out: Path,
    *,
    size: int = 256,
    limit: int | None = None,
    points: int = 1000,
    neighbours: int = 10,
    seed: int = 0,
) -> Path:
    """Base and detail latents of held-out pictures, drawn and in numbers; result.json, latents.png and a page in `out`.

    Args:
        autoencoders: by name; one row each, such as one trained with alignment and one without.
        pictures: a folder of captioned pictures or shards.
        out: where the results go.
        size: side of the pictures in pixels.
        limit: at most so many pictures.
        points: at most so many latent positions are drawn, and have their neighbours compared.
        neighbours: k of the neighbourhood agreement.
        seed: of the choice of positions.

    Returns:
        The path of the page.

    Raises:
        SettingsError: a factor does not divide `size`, a number is out of range, the detail latents do not vary, or
            no autoencoder has base latents to compare new ones with.
        DataError: no usable pictures, or too few positions.
    """
    if not 16 <= points <= MOST_POINTS:
        raise SettingsError(f"points={points}: allowed are 16 to {MOST_POINTS}")
    for name, autoencoder in autoencoders.items():
        if size % autoencoder.downsample_factor:
            raise SettingsError(
                f"size={size} must be a multiple of {autoencoder.downsample_factor}, the downsample factor of {name}"
            )
    heldout = open_pictures(pictures, size=size, split="heldout", limit=limit, captions=False).sound(
        out / "refused.json"
    )
    found = _encoded(autoencoders, heldout)
    rows = {
        name: chosen_positions(heldout, autoencoder.downsample_factor, points, seed=seed)
        for name, autoencoder in autoencoders.items()
    }
    facts = {name: describe(halves, rows[name], neighbours=neighbours) for name, halves in found.items()}
    drawn, divergences = _drawing(found, rows, facts)
    for name, values in divergences.items():
        facts[name]["tsne_divergence"] = values
    result = {"autoencoders": facts, "count": len(heldout), "size": size, "neighbours": neighbours, "seed": seed}
    write_json(out / "result.json", {**result, "environment": environment()})
    write_figure(out / "latents.png", drawn, title="Base and detail latents")
    sections = [
        Section("Structure", _STRUCTURE, drawn),
        Section("Numbers", _NUMBERS.format(k=neighbours), _table(facts)),
        Section("Spectra", _SPECTRA, _spectra(facts)),
    ]
    lead = f"{len(heldout)} held-out pictures at {size} px. {heldout.refusals_summary()}"
    write_page(out / "index.html", Report("Base and detail latents", lead, sections))
    return out / "index.html"


_STRUCTURE = (
    "One dot is one latent position. Its colour says where it lies in the t-SNE of its base latents, and is the same "
    "in all of a row's plots: where colours stay together in the plots of detail latents, these keep the "
    "base's neighbourhoods. The axes of t-SNE and of principal components have no meaning of their own.\n\n"
    "Correlation of channels: a row is a base channel, a column a detail channel; red is 1, white 0, blue -1."
)
_NUMBERS = (
    "Neighbours kept: of the {k} nearest neighbours in base latents, the share that is among the {k} nearest in detail "
    "latents, beside the share expected by chance; of single latent positions (flat background left out), and of "
    "whole pictures. Alignment loss: Eq. 3-4 of the paper. Correlation of group means: of each base channel with the "
    "mean of its group of detail channels, which that loss draws together."
)
_SPECTRA = (
    "Mean power of the latents, in the units that the transformer sees, by spatial frequency. White noise of unit "
    "variance would be a level line at 1."
)


def _encoded(autoencoders: Mapping[str, AutoencoderDA], pictures: PictureSet) -> dict[str, Halves]:
    """Halves by name; an autoencoder without a base half is given the base latents of the first that has one."""
    found: dict[str, Halves] = {}
    first = sorted(autoencoders, key=lambda name: not autoencoders[name].config.base_channels)
    for name in first:
        autoencoder, base = autoencoders[name], None
        if not autoencoder.config.base_channels:
            base = next((halves.base for halves in found.values() if halves.own_base), None)
            if base is None or base.shape[-1] != pictures.size // autoencoder.downsample_factor:
                raise SettingsError(
                    f"{name} has no base latents (all of its latents are new): give beside it an autoencoder that has, "
                    f"of the downsample factor {autoencoder.downsample_factor}"
                )
        found[name] = encode_halves(autoencoder, pictures, base=base)
        deviations = at_positions(found[name].detail).double().std(dim=0)
        if not (deviations > 1e-6).all():
            raise SettingsError(f"detail latents of {name} do not vary, or are not finite: train it first")
    return {name: found[name] for name in autoencoders}


def _drawing(
    found: Mapping[str, Halves], rows: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]
) -> tuple[Pictures, dict[str, list[float]]]:
    """A row of plots for each autoencoder, and what t-SNE brought the divergences of base and detail down to."""
    columns = ["t-SNE, base", "t-SNE, detail", "principal components, base", "principal components, detail"]
    cells, labels, divergences = [], [], {}
    known: tuple[Tensor, Any] | None = None
    for name, halves in found.items():
        base, detail = (at_positions(half)[rows[name]] for half in (halves.base, halves.detail))
        perplexity = min(PERPLEXITY, (len(base) - 1) / 3)
        if known is None or not torch.equal(known[0], base):  # autoencoders of one base share its latents
            known = base, tsne(base, perplexity=perplexity)
        pairs = [known[1], tsne(detail, perplexity=perplexity)]
        divergences[name] = [value for _, value in pairs]
        plots = [points for points, _ in pairs] + [_two_components(half) for half in (base, detail)]
        colours = place_colours(plots[0].numpy())
        tiles = [scatter_tile(points.numpy(), colours) for points in plots]
        cells.append([*tiles, matrix_tile(np.asarray(facts[name]["channel_correlation"]))])
        kept, chance = (facts[name][key] for key in ("agreement_positions", "by_chance_positions"))
        labels.append(f"{name}: neighbours kept {kept:.3f}, by chance {chance:.3f}")
    return Pictures([*columns, "correlation of channels"], labels, cells), divergences


def _two_components(vectors: Tensor) -> Tensor:
    components = principal_components(vectors, min(2, vectors.shape[1]))
    return components if components.shape[1] == 2 else torch.cat([components, torch.zeros_like(components)], dim=1)


def _table(facts: Mapping[str, Mapping[str, Any]]) -> Table:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    header = ["", "channels", "positions kept", "by chance", "pictures kept", "by chance"]
    rows = []
    for name, fact in facts.items():
        keys = [f"{what}_{where}" for where in ("positions", "pictures") for what in ("agreement", "by_chance")]
        loss, correlation = (number(fact[key]) for key in ("alignment_loss", "group_mean_correlation"))
        channels = f"{fact['base_channels']} + {fact['detail_channels']}"
        rows.append([name, channels, *(share(fact[key]) for key in keys), loss, correlation])
    return Table([*header, "alignment loss", "correlation of group means"], rows)


def _spectra(facts: Mapping[str, Mapping[str, Any]]) -> Curves:
    lines: list[Series] = []
    for name, fact in facts.items():
        for half in ("base", "detail"):
            values = fact[f"{half}_spectrum"]
            if all(values != line.values for line in lines):
                lines.append(Series(f"{half}, {name}", range(1, len(values) + 1), values))
    return Curves(lines, logarithmic=True, labels=("cycles across the picture", "power"))
