"""The page that a person looks at: one HTML file that needs nothing beside it, and its main figure as a PNG.

A report is data: `Report`, `Section`, and the content of a section. `write_page` renders it with the templates of this
folder. The page loads nothing, runs nothing, escapes all text, and follows the reader's light or dark setting.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from davae.evaluation.figures import curves_svg, picture_grid
from davae.run.storage import write_atomically


@dataclass(frozen=True)
class Pictures:
    """A grid of pictures: one row per subject, one column per way of making it."""

    template: ClassVar[str] = "pictures.html"

    columns: Sequence[str]
    """One title per column."""
    rows: Sequence[str]
    """One label per row, the prompt for instance."""
    cells: Sequence[Sequence[UInt8[Tensor, "3 _ _"]]]
    """`cells[row][column]`, RGB in 0..255."""
    notes: Sequence[str] = ()
    """One short line under each column title (size, tokens, filter), or nothing."""
    caption: str = ""

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.cells}
        if len(self.cells) != len(self.rows) or widths - {len(self.columns)}:
            raise ValueError(
                f"{len(self.rows)} labels and {len(self.columns)} titles do not fit {len(self.cells)} rows of {widths}"
            )
        if self.notes and len(self.notes) != len(self.columns):
            raise ValueError(f"{len(self.notes)} notes for {len(self.columns)} columns: give one each, or none")


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names the row, the others are set flush right, as numbers are."""

    template: ClassVar[str] = "table.html"

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(self.header)}")


@dataclass(frozen=True)
class Series:
    """One curve: its name, and values over steps."""

    name: str
    steps: Sequence[float | int]
    values: Sequence[float | int]


@dataclass(frozen=True)
class Curves:
    """Losses over the steps, or what `labels` says of its two axes."""

    template: ClassVar[str] = "curves.html"

    series: Sequence[Series]
    smoothing: int = 1
    """Mean over this many neighbouring points is drawn strong, the points themselves faint; 1 draws the points only."""
    logarithmic: bool = False
    labels: tuple[str, str] = ("step", "loss")


@dataclass(frozen=True)
class Section:
    """A heading, a text (blank lines part paragraphs), and at most one thing to show."""

    heading: str
    text: str = ""
    content: Pictures | Table | Curves | None = None


@dataclass(frozen=True)
class Report:
    """What a page says."""

    title: str
    lead: str
    """One sentence: what was done and what came out."""
    sections: Sequence[Section] = field(default_factory=list)
    footer: str = ""
    """Provenance: commit, versions, device, seed."""


def write_page(path: Path, report: Report) -> None:
    """Write `report` as one HTML file that needs no other file, whole or not at all; make its folder."""
    environment = Environment(
        loader=PackageLoader("davae.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"paragraphs": _paragraphs, "svg": _svg, "webp": _webp}

    page = environment.get_template("page.html").render(report=report)
    write_atomically(path, page.encode())


def write_figure(path: Path, pictures: Pictures, *, title: str = "") -> None:
    """Write the grid as a PNG, pixel for pixel, whole or not at all.

    A picture smaller than the largest one is enlarged by a whole factor with nearest neighbours. To show another
    filter, such as bicubic, the caller applies it and names it in the column's note.
    """
    image = picture_grid(pictures.columns, pictures.notes, pictures.rows, pictures.cells, title=title)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _svg(curves: Curves) -> Markup:
    """The curves as an `<svg>` element, in which matplotlib has escaped the names."""
    series = [(series.name, series.steps, series.values) for series in curves.series]
    return Markup(curves_svg(series, smoothing=curves.smoothing, logarithmic=curves.logarithmic, labels=curves.labels))


def _webp(picture: UInt8[Tensor, "3 _ _"]) -> str:
    """The picture as a data URL, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, format="WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
