"""Write the measured tables of results/*.json into README.md and docs/results.md: `python experiments/tables.py`."""

import json
from pathlib import Path
from typing import Any

from davae.demo.page import describe_training
from davae.demo.plan import Plan
from davae.run.markdown import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
START, END = "<!-- results: written by experiments/tables.py -->\n", "<!-- end of results -->"
TITLES = {
    "base enlarged": "base at 128 px, enlarged with bicubic",
    "upgrade": "shipped upgrade, 256 px",
    "real images, halved and enlarged": "real images, halved and enlarged",
    "other real images": "other real images",
}
"""Of the sets of images that `recipes/avatars/measure.py` always has; others keep their names."""
Row = dict[str, Any]


def render() -> dict[str, str]:
    """For each page, what stands between its two marks: tables and where they come from, as Markdown."""
    measured = _read("avatars")
    first = _measured(measured)
    parts = [*first, *_attributes(measured["attributes"])]
    if "reconstruction" in measured:
        parts += _reconstruction(measured["reconstruction"], measured["counts"]["reconstructed"])
    if (RESULTS / "demo.json").is_file():
        parts += _demo(_read("demo"))
        parts += _demo_seeds([_read("demo"), *(_read(path.stem) for path in sorted(RESULTS.glob("demo_seed*.json")))])
    return {"README.md": "\n".join(first), "docs/results.md": "\n".join(parts)}


def _read(name: str) -> Row:
    """A result, by the name of its file."""
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def _distance(values: list[float]) -> str:
    """KID and its error, in thousandths."""
    return f"{1000 * values[0]:.1f} +- {1000 * values[1]:.1f}"


def _share_below(value: float, other: float) -> str:
    """By how much a value is smaller than another."""
    return f"{100 * (1 - value / other):.0f} % lower"


def _origin(result: Row) -> str:
    """Commit and machine kind of a result."""
    where = result["environment"]
    commit, _, changed = str(where["commit"]).partition("-")
    return f"commit {commit[:10]}{changed and ' with changes'}, {where['cpu_count']} CPU cores"


def _measured(result: Row) -> list[str]:
    """The shipped pair on held-out prompts: distances."""
    kid, exact, count = result["kid"], result["to_exact"], result["counts"]["prompts"]
    enlarged, ours, halved = (kid[name][0] for name in list(TITLES)[:3])

    rows = []
    for name, value in kid.items():
        row = [TITLES.get(name, name), "" if "real" in name else 64, _distance(value)]
        numbers = exact.get(name)
        if numbers is None:
            row += ["", "", ""]
        else:
            row += [f"{numbers['psnr'][0]:.2f}", f"{numbers['ssim'][0]:.4f}", f"{numbers['lpips'][0]:.4f}"]
        rows.append(row)
    header = ["", "tokens", "KID x 1000 (EfficientNet-Lite0)", "PSNR to the exact image, dB", "SSIM", "LPIPS"]

    side = "lower" if ours < halved else "higher"
    return [
        f"**Generation**, {count} held-out prompts, the same noise for base and upgrade:\n",
        markdown_table(header, rows),
        f"\nKID is {_share_below(ours, enlarged)} than for the enlarged base, and {side} than for real images that "
        "were halved and enlarged, the limit of any method that only enlarges. LPIPS to the image that the caption "
        f"fixes is {exact['upgrade']['lpips'][0]:.3f} instead of {exact['base enlarged']['lpips'][0]:.3f}.\n",
        f"*`python recipes/avatars/measure.py PIPELINE RUN --count {count} --upgrade ADAPTER`, {_origin(result)}, "
        f"{result['sampling']['steps']} steps, guidance {result['sampling']['guidance_scale']}, seed "
        f"{result['sampling']['seed']}, one training; errors are of the choice of prompts.*\n",
    ]


def _attributes(shares: Row) -> list[str]:
    """Which share of each attribute is right."""
    names = list(shares["real images"])
    rows = []
    for title, each in shares.items():
        rows.append([TITLES.get(title, title), *(f"{each[name][0]:.3f}" for name in names)])
    header = ["", *(f"{name.replace('_', ' ')} ({shares['real images'][name][1]})" for name in names)]
    return [
        "**Attributes that are right**, read off by the nearest rendering, and how many images have them:\n",
        markdown_table(header, rows),
        "",
    ]


def _reconstruction(rows: Row, count: int) -> list[str]:
    """Images against what is left of them after the latents."""
    cells = []
    for name, row in rows.items():
        cells.append([name, f"{row['psnr'][0]:.2f}", f"{row['ssim'][0]:.4f}", f"{row['lpips'][0]:.4f}"])
    return [
        f"**Reconstruction**, {count} held-out images at 256 px:\n",
        markdown_table(["", "PSNR, dB", "SSIM", "LPIPS (AlexNet)"], cells),
        "",
    ]


def _demo(result: Row) -> list[str]:
    """What `davae demo` gives in its minutes, and times."""
    plan, rows = result["budget"], []
    times = {"base + bicubic": "base, 128 px", "this run": "shipped upgrade", "shipped upgrade": "shipped upgrade"}
    for name, timed in {**times, "base, run at 256 px": "base, run at 256 px"}.items():
        made, speed = result["generation"].get(name), result["speed"][timed]
        numbers = ["", ""] if made is None else [_distance(made["kid"]), f"{made['lpips']:.4f}"]
        cost = [f"{speed['step_milliseconds']:.1f}", f"{speed['seconds_per_picture']:.2f}"]
        rows.append([name, speed["tokens"], *numbers, *cost])
    return [
        f"**The demo**: {describe_training(Plan(**plan))}; {plan['heldout']} held-out prompts "
        f"of seed {result['seed']}:\n",
        markdown_table(["", "tokens", "KID x 1000", "LPIPS", "transformer, ms a step", "s an image"], rows),
        f"\n*`davae demo`, {_origin(result)}; times are medians of {plan['repeats']} interleaved runs of "
        f"{plan['sampling_steps']} steps.*\n",
    ]


def _demo_seeds(results: list[Row]) -> list[str]:
    """The demo with other seeds, which draw other images for training and other prompts, too."""
    rows = []
    for result in results:
        base, ours = (result["generation"][name] for name in ("base + bicubic", "this run"))
        rows.append([result["seed"], _distance(base["kid"]), _distance(ours["kid"])])
        rows[-1] += [_share_below(ours["kid"][0], base["kid"][0]), f"{base['lpips']:.4f}", f"{ours['lpips']:.4f}"]
    header = ["seed", "base + bicubic, KID x 1000", "this run", "", "base + bicubic, LPIPS", "this run"]
    return ["**The demo's seeds**, each with images and prompts of its own:\n", markdown_table(header, rows), ""]


def main() -> None:
    """Rewrite the sections."""
    for name, text in render().items():
        path = ROOT / name
        before, rest = path.read_text().split(START)
        path.write_text(before + START + text + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
