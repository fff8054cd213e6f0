"""The page that a person looks at: one HTML file that needs nothing beside it, and its main figure as a PNG.

A report is data (`Report`, `Section`, and what a section shows); `write_page` renders it. The page loads nothing, runs
nothing, escapes every text that it is given, and follows the reader's light or dark setting.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from davae.evaluation.figures import curves_svg, picture_grid
from davae.run.storage import write_atomically


@dataclass(frozen=True)
class Pictures:
    """A grid of pictures: one row per subject, one column per way of making it."""

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
    """Writes `report` as one self-contained HTML file, whole or not at all; makes the folder where it is missing."""
    body = "\n".join(_section(section) for section in report.sections)
    page = _PAGE.format(
        title=escape(report.title),
        lead=escape(report.lead),
        body=body,
        footer=f"<footer>{_paragraphs(report.footer)}</footer>" if report.footer else "",
        style=_STYLE,
    )
    write_atomically(path, page.encode())


def write_figure(path: Path, pictures: Pictures, *, title: str = "") -> None:
    """Writes the grid as a PNG, pixel for pixel, whole or not at all.

    A picture smaller than the largest one is enlarged by a whole factor with nearest neighbours, so that what is seen
    is what was given; another filter, bicubic say, is the caller's to apply and to name in the column's note.
    """
    image = picture_grid(pictures.columns, pictures.notes, pictures.rows, pictures.cells, title=title)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph.strip())


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _section(section: Section) -> str:
    match section.content:
        case Pictures() as pictures:
            content = _pictures(pictures)
        case Table() as table:
            content = _table(table)
        case Curves() as curves:
            svg = curves_svg(
                [(series.name, series.steps, series.values) for series in curves.series],
                smoothing=curves.smoothing,
                logarithmic=curves.logarithmic,
                labels=curves.labels,
            )
            content = f"<figure class=curves>{svg}</figure>"
        case None:
            content = ""
    return f"<section><h2>{escape(section.heading)}</h2>{_paragraphs(section.text)}{content}</section>"


def _pictures(pictures: Pictures) -> str:
    notes = pictures.notes or [""] * len(pictures.columns)
    titles = "".join(
        f"<th scope=col>{escape(title)}" + (f"<small>{escape(note)}</small>" if note else "") + "</th>"
        for title, note in zip(pictures.columns, notes, strict=True)
    )
    rows = []
    for label, cells in zip(pictures.rows, pictures.cells, strict=True):
        shown = "".join(
            f"<td>{_image(cell, alt=f'{label}: {title}')}</td>"
            for title, cell in zip(pictures.columns, cells, strict=True)
        )
        rows.append(f"<tr><th scope=row>{escape(label)}</th>{shown}</tr>")
    table = f"<table class=pictures style='--columns:{len(pictures.columns)}'>"
    head = f"<thead><tr><td></td>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<figure><div class=scroll>{table}{head}</div>{_caption(pictures.caption)}</figure>"


def _image(picture: UInt8[Tensor, "3 _ _"], alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, format="WEBP", lossless=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    _, height, width = picture.shape
    return f'<img src="data:image/webp;base64,{data}" width={width} height={height} alt="{escape(alt)}">'


def _table(table: Table) -> str:
    header = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.header)
    rows = []
    for row in table.rows:
        cells = f"<th scope=row>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        rows.append(f"<tr>{cells}</tr>")
    inner = f"<table class=numbers><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<figure><div class=scroll>{inner}</div>{_caption(table.caption)}</figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p class=lead>{lead}</p></header>
{body}
{footer}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #fff; --ink: #1b1b1a; --soft: #5f5f5a; --line: #dcdcd6; --strong: #1b1b1a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161615; --ink: #e6e5e0; --soft: #a3a29b; --line: #3a3a37; --strong: #e6e5e0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 78rem; margin: 0 auto; padding: 3.5rem 1.5rem 4rem; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Source Serif 4", Cambria, Georgia, serif; font-weight: 600;
  text-wrap: balance; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
.lead { font-size: 1.12rem; color: var(--soft); }
section { margin-top: 2.8rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
figure { margin: 1.1rem 0 0; }
figcaption { margin-top: .7rem; font-size: .86rem; line-height: 1.45; color: var(--soft); max-width: 54rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
.pictures { width: 100%; max-width: calc(8rem + var(--columns) * 262px); table-layout: fixed;
  min-width: calc(7rem + var(--columns) * 7.5rem); }
.pictures td, .pictures th { padding: 3px; vertical-align: middle; font-weight: 400; }
.pictures thead td { width: 8rem; }
.pictures thead th { font-size: .88rem; font-weight: 600; line-height: 1.3; vertical-align: bottom;
  padding-bottom: .5rem; }
.pictures small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.pictures tbody th { text-align: left; font-size: .86rem; line-height: 1.35; color: var(--soft);
  padding-right: .8rem; overflow-wrap: break-word; }
.pictures img { display: block; width: 100%; height: auto; border-radius: 3px; box-shadow: 0 0 0 1px var(--line); }
.numbers { font-size: .92rem; font-variant-numeric: tabular-nums; border-top: 2px solid var(--strong);
  border-bottom: 2px solid var(--strong); }
.numbers th, .numbers td { padding: .4rem 1.1rem .4rem 0; text-align: right; font-weight: 400; white-space: nowrap; }
.numbers th:first-child { text-align: left; white-space: normal; min-width: 11rem; }
.numbers tr > :last-child { padding-right: 0; }
.numbers thead th { border-bottom: 1px solid var(--strong); color: var(--soft); vertical-align: bottom; }
.curves svg { display: block; width: 100%; max-width: 46rem; height: auto; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .84rem;
  color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  main { padding: 1.8rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .pictures { display: block; min-width: 0; }
  .pictures thead, .pictures tbody { display: block; min-width: calc(var(--columns) * 5.4rem); }
  .pictures tr { display: grid; grid-template-columns: repeat(var(--columns), 1fr); }
  .pictures thead td { display: none; }
  .pictures thead th { font-size: .74rem; align-self: end; text-align: left; }
  .pictures small { font-size: .7rem; }
  .pictures tbody th { grid-column: 1 / -1; padding: .7rem 3px .1rem; }
}
@media print { section { break-inside: avoid; } }
"""
