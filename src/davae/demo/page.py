"""The demo's figure and page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from davae.data.sources import PictureSet
from davae.demo.plan import Plan
from davae.demo.prompts import BASE, ENLARGED, SIZE
from davae.evaluation import reconstruction
from davae.evaluation.report import Curves, ImageGrid, Report, Section, Table, read_series
from davae.method.metrics import EfficientNetLite0Features
from davae.run.record import environment

NATIVE = "base, run at 256 px"
THIS_RUN, SHIPPED = "this run", "shipped upgrade"
CLOSED_FORM, FULL = "closed-form start", "base at full size"


def make_figure(made: Mapping[str, list[Tensor]], real: PictureSet, shown: int) -> ImageGrid:
    """The images of some prompts side by side."""
    columns = (ENLARGED, THIS_RUN, SHIPPED)
    rows, cells = [], []
    for position in range(shown):
        index = len(real) * position // shown
        rows.append(real.captions[index])
        cells.append([*(made[name][index] for name in columns), real.image(index)])
    notes = ["128 px, enlarged; 64 tokens", "256 px; 64 tokens", "256 px; 64 tokens", "256 px"]
    caption = (
        "Same prompts, and the same noise on the base channels. No training saw these pairs of hair and expression."
    )
    return ImageGrid([*columns, "what the caption says"], rows, cells, notes=notes, caption=caption)


def make_page(
    facts: Mapping[str, Any], figure: ImageGrid, gallery: ImageGrid, folder: Path, plan: Plan, seed: int
) -> Report:
    """The page: figure, generation, reconstruction, curves. The lead says what this run alone has added."""
    generation, speed = facts["generation"], facts["speed"]
    ours, base = generation[THIS_RUN], generation[ENLARGED]
    speedup = speed[NATIVE]["seconds_per_picture"] / speed[SHIPPED]["seconds_per_picture"]
    gain = 100 * (1 - ours["kid"][0] / base["kid"][0])
    side = "below" if gain >= 0 else "above"
    lead = (
        f"{describe_training(plan)}, on this machine, from the 128 px base: on {plan.heldout} held-out prompts KID "
        f"{abs(gain):.0f} % {side} base + bicubic, LPIPS to the exact image {ours['lpips']:.3f} instead of "
        f"{base['lpips']:.3f}, and {speedup:.1f} times the speed of the base at {SIZE} px."
    )
    explanation = "The difference between an image and its reconstruction from latents, on images that no training saw."
    if plan.stage_one_steps:
        explanation += (
            " The closed-form start is the autoencoder before any training: least squares on 64 images. Stage 1 "
            f"teaches its decoder to forgive noise on the latents; {plan.stage_one_steps} steps of it are too few to "
            "gain on exact ones, and may lose a little; without them the images of stage 2 come out mottled."
        )

    caption = f"Means over {plan.heldout} held-out images at {SIZE} px."
    table = reconstruction.make_table(facts["reconstruction"], caption=caption)
    stage_two = read_series(folder / "stage2", ("base_loss", "detail_loss"))
    sections = [
        Section("Images from held-out prompts", "", figure),
        Section("Distance to the exact images, and cost", "", make_generation_table(facts, plan, seed)),
        Section("Reconstruction of held-out images", explanation, table),
        Section("Reconstructions", "", gallery),
    ]
    if plan.stage_one_steps:
        stage_one = read_series(folder / "stage1", ("l1", "lpips", "alignment"))
        sections.append(Section("Stage 1", "", Curves(stage_one, logarithmic=True)))
    sections.append(Section("Stage 2", "", Curves(stage_two, smoothing=5)))

    where = environment()
    versions = where["versions"]
    footer = (
        f"davae {versions['davae']}, commit {where['commit']}, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}, {where['cpu_count']} CPU cores, seed {seed}. An easy set: one style, aligned, and "
        "one image for a full caption."
    )
    return Report("davae demo: 256 px from a 128 px model, at the same 64 tokens", lead, sections, footer)


def describe_training(plan: Plan) -> str:
    """The steps of a run, and what they start from."""
    steps = f"{plan.stage_two_steps} steps of stage 2"
    if plan.stage_one_steps:
        return f"{plan.stage_one_steps} steps of stage 1 and {steps}"
    return f"{steps}, with the autoencoder of the shipped upgrade"


def make_generation_table(facts: Mapping[str, Any], plan: Plan, seed: int) -> Table:
    """Distances, attributes, tokens and times of each pipeline."""
    rows = []
    for title, timed, name in (
        (ENLARGED, BASE, ENLARGED),
        (f"{THIS_RUN}, {SIZE} px", SHIPPED, THIS_RUN),
        (f"{SHIPPED}, {SIZE} px", SHIPPED, SHIPPED),
        (NATIVE, NATIVE, None),
    ):
        row = [title]
        if name is None:
            row += ["-"] * 4
        else:
            numbers = facts["generation"][name]
            value, error = numbers["kid"]
            shares = numbers["attributes"].values()
            row += [f"{1000 * value:.1f} +- {1000 * error:.1f}", f"{numbers['lpips']:.3f}", f"{numbers['psnr']:.2f}"]
            row.append(f"{sum(shares) / len(shares):.3f}")
        speed = facts["speed"][timed]
        row += [f"{speed['tokens']}", f"{speed['step_milliseconds']:.0f}", f"{speed['seconds_per_picture']:.2f}"]
        rows.append(row)

    caption = (
        f"KID ({EfficientNetLite0Features.name}), LPIPS and PSNR of {plan.heldout} images to the exact images of their "
        f"captions, seed {seed}; attributes: mean share that is right. Times: medians of {plan.repeats} interleaved "
        f"runs, {plan.sampling_steps} steps with guidance; both upgraded pipelines have one shape and one time."
    )
    header = ["", "KID x 1000", "LPIPS", "PSNR, dB", "attributes", "tokens", "ms a step", "s an image"]
    return Table(header, rows, caption)
