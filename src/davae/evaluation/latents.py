"""Base and detail latents beside each other: do the detail latents keep the structure of the base latents?

The paper answers with a t-SNE plot of both halves, with and without alignment. Here the plot has numbers beside it:
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

from davae.data.listing import PictureSource
from davae.data.pictures import digest_origin
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation import report, structure
from davae.method.losses import detail_alignment_loss
from davae.models.autoencoder_da import AutoencoderDA
from davae.run.record import environment
from davae.run.storage import write_json
from davae.seeds import generator

BATCH_SIZE = 8
# More dots hide each other, and the comparison of neighbours grows with the square of their number.
MOST_POINTS = 2000
# Pixels of a latent position that differ by less are background, whose latents are all alike. In [-1, 1].
FLAT = 4 / 127.5

STRUCTURE = (
    "One dot is one latent position. Its colour shows where it lies in the t-SNE of its base latents, and is the same "
    "in all plots of a row. Where colours stay together in the plots of detail latents, these keep the neighbourhoods "
    "of the base latents. The axes of t-SNE and of principal components have no meaning of their own.\n\n"
    "Correlation of channels: a row is a base channel, a column a detail channel; red is 1, white 0, blue -1."
)
NUMBERS = (
    "Neighbours kept: the share of the {k} nearest neighbours in base latents that are among the {k} nearest in detail "
    "latents, beside the share expected by chance. It is measured over single latent positions (without flat "
    "background) and over whole images. Alignment loss: Eq. 3-4 of the paper. Correlation of group means: each base "
    "channel with the mean of its group of detail channels, which that loss draws together."
)
SPECTRA = (
    "Mean power of the latents, in the units that the transformer sees, by spatial frequency. White noise of unit "
    "variance would be a level line at 1."
)
# Columns of the table -> keys of the numbers; the columns of the first kind are shares.
SHARES = {
    "positions kept": "agreement_positions",
    "by chance, positions": "by_chance_positions",
    "images kept": "agreement_pictures",
    "by chance, images": "by_chance_pictures",
}
OTHERS = {"alignment loss": "alignment_loss", "correlation of group means": "group_mean_correlation"}


@dataclass(frozen=True)
class Halves:
    """Latents of one set of images, float32 on the CPU: base and detail in the transformer's units."""

    base: Float[Tensor, "n base h w"]
    detail: Float[Tensor, "n detail h w"]  # standardised, once the autoencoder is calibrated
    unscaled: Float[Tensor, "n detail h w"]  # the detail latents before that, as the alignment loss sees them
    own_base: bool  # whether the base latents are its own; they are another's if all of its latents are new

    def at(self, rows: Int64[Tensor, "p"]) -> tuple[Float[Tensor, "p base"], Float[Tensor, "p detail"]]:
        """Base and detail latents of some positions, numbered row by row over all images."""
        return structure.at_positions(self.base)[rows], structure.at_positions(self.detail)[rows]


@torch.no_grad()
def encode_halves(autoencoder: AutoencoderDA, pictures: PictureSet, *, base: Tensor | None = None) -> Halves:
    """The modes of both posteriors of whole images; `base` is for an autoencoder without base latents."""
    own_base, unscaled = [], []
    for indices in torch.arange(len(pictures)).split(BATCH_SIZE):
        image = pictures.batch(indices.tolist()).to(autoencoder.device, autoencoder.dtype)
        own_base.append(autoencoder.encode_base(image))
        unscaled.append(autoencoder.encode_detail(image)[0])

    detail = torch.cat(unscaled)
    mean, deviation = autoencoder.detail_mean.view(1, -1, 1, 1), autoencoder.detail_std.view(1, -1, 1, 1)
    return Halves(
        base=torch.cat(own_base).float().cpu() if base is None else base,
        detail=((detail - mean) / deviation).float().cpu(),
        unscaled=detail.float().cpu(),
        own_base=base is None,
    )


def choose_positions(pictures: PictureSet, factor: int, count: int, *, seed: int) -> Int64[Tensor, "p"]:
    """At most `count` of the rows of `at_positions`, drawn from those that are not flat background, in order.

    Raises:
        DataError: there are fewer than 16.
    """
    # The range of pixel values at each latent position, over the channels.
    ranges = []
    for indices in torch.arange(len(pictures)).split(BATCH_SIZE):
        image = pictures.batch(indices.tolist())
        largest = reduce(image, "n c (h p) (w q) -> n c h w", "max", p=factor, q=factor)
        smallest = reduce(image, "n c (h p) (w q) -> n c h w", "min", p=factor, q=factor)
        ranges.append((largest - smallest).amax(dim=1).flatten())

    varied = (torch.cat(ranges) > FLAT).nonzero().flatten()
    if len(varied) < 16:
        raise DataError(f"{len(varied)} latent positions are not flat, 16 are needed: give more or larger images")
    chosen = torch.randperm(len(varied), generator=generator(seed, "latent positions"))[:count]
    return varied[chosen.sort().values]


def describe(halves: Halves, rows: Int64[Tensor, "p"], *, neighbours: int) -> dict[str, Any]:
    """The numbers of one autoencoder as JSON values, at the `rows` of `choose_positions`."""
    base, detail = halves.at(rows)
    facts: dict[str, Any] = {
        "base_channels": halves.base.shape[1],
        "detail_channels": halves.detail.shape[1],
        "base_latents": "its own" if halves.own_base else "another autoencoder's",
        "positions": len(rows),
        "agreement_positions": structure.neighbourhood_agreement(base, detail, neighbours).item(),
        "by_chance_positions": structure.by_chance(len(rows), neighbours),
        "agreement_pictures": None,
        "by_chance_pictures": None,
        "alignment_loss": None,
        "group_mean_correlation": None,
    }

    # Whole images, if there are enough of them.
    count = len(halves.base)
    if count > neighbours + 1:
        agreement = structure.neighbourhood_agreement(halves.base.flatten(1), halves.detail.flatten(1), neighbours)
        facts |= {"agreement_pictures": agreement.item(), "by_chance_pictures": structure.by_chance(count, neighbours)}

    # Groups of detail channels, if the base channels divide them.
    if halves.detail.shape[1] % halves.base.shape[1] == 0:
        facts["alignment_loss"] = detail_alignment_loss(halves.unscaled.double(), halves.base.double()).item()
        facts["group_mean_correlation"] = structure.group_mean_correlation(halves.base, halves.unscaled)

    # Every base channel with every detail channel, and the spectra of both halves.
    correlation = structure.channel_correlation(halves.base, halves.detail)
    return facts | {
        "largest_correlation": correlation.abs().amax(dim=1).mean().item(),
        "channel_correlation": correlation.tolist(),
        "base_spectrum": structure.radial_spectrum(halves.base).tolist(),
        "detail_spectrum": structure.radial_spectrum(halves.detail).tolist(),
    }


def draw_latents(
    autoencoders: Mapping[str, AutoencoderDA],
    pictures: PictureSource,
    out: Path,
    *,
    size: int = 256,
    limit: int | None = None,
    points: int = 1000,
    neighbours: int = 10,
    seed: int = 0,
) -> Path:
    """Draw and measure base and detail latents of held-out images; write results and a page to `out`; the page's path.

    At most `points` latent positions are drawn, and have their `neighbours` nearest compared.

    Raises:
        SettingsError: a factor does not divide `size`, a number is out of range, the detail latents do not vary,
            no autoencoder has base latents to compare new ones with, or `davae[latents]` is not installed.
        DataError: there are no usable images, or too few positions.
    """
    # Refuse before anything is encoded.
    structure.check_tsne_is_installed()
    if not 16 <= points <= MOST_POINTS:
        raise SettingsError(f"points={points}: allowed are 16 to {MOST_POINTS}")
    for name, autoencoder in autoencoders.items():
        factor = autoencoder.downsample_factor
        if size % factor:
            raise SettingsError(f"size={size} must be a multiple of {factor}, the downsample factor of {name}")

    # Encode, and choose the positions that are compared.
    heldout = open_pictures(pictures, size=size, split="heldout", limit=limit, captions=False)
    heldout = heldout.sound(out / "refused.json")
    halves = _encode(autoencoders, heldout)
    rows, facts = {}, {}
    for name, autoencoder in autoencoders.items():
        rows[name] = choose_positions(heldout, autoencoder.downsample_factor, points, seed=seed)
        facts[name] = describe(halves[name], rows[name], neighbours=neighbours)

    # Draw, and write.
    grid = _draw(halves, rows, facts)
    result = {"autoencoders": facts, "count": len(heldout), "size": size, "neighbours": neighbours, "seed": seed}
    write_json(out / "result.json", {**result, "environment": environment()})
    origin = digest_origin(result)
    report.write_figure(out / "latents.png", grid, title="Base and detail latents", origin=origin)
    sections = [
        report.Section("Structure", STRUCTURE, grid),
        report.Section("Numbers", NUMBERS.format(k=neighbours), _make_table(facts)),
        report.Section("Spectra", SPECTRA, _make_spectra(facts)),
    ]
    lead = f"{len(heldout)} held-out images at {size} px. {heldout.refusals_summary()}"
    report.write_page(out / "index.html", report.Report("Base and detail latents", lead, sections))
    return out / "index.html"


def _encode(autoencoders: Mapping[str, AutoencoderDA], pictures: PictureSet) -> dict[str, Halves]:
    """Halves by name; an autoencoder without base latents gets those of the first that has some."""
    halves: dict[str, Halves] = {}
    shared: Tensor | None = None
    for name in sorted(autoencoders, key=lambda name: not autoencoders[name].config.base_channels):
        autoencoder = autoencoders[name]
        if autoencoder.config.base_channels:
            halves[name] = encode_halves(autoencoder, pictures)
            shared = halves[name].base if shared is None else shared
        elif shared is not None and shared.shape[-1] == pictures.size // autoencoder.downsample_factor:
            halves[name] = encode_halves(autoencoder, pictures, base=shared)
        else:
            raise SettingsError(
                f"{name} has no base latents (all of its latents are new): add an autoencoder that has some, with the "
                f"downsample factor {autoencoder.downsample_factor}"
            )

        # Constant channels have no neighbours and no correlation.
        deviations = structure.at_positions(halves[name].detail).double().std(dim=0)
        if not (deviations > 1e-6).all():
            raise SettingsError(f"detail latents of {name} do not vary, or are not finite: train it first")
    return {name: halves[name] for name in autoencoders}


def _draw(
    halves: Mapping[str, Halves], rows: Mapping[str, Tensor], facts: Mapping[str, dict[str, Any]]
) -> report.ImageGrid:
    """A row of plots for each autoencoder; `facts` get the divergences of t-SNE."""
    labels, cells = [], []
    last_base: Tensor | None = None
    for name, half in halves.items():
        base, detail = half.at(rows[name])

        # Autoencoders of one base share its latents: their t-SNE is drawn once.
        if last_base is None or not torch.equal(last_base, base):
            base_points, base_divergence = structure.tsne(base)
            last_base = base
        detail_points, detail_divergence = structure.tsne(detail)
        facts[name]["tsne_divergence"] = [base_divergence, detail_divergence]

        # All plots of a row have the colours of its base's t-SNE.
        colours = report.place_colours(base_points.numpy())
        tiles = []
        for points in (base_points, detail_points, *map(structure.principal_components, (base, detail))):
            tiles.append(report.scatter_tile(points.numpy(), colours))
        cells.append([*tiles, report.matrix_tile(np.asarray(facts[name]["channel_correlation"]))])
        agreement, chance = facts[name]["agreement_positions"], facts[name]["by_chance_positions"]
        labels.append(f"{name}: neighbours kept {agreement:.3f}, by chance {chance:.3f}")

    columns = ["t-SNE, base", "t-SNE, detail", "principal components, base", "principal components, detail"]
    return report.ImageGrid([*columns, "correlation of channels"], labels, cells)


def _make_table(facts: Mapping[str, Mapping[str, Any]]) -> report.Table:
    rows = []
    for name, fact in facts.items():
        cells = [name, f"{fact['base_channels']} + {fact['detail_channels']}"]
        for key in SHARES.values():
            cells.append("-" if fact[key] is None else f"{100 * fact[key]:.1f} %")
        for key in OTHERS.values():
            cells.append("-" if fact[key] is None else f"{fact[key]:.3f}")
        rows.append(cells)
    return report.Table(["", "channels", *SHARES, *OTHERS], rows)


def _make_spectra(facts: Mapping[str, Mapping[str, Any]]) -> report.Curves:
    """One curve for each half; a base that several autoencoders share is drawn once."""
    curves: list[report.Series] = []
    for name, fact in facts.items():
        for half in ("base", "detail"):
            values = fact[f"{half}_spectrum"]
            if all(values != curve.values for curve in curves):
                curves.append(report.Series(f"{half}, {name}", range(1, len(values) + 1), values))
    return report.Curves(curves, logarithmic=True, labels=("cycles across the image", "power"))
