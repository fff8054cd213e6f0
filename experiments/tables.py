"""Write the README's results out of results/small_pair.json, between its two marks: `python experiments/tables.py`."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "experiments" / "results" / "small_pair.json"
START, END = "<!-- results: written by experiments/tables.py -->\n", "<!-- end of results -->"


def render(result: dict) -> str:
    """The two tables and their provenance, as Markdown."""
    counts, kid, speed = result["counts"], result["kid"], result["speed"]
    sampling, where = result["sampling"], result["environment"]
    rows = [
        f"| {name} | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['lpips']:.4f} |"
        for name, row in result["reconstruction_256"].items()
    ]
    base = result["base_reconstruction_128"]["base, 128 px"]

    def distance(name: str) -> str:
        return f"{1000 * kid[name][0]:.1f} +- {1000 * kid[name][1]:.1f}" if name in kid else "not measured"

    cases = (
        ("base at 128 px, enlarged with bicubic", "base, 128 px", "base + bicubic"),
        ("shipped upgrade, 256 px", "shipped upgrade", "shipped upgrade"),
        ("base run at 256 px", "base, run at 256 px", "base, run at 256 px"),
    )
    costs = [
        f"| {title} | {speed[case]['tokens']} | {distance(made)} | {speed[case]['step_milliseconds']:.1f} | "
        f"{speed[case]['seconds_per_picture']:.2f} |"
        for title, case, made in cases
    ]
    return "\n".join(
        [
            f"**Reconstruction**, {counts['heldout']} held-out pictures at 256 px:\n",
            "| | PSNR, dB | SSIM | LPIPS (AlexNet) |",
            "|---|---:|---:|---:|",
            *rows,
            f"\nThe base autoencoder at its own 128 px: {base['psnr']:.2f} dB, LPIPS {base['lpips']:.4f}.\n",
            f"**Generation**, {counts['generated']} prompts and seeds, against {counts['real']} real pictures, both "
            "spread over the whole set, training pictures included:\n",
            "| | tokens | KID x 1000 (EfficientNet-Lite0) | transformer, ms a step | s a picture |",
            "|---|---:|---:|---:|---:|",
            *costs,
            f"\n*`python recipes/small_pair/measure.py RUN --count {counts['generated']}`, commit "
            f"{str(where['commit'])[:10]}, {where['cpu_count']} CPU cores, {sampling['steps']} steps, guidance "
            f"{sampling['guidance_scale']}, seed {sampling['seed']}; times are of 16 steps, medians of interleaved "
            "runs, one thread.*\n",
        ]
    )


def main() -> None:
    """Rewrite the README's section."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(START)
    path.write_text(before + START + render(json.loads(RESULT.read_text())) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
