"""The page that a person looks at: one HTML file, with images in it or in files beside it, and a figure as a PNG.

A report is data: `Report`, `Section`, and the content of a section. `write_page` renders it with the templates of this
folder. The page loads nothing but its images, runs only its own viewer, which its security policy names by its digest,
escapes all text, and follows the reader's light or dark setting.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import matplotlib
import numpy as np
import torch
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from davae.data.pictures import write_png
from davae.run.record import read_metrics
from davae.run.storage import write_atomically

_COLOURS = ["#2b83c6", "#d55e00", "#009e73", "#cc79a7", "#8a7a00", "#56b4e9"]  # Okabe and Ito: safe for most eyes
LOSSLESS_PIXELS = 512 * 512  # of an embedded image; larger ones are embedded at quality 90
_TEXT = "#010203"  # stands for the page's own text colour, see `draw_curves`
_INK, _SOFT, _LINE = "#1b1b1a", "#6a6a64", "#d8d8d2"
_TILE = 420  # side of a cloud of points or a matrix, in pixels


@dataclass(frozen=True)
class ImageGrid:
    """Images in rows and columns: one row per subject, one column per way of making it."""

    template: ClassVar[str] = "images.html"

    columns: Sequence[str]  # titles
    rows: Sequence[str]  # labels, such as the prompts
    cells: Sequence[Sequence[UInt8[Tensor, "3 _ _"]]]  # `cells[row][column]`, RGB in 0..255
    notes: Sequence[str] = ()  # nothing, or one short line under each title (size, tokens, filter)
    caption: str = ""
    # Nothing, or the file of each cell, relative to the page; None embeds the image.
    files: Sequence[Sequence[Path | None]] = ()

    def file(self, row: int, column: int) -> Path | None:
        """The file of a cell, if it has one."""
        return self.files[row][column] if self.files else None

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.cells}
        if len(self.cells) != len(self.rows) or widths - {len(self.columns)}:
            raise ValueError(
                f"{len(self.rows)} labels and {len(self.columns)} titles do not fit {len(self.cells)} rows of {widths}"
            )
        if self.notes and len(self.notes) != len(self.columns):
            raise ValueError(f"{len(self.notes)} notes for {len(self.columns)} columns: give one each, or none")


@dataclass(frozen=True)
class GalleryItem:
    """One image with its prompt."""

    image: UInt8[Tensor, "3 _ _"]
    text: str
    note: str = ""  # a short line, such as its seed
    command: str = ""  # what makes it again, to copy
    file: Path | None = None  # relative to the page; None embeds the image


@dataclass(frozen=True)
class Gallery:
    """Images in a grid, as many in a row as there is room for."""

    template: ClassVar[str] = "gallery.html"

    items: Sequence[GalleryItem]


@dataclass(frozen=True)
class Series:
    """One curve: its name, and values over steps."""

    name: str
    steps: Sequence[float | int]
    values: Sequence[float | int]


def read_series(run: Path, names: Sequence[str]) -> list[Series]:
    """The losses of these names in a run's log, each where it stands; none if there is no log or none of the first."""
    path = run / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    # Held-out values have lines of their own.
    lines = [line for line in lines if names[0] in line]

    series = []
    for name in names if lines else ():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        series.append(Series(name.replace("_", " "), [step for step, _ in points], [value for _, value in points]))
    return series


@dataclass(frozen=True)
class Curves:
    """Losses over the steps, or whatever `labels` names on the two axes."""

    template: ClassVar[str] = "curves.html"

    series: Sequence[Series]
    # Above 1, the mean over this many neighbouring points is drawn strong and the points themselves faint.
    smoothing: int = 1
    logarithmic: bool = False
    labels: tuple[str, str] = ("step", "loss")


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names the row, the others are flush right, as numbers are."""

    template: ClassVar[str] = "table.html"

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(self.header)}")


@dataclass(frozen=True)
class Section:
    """A heading, a text (blank lines separate paragraphs), and at most one thing to show."""

    heading: str
    text: str = ""
    content: ImageGrid | Gallery | Table | Curves | None = None


@dataclass(frozen=True)
class Report:
    """The content of a page."""

    title: str
    lead: str  # one sentence: what was done, and the result
    sections: Sequence[Section] = ()
    footer: str = ""  # provenance: commit, versions, device, seed


def write_page(path: Path, report: Report) -> None:
    """Write `report` as one HTML file that needs none but linked images, whole or not at all; make its folder."""
    # A name that a template misspells is an error, not an empty string.
    loader = PackageLoader("davae.evaluation")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    # matplotlib has escaped the names of the curves.
    environment.filters["svg"] = lambda curves: Markup(draw_curves(curves))
    environment.filters["webp"] = _webp_url
    environment.filters["link"] = lambda file: quote(file.as_posix())

    # Only pages with images have the viewer. The browser runs no script but the one of this digest.
    viewer = None
    if any(isinstance(section.content, ImageGrid | Gallery) for section in report.sections):
        script, _, _ = environment.loader.get_source(environment, "page.js")  # type: ignore[union-attr]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        viewer = {"script": Markup(script), "digest": digest}
    page = environment.get_template("page.html").render(report=report, viewer=viewer)
    write_atomically(path, page.encode())


def write_figure(path: Path, grid: ImageGrid, *, title: str = "", origin: str = "") -> Path:
    """Write the grid as a PNG, pixel for pixel, with `write_png`; return its path.

    An image smaller than the largest one is enlarged by a whole factor with nearest neighbours. To show another
    filter, such as bicubic, the caller applies it and names it in the column's note.
    """
    pixels = np.array(draw_grid(grid, title=title))
    return write_png(path, torch.from_numpy(pixels).permute(2, 0, 1), origin=origin)


def _webp_url(image: UInt8[Tensor, "3 _ _"]) -> str:
    """The image as a data URL, without loss unless it is large."""
    buffer = io.BytesIO()
    height, width = image.shape[1:]
    _to_pillow(image).save(buffer, format="WEBP", lossless=height * width <= LOSSLESS_PIXELS, quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------------------------------------- drawings


def draw_grid(grid: ImageGrid, *, title: str = "") -> Image.Image:
    """The images side by side on white, column titles above, row labels on the left.

    The cell is as large as the largest image. Smaller ones are enlarged by the largest whole factor that fits, with
    nearest neighbours, and centred: no pixel is interpolated.
    """
    images = [cell for row in grid.cells for cell in row]
    side_y = max((cell.shape[1] for cell in images), default=16)
    side_x = max((cell.shape[2] for cell in images), default=16)

    # Fonts and distances follow the width of a cell.
    size = max(13, round(max(side_x, 160) / 15))
    font, bold = _font(size), _font(size, bold=True)
    line, gap, margin = round(size * 1.3), max(4, size // 2), round(size * 1.5)
    label_width = size * 11 if any(grid.rows) else 0
    title_height = round(size * 2.4) if title else 0

    # Lines of text above each column: the title in bold, then the note.
    heads = []
    for index, name in enumerate(grid.columns):
        note = grid.notes[index] if grid.notes else ""
        lines = [(text, _INK, bold) for text in _wrap(name, bold, side_x)]
        heads.append(lines + [(text, _SOFT, font) for text in _wrap(note, font, side_x)])
    head_height = line * max(map(len, heads), default=0) + gap

    # The canvas, with the report's title in its corner.
    width = 2 * margin + label_width + len(grid.columns) * (side_x + gap) - gap
    height = 2 * margin + title_height + head_height + len(grid.rows) * (side_y + gap) - gap
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((margin, margin), title, fill=_INK, font=_font(round(size * 1.35), bold=True))

    # The titles stand on one line above their columns.
    left, top = margin + label_width, margin + title_height + head_height
    for index, head in enumerate(heads):
        centre, upper = left + index * (side_x + gap) + side_x // 2, top - gap - line * len(head)
        for text, colour, face in head:
            draw.text((centre, upper), text, fill=colour, font=face, anchor="ma")
            upper += line

    # A row of images behind its label, each image in the middle of its cell.
    for row, label in enumerate(grid.rows):
        y = top + row * (side_y + gap)
        text, middle = "\n".join(_wrap(label, font, label_width - size)), (margin, y + side_y // 2)
        draw.multiline_text(middle, text, fill=_SOFT, font=font, anchor="lm", spacing=line - size)
        for column, cell in enumerate(grid.cells[row]):
            picture = _enlarge(cell, side_y, side_x)
            x0 = left + column * (side_x + gap) + (side_x - picture.width) // 2
            y0 = y + (side_y - picture.height) // 2
            image.paste(picture, (x0, y0))
            draw.rectangle((x0 - 1, y0 - 1, x0 + picture.width, y0 + picture.height), outline=_LINE)
    return image


def draw_curves(curves: Curves) -> str:
    """The curves as an `<svg>` element, each named at its end; text has the colour of the page's text."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "davae", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for series, colour in zip(curves.series, cycle(_COLOURS), strict=False):
            _draw_curve(axes, series, colour, curves.smoothing)
        if curves.logarithmic:
            axes.set_yscale("log")
        _spread_labels(axes, figure)

        # The frame is a line below; the grid shows heights.
        axes.set_xlabel(curves.labels[0], color=_TEXT)
        axes.set_ylabel(curves.labels[1], color=_TEXT)
        axes.tick_params(which="both", colors=_TEXT, width=0.6, length=3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#808080")

        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")


def scatter_tile(points: np.ndarray, colours: np.ndarray) -> UInt8[Tensor, f"3 {_TILE} {_TILE}"]:
    """Points [n, 2] as dots of their colours [n, 3] in 0..1 on white; both axes have one scale, and no numbers."""
    figure, axes = _tile()
    axes.scatter(points[:, 0], points[:, 1], c=colours, s=9, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    return _pixels(figure)


def matrix_tile(matrix: np.ndarray) -> UInt8[Tensor, f"3 {_TILE} {_TILE}"]:
    """A matrix of values in -1..1, from blue over white to red; each value is a square cell."""
    figure, axes = _tile()
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    return _pixels(figure)


def place_colours(points: np.ndarray) -> np.ndarray:
    """A colour [n, 3] for each point [n, 2] by its place: hue by the angle around the middle, paler towards it."""
    centred = points - np.median(points, axis=0)
    hue = (np.arctan2(centred[:, 1], centred[:, 0]) / (2 * np.pi)) % 1
    distance = np.hypot(*centred.T)
    # Ranks, not distances, so that an outlier does not make all others pale.
    rank = distance.argsort().argsort() / max(1, len(points) - 1)
    return hsv_to_rgb(np.stack([hue, 0.35 + 0.65 * rank, 0.85 - 0.15 * rank], axis=1))


def _tile() -> tuple[Figure, Any]:
    """A square figure without ticks or frame, for the grid frames its cells."""
    figure = Figure(figsize=(_TILE / 100, _TILE / 100), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96), xticks=[], yticks=[], frame_on=False)
    return figure, axes


def _pixels(figure: Figure) -> UInt8[Tensor, "3 _ _"]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _draw_curve(axes, series: Series, colour: str, smoothing: int) -> None:
    steps, values = np.asarray(series.steps, float), np.asarray(series.values, float)
    # The points are faint behind their running mean.
    if smoothing > 1 and len(values) >= 2 * smoothing:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        kernel = np.ones(smoothing) / smoothing
        values = np.convolve(values, kernel, mode="valid")
        steps = np.convolve(steps, kernel, mode="valid")

    axes.plot(steps, values, color=colour, linewidth=1.6, solid_capstyle="round")
    if len(values):
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(series.name, (steps[-1], values[-1]), color=colour, **place)


def _spread_labels(axes, figure: Figure) -> None:
    """Move the names at the curves' ends apart where they would overlap."""
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi
    labels = sorted(axes.texts, key=lambda label: axes.transData.transform(label.xy)[1])
    heights = [axes.transData.transform(label.xy)[1] * to_points for label in labels]

    # From the lowest up, each is pushed at least a line above the one below it.
    places = heights[:]
    for lower, upper in pairwise(range(len(places))):
        places[upper] = max(places[upper], places[lower] + 12)
    for label, height, place in zip(labels, heights, places, strict=True):
        label.xyann = (6, place - height)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    path = findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    return ImageFont.truetype(path, size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _enlarge(picture: UInt8[Tensor, "3 _ _"], height: int, width: int) -> Image.Image:
    image = _to_pillow(picture)
    factor = max(1, min(height // image.height, width // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _to_pillow(image: UInt8[Tensor, "3 _ _"]) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
