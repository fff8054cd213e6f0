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

from davae.evaluation.figures import Curves, ImageGrid, Series, draw_curves, draw_grid
from davae.run.storage import write_atomically

__all__ = ["Curves", "ImageGrid", "Report", "Section", "Series", "Table", "write_figure", "write_page"]


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
    content: ImageGrid | Table | Curves | None = None


@dataclass(frozen=True)
class Report:
    """The content of a page."""

    title: str
    lead: str
    """One sentence: what was done, and the result."""
    sections: Sequence[Section] = field(default_factory=list)
    footer: str = ""
    """Provenance: commit, versions, device, seed."""


def write_page(path: Path, report: Report) -> None:
    """Write `report` as one HTML file that needs no other file, whole or not at all; make its folder."""
    # A name that a template misspells is an error, not an empty string.
    environment = Environment(
        loader=PackageLoader("davae.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    # matplotlib has escaped the names of the curves.
    environment.filters["svg"] = lambda curves: Markup(draw_curves(curves))
    environment.filters["paragraphs"] = _split_paragraphs
    environment.filters["webp"] = _webp_url

    page = environment.get_template("page.html").render(report=report)
    write_atomically(path, page.encode())


def write_figure(path: Path, grid: ImageGrid, *, title: str = "") -> None:
    """Write the grid as a PNG, pixel for pixel, whole or not at all.

    An image smaller than the largest one is enlarged by a whole factor with nearest neighbours. To show another
    filter, such as bicubic, the caller applies it and names it in the column's note.
    """
    buffer = io.BytesIO()
    draw_grid(grid, title=title).save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def _split_paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _webp_url(image: UInt8[Tensor, "3 _ _"]) -> str:
    """The image as a data URL, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, format="WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
