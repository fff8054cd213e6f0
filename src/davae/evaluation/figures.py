"""Drawings of a report: a grid of pictures as one image, clouds of points, matrices, and curves."""

import io
from collections.abc import Sequence
from itertools import pairwise

import matplotlib
import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_COLOURS = ["#2b83c6", "#d55e00", "#009e73", "#cc79a7", "#8a7a00", "#56b4e9"]  # Okabe and Ito: safe for most eyes
_TEXT = "#010203"  # stands for the page's own text colour, see `curves_svg`
_INK, _SOFT, _LINE = "#1b1b1a", "#6a6a64", "#d8d8d2"
_TILE = 420  # side of a cloud of points or a matrix, in pixels


def picture_grid(
    columns: Sequence[str],
    notes: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[Sequence[UInt8[Tensor, "3 _ _"]]],
    *,
    title: str = "",
) -> Image.Image:
    """Pictures side by side on white, column titles above, row labels on the left.

    The cell is as large as the largest picture. Smaller ones are enlarged by the largest whole factor that fits, with
    nearest neighbours, and centred; no pixel is ever interpolated here.
    """
    shown = [cell for row in cells for cell in row]
    side_y = max((cell.shape[1] for cell in shown), default=16)
    side_x = max((cell.shape[2] for cell in shown), default=16)
    size = max(13, round(max(side_x, 160) / 15))
    label_font, title_font, head_font = _font(size), _font(size, bold=True), _font(round(size * 1.35), bold=True)
    gap, margin, label_width = max(4, size // 2), round(size * 1.5), size * 11 if any(rows) else 0

    heads = [_wrap(text, title_font, side_x) for text in columns]
    subs = [_wrap(text, label_font, side_x) for text in notes] or [[] for _ in columns]
    line = round(size * 1.3)
    head_height = line * max((len(a) + len(b) for a, b in zip(heads, subs, strict=True)), default=0) + gap
    title_height = round(size * 2.4) if title else 0
    width = 2 * margin + label_width + len(columns) * (side_x + gap) - gap
    height = 2 * margin + title_height + head_height + len(rows) * (side_y + gap) - gap
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((margin, margin), title, fill=_INK, font=head_font)

    top = margin + title_height
    for column, (head, sub) in enumerate(zip(heads, subs, strict=True)):
        centre = margin + label_width + column * (side_x + gap) + side_x // 2
        base = top + head_height - gap - line * (len(head) + len(sub))
        for index, text in enumerate(head + sub):
            bold = index < len(head)
            draw.text(
                (centre, base + index * line), text, fill=_INK if bold else _SOFT,
                font=title_font if bold else label_font, anchor="ma",
            )  # fmt: skip
    for row, label in enumerate(rows):
        y = top + head_height + row * (side_y + gap)
        text = "\n".join(_wrap(label, label_font, label_width - size))
        draw.multiline_text(
            (margin, y + side_y // 2), text, fill=_SOFT, font=label_font, anchor="lm", spacing=line - size
        )
        for column, cell in enumerate(cells[row]):
            x = margin + label_width + column * (side_x + gap)
            picture = _enlarged(cell, side_y, side_x)
            left, upper = x + (side_x - picture.width) // 2, y + (side_y - picture.height) // 2
            image.paste(picture, (left, upper))
            draw.rectangle((left - 1, upper - 1, left + picture.width, upper + picture.height), outline=_LINE)
    return image


def curves_svg(
    series: Sequence[tuple[str, Sequence[float | int], Sequence[float | int]]],
    *,
    smoothing: int = 1,
    logarithmic: bool = False,
    labels: tuple[str, str] = ("step", "loss"),
) -> str:
    """An `<svg>` element with one curve per (name, steps, values), each named at its end; text in the page's colour.

    `labels` name the two axes.
    With `smoothing` > 1 the mean over that many neighbouring points is drawn strong and the points themselves faint.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": "davae", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for (name, steps, values), colour in zip(series, _COLOURS * (1 + len(series) // len(_COLOURS)), strict=False):
            _draw_curve(axes, name, np.asarray(steps, float), np.asarray(values, float), colour, smoothing)
        if logarithmic:
            axes.set_yscale("log")
        _spread_labels(axes, figure)
        axes.set_xlabel(labels[0], color=_TEXT)
        axes.set_ylabel(labels[1], color=_TEXT)
        axes.tick_params(colors=_TEXT, width=0.6, length=3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#808080")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")


def scatter_tile(points: np.ndarray, colours: np.ndarray) -> UInt8[Tensor, f"3 {_TILE} {_TILE}"]:
    """Points [n, 2] as dots of their colours [n, 3] in 0..1 on white; both axes have one scale, and no numbers."""
    figure = Figure(figsize=(_TILE / 100, _TILE / 100), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.scatter(points[:, 0], points[:, 1], c=colours, s=9, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    return _tile(figure, axes)


def matrix_tile(matrix: np.ndarray) -> UInt8[Tensor, f"3 {_TILE} {_TILE}"]:
    """A matrix of values in -1..1, from blue over white to red; each value is a square cell."""
    figure = Figure(figsize=(_TILE / 100, _TILE / 100), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    return _tile(figure, axes)


def place_colours(points: np.ndarray) -> np.ndarray:
    """A colour [n, 3] for each point [n, 2] by where it lies: hue by the angle around the middle, paler towards it."""
    centred = points - np.median(points, axis=0)
    hue = (np.arctan2(centred[:, 1], centred[:, 0]) / (2 * np.pi)) % 1
    distance = np.hypot(*centred.T)
    rank = distance.argsort().argsort() / max(1, len(points) - 1)
    return hsv_to_rgb(np.stack([hue, 0.35 + 0.65 * rank, 0.85 - 0.15 * rank], axis=1))


def _tile(figure: Figure, axes) -> UInt8[Tensor, "3 _ _"]:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)  # the grid frames its cells
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _draw_curve(axes, name: str, steps: np.ndarray, values: np.ndarray, colour: str, smoothing: int) -> None:
    if smoothing > 1 and len(values) >= 2 * smoothing:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        kernel = np.ones(smoothing) / smoothing
        values = np.convolve(values, kernel, mode="valid")
        steps = np.convolve(steps, kernel, mode="valid")
    axes.plot(steps, values, color=colour, linewidth=1.6, solid_capstyle="round")
    if len(values):
        axes.annotate(
            name, (steps[-1], values[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center"
        )


def _spread_labels(axes, figure: Figure) -> None:
    """Moves the names at the curves' ends apart where they would overlap."""
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi
    labels = sorted(axes.texts, key=lambda label: axes.transData.transform(label.xy)[1])
    heights = [axes.transData.transform(label.xy)[1] * to_points for label in labels]
    placed = heights[:]
    for lower, upper in pairwise(range(len(placed))):
        placed[upper] = max(placed[upper], placed[lower] + 12)
    for label, height, place in zip(labels, heights, placed, strict=True):
        label.xyann = (6, place - height)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    path = findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    return ImageFont.truetype(path, size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words; a longer word keeps a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _enlarged(picture: UInt8[Tensor, "3 _ _"], height: int, width: int) -> Image.Image:
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
    factor = max(1, min(height // image.height, width // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
