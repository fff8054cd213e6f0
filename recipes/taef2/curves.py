"""Thin the runs' metrics and draw them: held-out PSNR and LPIPS over the steps, between the two bounds.

    python recipes/taef2/curves.py runs/taef2 experiments/taef2

Reads RUNS/r1 and RUNS/r3 and OUTPUT/results.json; writes OUTPUT/r1.jsonl, OUTPUT/r3.jsonl and OUTPUT/curves.webp.
"""

import json
from pathlib import Path

import typer
from matplotlib.figure import Figure

RUNS = {"r1": ("r = 1", "#2b83c6"), "r3": ("r = 3", "#d55e00")}
METRICS = {"heldout_psnr": ("psnr", "PSNR, dB"), "heldout_lpips": ("lpips", "LPIPS (AlexNet)")}
BOUNDS = {"base at half size, bicubic": ":", "base at full size": "--"}
EVERY = 20
"""Training steps between the lines that are kept; evaluations are kept all."""


def thin(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are kept, numbers to five digits."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if "heldout_psnr" in line or line["step"] % EVERY == 0]
    return [
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in line.items()}
        for line in ({name: line[name] for name in line if name != "loss_hex"} for line in kept)
    ]


def main(runs: Path, output: Path) -> None:
    """Write the thinned metrics of RUNS and their figure to OUTPUT."""
    bounds = json.loads((output / "results.json").read_text())["curve"]["values"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for run, (label, colour) in RUNS.items():
        lines = thin(runs / run / "metrics.jsonl")
        (output / f"{run}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        measured = [line for line in lines if "heldout_psnr" in line]
        for axis, name in zip(axes, METRICS, strict=True):
            steps = [line["step"] for line in measured]
            axis.plot(steps, [line[name] for line in measured], "o-", color=colour, label=label, markersize=3)

    # The bounds as level lines.
    for axis, (metric, title) in zip(axes, METRICS.values(), strict=True):
        for bound, style in BOUNDS.items():
            axis.axhline(bounds[bound][metric], color="0.4", linestyle=style, label=bound)
        axis.set(xlabel="steps", title=title)
    axes[0].legend(fontsize=8)
    figure.savefig(output / "curves.webp", dpi=100, pil_kwargs={"lossless": True})


if __name__ == "__main__":
    typer.run(main)
