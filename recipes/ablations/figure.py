"""The ablations' figure and tables: `python recipes/ablations/figure.py runs/ablations/result.json docs/ablations.png`.

Prints the tables as Markdown. Every number is the mean over the seeds, +- their standard deviation.
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
ONE, TWO, BEFORE = "#2b83c6", "#d55e00", "#8a8a84"
Row = dict[str, Any]


def spread(row: Row, name: str, digits: int) -> str:
    """A number as Markdown; empty where it was not measured."""
    if name not in row:
        return ""
    mean, deviation = row[name]
    return f"{mean:.{digits}f}" + (f" +- {deviation:.{digits}f}" if row["seeds"] > 1 else "")


def markdown(result: dict[str, Any]) -> str:
    """Both tables and where they come from."""
    one = [
        f"| {row['arm']} | {before['heldout_psnr'][0]:.2f} | {spread(row, 'heldout_psnr', 2)} | "
        f"{before['heldout_lpips'][0]:.4f} | {spread(row, 'heldout_lpips', 4)} | "
        f"{before['heldout_alignment'][0]:.3f} | {spread(row, 'heldout_alignment', 3)} | {row['seeds']} |"
        for before, row in zip(result["stage_one_before"], result["stage_one_after"], strict=True)
    ]
    two = [
        f"| {row['arm']} | {spread(row, 'kid', 1)} | {'' if row['arm'] in (BASE, 'reference') else difference(row)} | "
        f"{spread(row, 'heldout_base_loss', 3)} | {spread(row, 'heldout_detail_loss', 3)} | {row['seeds']} |"
        for row in result["stage_two"]
    ]
    counts, where = result["counts"], result["environment"]
    return "\n".join(
        [
            f"**Stage 1**, {result['stage_one_steps']} steps of four 64 px crops, {counts['heldout']} held-out "
            "pictures:\n",
            "| arm | PSNR before, dB | after | LPIPS before | after | alignment loss before | after | seeds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *one,
            f"\n**Stage 2**, {result['stage_two_steps']} steps of 16 on {counts['real']} pictures; KID of "
            f"{counts['prompts']} pictures, losses of held-out latents:\n",
            "| arm | KID x 1000 (EfficientNet-Lite0) | difference to the reference | base loss | detail loss | seeds |",
            "|---|---:|---:|---:|---:|---:|",
            *two,
            f"\n*`python recipes/ablations/run.py RUN --stage-one-steps {result['stage_one_steps']} --stage-two-steps "
            f"{result['stage_two_steps']}`, commit {str(where['commit'])[:10]}; mean +- standard deviation over the "
            "seeds. Detail losses of different codes or r are of different targets, and no comparison.*\n",
        ]
    )


def difference(row: Row) -> str:
    """KID minus the reference's of the same seed."""
    mean, deviation = row["kid_difference"]
    return f"{mean:+.1f} +- {deviation:.1f}"


def dots(axes: Axes, rows: Sequence[Row], name: str, title: str, colour: str, *, filled: bool = True) -> None:
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
        known = result["stage_one_after"]
        dots(axes[0, place], result["stage_one_before"], name, f"stage 1: {title}", BEFORE, filled=False)
        dots(axes[0, place], known, name, f"stage 1: {title} (hollow: before)", ONE)
    base = next((row for row in result["stage_two"] if row["arm"] == BASE), None)
    rows = [row for row in result["stage_two"] if row["arm"] != BASE]
    for place, (name, title) in enumerate(
        [("kid", "KID x 1000"), ("heldout_base_loss", "held-out base loss"), ("heldout_detail_loss", "detail loss")]
    ):
        dots(axes[1, place], rows, name, f"stage 2: {title}", TWO)
    if base is not None:
        axes[1, 0].axvline(base["kid"][0], color=BEFORE, linewidth=1, linestyle="--")
        axes[1, 0].set_title("stage 2: KID x 1000 (dashed: base + bicubic)", fontsize=8)
    for row_of_axes in axes:
        for other in row_of_axes[1:]:
            other.set_yticklabels([])
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


def main(result: Path, picture: Path) -> None:
    """Draw the figure, print the tables."""
    found = json.loads(result.read_text())
    draw(found, picture)
    typer.echo(markdown(found))


if __name__ == "__main__":
    typer.run(main)
