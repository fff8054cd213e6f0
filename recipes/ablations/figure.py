"""The ablations' figure: `python recipes/ablations/figure.py runs/ablations/result.json docs/ablations.png`.

Every dot is the mean over the seeds, with their standard deviation.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

BASE = "base + bicubic"
OFF_THE_SCALE = "random start"
"""Too far from the others to be drawn; the table has it."""
ONE, TWO, BEFORE = "#2b83c6", "#d55e00", "#8a8a84"
Row = dict[str, Any]


def draw_dots(axes: Axes, rows: Sequence[Row], name: str, title: str, colour: str, *, filled: bool = True) -> None:
    """One dot with its deviation for each row that has the number, the first row on top."""
    for place, row in enumerate(rows):
        if name in row:
            mean, deviation = row[name]
            axes.errorbar(
                mean, -place, xerr=deviation or None, fmt="o", color=colour, markersize=4, capsize=2, linewidth=1,
                markerfacecolor=colour if filled else "white",
            )  # fmt: skip
    axes.set_title(title, fontsize=8)
    axes.set_yticks([-place for place in range(len(rows))], [row["arm"] for row in rows], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(result: dict[str, Any], path: Path) -> None:
    """Stage 1 above, before hollow and after filled; stage 2 below."""
    figure = Figure(figsize=(9, 6.2), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3)
    for place, (name, title) in enumerate(
        [("heldout_psnr", "PSNR, dB"), ("heldout_lpips", "LPIPS"), ("heldout_alignment", "alignment loss")]
    ):
        before, after = (
            [row for row in result[f"stage_one_{moment}"] if row["arm"] != OFF_THE_SCALE]
            for moment in ("before", "after")
        )
        draw_dots(axes[0, place], before, name, f"stage 1: {title}", BEFORE, filled=False)
        draw_dots(axes[0, place], after, name, f"stage 1: {title} (hollow: before)", ONE)

    # Stage 2, with the base as a dashed line.
    base = next((row for row in result["stage_two"] if row["arm"] == BASE), None)
    rows = [row for row in result["stage_two"] if row["arm"] != BASE]
    for place, (name, title) in enumerate(
        [("kid", "KID x 1000"), ("heldout_base_loss", "held-out base loss"), ("heldout_detail_loss", "detail loss")]
    ):
        draw_dots(axes[1, place], rows, name, f"stage 2: {title}", TWO)
    if base is not None:
        axes[1, 0].axvline(base["kid"][0], color=BEFORE, linewidth=1, linestyle="--")
        axes[1, 0].set_title("stage 2: KID x 1000 (dashed: base + bicubic)", fontsize=8)

    # Only the left plots name the arms.
    for row_of_axes in axes:
        for other in row_of_axes[1:]:
            other.set_yticklabels([])
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


def main(result: Path, picture: Path) -> None:
    """Draw the figure."""
    draw(json.loads(result.read_bytes()), picture)


if __name__ == "__main__":
    typer.run(main)
