"""Write the README's results out of results/*.json, between its two marks: `python experiments/tables.py`."""

import json
from pathlib import Path
from typing import Any

from davae.run.markdown import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
START, END = "<!-- results: written by experiments/tables.py -->\n", "<!-- end of results -->"
BASE, REFERENCE = "base + bicubic", "reference"
Row = dict[str, Any]


def render() -> str:
    """All tables and where they come from, as Markdown."""
    small_pair = _read("small_pair")
    parts = [
        *_small_pair(small_pair),
        *_rivals(small_pair, _read("rivals"), _read("slim_decoder")),
        *_detail(_read("detail")),
        *_ablations(_read("ablations")),
    ]
    return "\n".join(parts)


def _read(name: str) -> Row:
    """A result, by the name of its file."""
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def _distance(values: list[float]) -> str:
    """KID and its error, in thousandths."""
    return f"{1000 * values[0]:.1f} +- {1000 * values[1]:.1f}"


def _small_pair(result: Row) -> list[str]:
    """The shipped pair: reconstruction, generation, cost."""
    counts, sampling = result["counts"], result["sampling"]
    reconstruction = [
        [name, f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['lpips']:.4f}"]
        for name, row in result["reconstruction_256"].items()
    ]
    base = result["base_reconstruction_128"]["base, 128 px"]

    costs = []
    for title, case, pictures in (
        ("base at 128 px, enlarged with bicubic", "base, 128 px", "base + bicubic"),
        ("shipped upgrade, 256 px", "shipped upgrade", "shipped upgrade"),
        ("base run at 256 px", "base, run at 256 px", "base, run at 256 px"),
    ):
        speed, distance = result["speed"][case], _distance(result["kid"][pictures])
        times = [f"{speed['step_milliseconds']:.1f}", f"{speed['seconds_per_picture']:.2f}"]
        costs.append([title, speed["tokens"], distance, *times])
    header = ["", "tokens", "KID x 1000 (EfficientNet-Lite0)", "transformer, ms a step", "s a picture"]

    return [
        f"**Reconstruction**, {counts['heldout']} held-out pictures at 256 px:\n",
        markdown_table(["", "PSNR, dB", "SSIM", "LPIPS (AlexNet)"], reconstruction),
        f"\nThe base autoencoder at its own 128 px: {base['psnr']:.2f} dB, LPIPS {base['lpips']:.4f}.\n",
        f"**Generation**, {counts['generated']} prompts and seeds, against {counts['real']} real pictures, both "
        "spread over the whole set, training pictures included:\n",
        markdown_table(header, costs),
        f"\n*`python recipes/small_pair/measure.py RUN --count {counts['generated']}`, {_origin(result)}, "
        f"{sampling['steps']} steps, guidance {sampling['guidance_scale']}, seed {sampling['seed']}; times are of 16 "
        "steps, medians of interleaved runs, one thread.*\n",
    ]


def _origin(result: Row) -> str:
    """Commit and machine kind of a result."""
    where = result["environment"]
    commit, _, changed = str(where["commit"]).partition("-")
    return f"commit {commit[:10]}{changed and ' with changes'}, {where['cpu_count']} CPU cores"


def _rivals(ours: Row, result: Row, slim: Row) -> list[str]:
    """The upgrade beside rivals with the same training FLOPs or the same tokens."""
    upscaler, by_batch = result["upscaler"], result["seconds_per_picture"]
    header = ["", "tokens", "KID x 1000", "PSNR, dB", "LPIPS"]
    for batch in by_batch:
        header += [f"s a picture, batch {batch}", "its steps"]

    def times(name: str) -> list[str]:
        cells = []
        for row in by_batch.values():
            cells += [f"{row[name]['whole']:.2f}", f"{result['sampling']['steps'] * row[name]['step']:.2f}"]
        return cells

    def quality(row: Row) -> list[str]:
        return [f"{row['psnr']:.2f}", f"{row['lpips']:.4f}"]

    untimed = [""] * 2 * len(by_batch)
    shipped = quality(ours["reconstruction_256"]["shipped upgrade"])
    slim_quality = quality(slim["reconstruction_256"]["slim decoder, trained"])
    slim_kid = _distance(slim["kid"]["slim decoder, trained"])
    upscaled = quality(upscaler["reconstruction_256"]["latent upscaler"])
    upscaled_kid = _distance(upscaler["kid"]["latent upscaler"])
    native_kid = _distance(result["kid"]["native 256 px model"])
    rows = [
        ["shipped upgrade", 64, _distance(ours["kid"]["shipped upgrade"]), *shipped, *times("shipped upgrade")],
        ["the same, slim decoder", 64, slim_kid, *slim_quality, *times("shipped upgrade, slim decoder")],
        [f"base at 128 px + latent upscaler, {upscaler['steps']:,} steps", 64, upscaled_kid, *upscaled, *untimed],
        [
            f"base trained on at 256 px, {result['native_steps']:,} steps",
            *(256, native_kid, "", ""),
            *times("base, run at 256 px"),
        ],
    ]

    flops = {name: result[f"{name}_steps"] * count for name, count in result["training_flops"].items()}
    return [
        "**Against rivals of equal training**, same prompts, seeds and real pictures:\n",
        markdown_table(header, rows),
        "\n*`recipes/small_pair/latent_upscaler.py` (in the history; it no longer runs), `native_256.toml`, "
        f"`measure_rivals.py`; {_origin(result)}, "
        f"one thread, pictures decoded one by one. The last row's training had "
        f"{flops['native'] / flops['upgrade']:.2f} times the FLOPs of the upgrade's stage 2, counted.*\n",
    ]


def _detail(result: Row) -> list[str]:
    """Reconstructions with replaced detail latents."""
    autoencoders = {title: cases for title, cases in result["rows"].items() if title != BASE}
    names = list(next(iter(autoencoders.values())))
    rows = [
        [title, *(f"{cases[name]['psnr']:.2f} / {cases[name]['kid']:.0f}" for name in names)]
        for title, cases in autoencoders.items()
    ]

    base = result["rows"][BASE][""]
    return [
        f"**Detail latents replaced**, {result['heldout']} held-out pictures: PSNR in dB / KID x 1000 of "
        f"reconstructions; base + bicubic has {base['psnr']:.2f} / {base['kid']:.0f}:\n",
        markdown_table(["autoencoder", *names], rows),
        f"\n*`python recipes/small_pair/measure_detail.py RUN`, {_origin(result)}; as in the paper's Fig. S2, whose "
        "rFID is 0.47, randomised 8.25, zeroed 2.93.*\n",
    ]


def _spread(row: Row, name: str, digits: int) -> str:
    """A mean and its deviation over the seeds; empty where it was not measured."""
    if name not in row:
        return ""
    mean, deviation = row[name]
    return f"{mean:.{digits}f}" + (f" +- {deviation:.{digits}f}" if row["seeds"] > 1 else "")


def _difference(row: Row) -> str:
    """KID minus the reference's of the same seed."""
    if row["arm"] in (BASE, REFERENCE):
        return ""
    mean, deviation = row["kid_difference"]
    return f"{mean:+.1f} +- {deviation:.1f}"


def _ablations(result: Row) -> list[str]:
    """Both tables of recipes/ablations."""
    counts = result["counts"]
    stage_one = []
    for before, row in zip(result["stage_one_before"], result["stage_one_after"], strict=True):
        cells = [row["arm"]]
        for name, digits in (("heldout_psnr", 2), ("heldout_lpips", 4), ("heldout_alignment", 3)):
            cells += [f"{before[name][0]:.{digits}f}", _spread(row, name, digits)]
        stage_one.append([*cells, row["seeds"]])
    before_and_after = ["PSNR before, dB", "after", "LPIPS before", "after", "alignment loss before", "after"]

    stage_two = []
    for row in result["stage_two"]:
        losses = [_spread(row, f"heldout_{half}_loss", 3) for half in ("base", "detail")]
        stage_two.append([row["arm"], _spread(row, "kid", 1), _difference(row), *losses, row["seeds"]])
    distances = ["KID x 1000 (EfficientNet-Lite0)", "difference to the reference"]

    return [
        "<details><summary>Ablations: the tables</summary>\n",
        f"**Ablations, stage 1**, {result['stage_one_steps']} steps of four 64 px crops, {counts['heldout']} held-out "
        "pictures:\n",
        markdown_table(["arm", *before_and_after, "seeds"], stage_one),
        f"\n**Ablations, stage 2**, {result['stage_two_steps']} steps of 16 on {counts['real']} pictures; KID of "
        f"{counts['prompts']} pictures, losses of held-out latents:\n",
        markdown_table(["arm", *distances, "base loss", "detail loss", "seeds"], stage_two),
        f"\n*`python recipes/ablations/run.py RUN --stage-one-steps {result['stage_one_steps']} --stage-two-steps "
        f"{result['stage_two_steps']}`, {_origin(result)}; mean +- standard deviation over the seeds. Detail losses of "
        "different codes or r are of different targets, and no comparison.*\n",
        "</details>\n",
    ]


def main() -> None:
    """Rewrite the README's section."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(START)
    path.write_text(before + START + render() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
