"""The demo on the shipped pair and images: train, upgrade, fine-tune, generate, measure, show."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from rich.console import Console
from torch import Tensor

from davae import assets
from davae.cost.cases import Case, count_part_parameters, make_runs
from davae.cost.timing import compute_spread, measure_interleaved
from davae.data.pictures import to_bytes
from davae.data.sources import PictureSet, open_pictures
from davae.errors import SettingsError
from davae.evaluation import generation, reconstruction
from davae.evaluation.report import Curves, ImageGrid, Report, Section, Series, Table, write_figure, write_page
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer
from davae.method.metrics import EfficientNetLite0Features
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.run.progress import track
from davae.run.record import environment, read_metrics
from davae.run.storage import write_json
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

BASE, NATIVE, ENLARGED = "base, 128 px", "base, run at 256 px", "base + bicubic"
THIS_RUN, SHIPPED = "this run", "shipped upgrade"
CLOSED_FORM, FULL = "closed-form start", "base at full size"
SIZE = 256
PROMPT_TOKENS = 12
"""Length that the small base was trained with, most of the time."""
SAMPLING: dict[str, Any] = {"steps": 20, "guidance_scale": 2.5, "prompt_tokens": PROMPT_TOKENS}
"""How the small pair's images are made where they are measured; the demo itself takes fewer steps."""
SMALL_PAIR_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")


@dataclass(frozen=True)
class Plan:
    """How much the demo does."""

    stage_one_steps: int
    stage_two_steps: int
    pictures: int
    """Training images."""
    heldout: int
    """Held-out images that are reconstructed."""
    shown: int
    """Prompts in the figure."""
    generated: int
    """Images of each pipeline, for KID."""
    sampling_steps: int
    repeats: int
    """Of each timing."""


PLANS = {
    "tiny": Plan(4, 4, pictures=32, heldout=8, shown=2, generated=8, sampling_steps=4, repeats=2),
    "short": Plan(200, 600, pictures=512, heldout=32, shown=8, generated=64, sampling_steps=16, repeats=3),
}


def stage_one_recipe(plan: Plan, seed: int) -> AutoencoderRecipe:
    """The demo's stage 1: the closed-form start, with detail latents for the base's residual (recipes/ablations)."""
    loss = LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=0.02)

    return AutoencoderRecipe(
        code="residual",
        limit=plan.pictures,
        steps=plan.stage_one_steps,
        fit_pictures=64,
        calibration_pictures=256,
        crop=128,
        batch_size=4,
        learning_rate=3e-4,
        latent_noise=0.3,
        evaluate_every=100,
        heldout_pictures=plan.heldout,
        checkpoint_every=50,
        ema_decay=0.99,
        seed=seed,
        loss=loss,
    )


def stage_two_recipe(plan: Plan, seed: int, autoencoder: Path) -> FinetuneRecipe:
    """The demo's stage 2: the weights of the image stream and both ports."""
    # The detail part of the loss is faded in over the first quarter.
    detail_warmup_steps = plan.stage_two_steps // 4

    return FinetuneRecipe(
        limit=plan.pictures,
        autoencoder=str(autoencoder),
        trained="layers",
        lora_targets=SMALL_PAIR_TARGETS,
        steps=plan.stage_two_steps,
        learning_rate=3e-3,
        warmup_steps=20,
        detail_warmup_steps=detail_warmup_steps,
        batch_size=16,
        prompt_tokens=PROMPT_TOKENS,
        checkpoint_every=50,
        ema_decay=0.99,
        seed=seed,
    )


def run_demo(folder: Path, budget: str = "short", seed: int = 0) -> Path:
    """Run the demo in `folder`; a second call resumes it.

    Returns:
        The path of the page; its main figure lies beside it as figure.png.

    Raises:
        SettingsError: an unknown budget, or a folder that holds a demo with other settings.
        DavaeError: whatever the steps raise.
    """
    if budget not in PLANS:
        raise SettingsError(f"budget={budget!r}: allowed are {', '.join(PLANS)}")
    plan = PLANS[budget]
    _check_settings(folder, {"budget": budget, **asdict(plan), "seed": seed})
    console = Console(stderr=True)

    console.rule("1 of 5: the detail-aligned autoencoder (stage 1)")
    autoencoder = train_autoencoder(stage_one_recipe(plan, seed), folder / "stage1")

    console.rule("2 of 5: upgrade and fine-tuning (stage 2)")
    finetuned = finetune(stage_two_recipe(plan, seed, autoencoder), folder / "stage2")

    console.rule("3 of 5: reconstruction of held-out images")
    heldout = open_pictures(assets.pictures(), size=SIZE, split="heldout", limit=plan.heldout)
    ways = load_ways(folder / "stage1" / "start", autoencoder)
    quality = _once(folder / "reconstruction.json", lambda: reconstruction.measure(heldout, ways, lpips=LPIPS.alex()))

    console.rule("4 of 5: images from prompts")
    real = open_pictures(assets.pictures(), size=SIZE, limit=plan.generated)
    pipelines = {
        BASE: load_pipeline(assets.base_pipeline()),
        THIS_RUN: load_pipeline(finetuned),
        SHIPPED: load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()),
    }
    images = generate_images(pipelines, real.captions, folder / "pictures", plan, seed)
    kid = _once(folder / "kid.json", lambda: measure_kid(images, real, seed))

    console.rule("5 of 5: speed")
    speed = _once(folder / "speed.json", lambda: measure_speed(pipelines, plan, seed))

    # Numbers, figure, page.
    facts = {"reconstruction": quality, "kid": kid, "speed": speed}
    write_json(folder / "result.json", {**facts, "budget": asdict(plan), "seed": seed, "environment": environment()})
    figure = make_figure(images, real, plan.shown)
    write_figure(folder / "figure.png", figure, title="Same prompts, same noise, 64 tokens everywhere")
    rows = range(0, plan.heldout, plan.heldout // 4)
    gallery = reconstruction.make_gallery(heldout, rows, ways, differences=[ENLARGED, THIS_RUN])
    write_page(folder / "index.html", make_page(facts, figure, gallery, folder, plan, seed))
    return folder / "index.html"


def load_ways(start: Path, trained: Path) -> dict[str, reconstruction.Way]:
    """The base's two bounds, the closed-form start, this run's autoencoder and the shipped one, by name."""
    vae = load_base_vae(str(assets.base_pipeline()))
    shipped = load_autoencoder(assets.upgrade(), base=vae)
    return {
        ENLARGED: enlarge_base(vae, shipped),
        CLOSED_FORM: make_tokenizer(load_autoencoder(start)),
        THIS_RUN: make_tokenizer(load_autoencoder(trained)),
        SHIPPED: make_tokenizer(shipped),
        FULL: make_tokenizer(vae),
    }


def generate_images(
    pipelines: dict[str, DiffusionPipeline], captions: Sequence[str], folder: Path, plan: Plan, seed: int
) -> dict[str, list[Tensor]]:
    """Images of each pipeline at 256 px, by name; the base's are enlarged."""
    settings = {"steps": plan.sampling_steps, "prompt_tokens": PROMPT_TOKENS, "seed": seed}
    images = {}
    for name, pipeline in pipelines.items():
        place = folder / name.replace(",", "").replace(" ", "-")
        images[name] = generation.sample_many(pipeline, captions, place, label=name, **settings)
    images[ENLARGED] = [enlarge(image) for image in images.pop(BASE)]
    return images


def enlarge(image: Tensor) -> Tensor:
    """An image of half the size, uint8 [3, H, W], enlarged with bicubic."""
    pixels = F.interpolate(image[None].float() / 127.5 - 1, scale_factor=2, mode="bicubic")
    return to_bytes(pixels[0])


def measure_kid(images: dict[str, list[Tensor]], real: PictureSet, seed: int) -> dict[str, list[float]]:
    """KID and its error of each set of images against the real ones; empty without the `eval` extra."""
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return {}
    # Features of the real images once, of each set in turn.
    references = generation.extract_features([real.image(index) for index in range(len(real))], side=SIZE)
    distances = {}
    for name in track(list(images), "features for KID", unit="sets"):
        features = generation.extract_features(images[name], side=SIZE)
        distances[name] = list(generation.kid_with_error(features, references, seed=seed))
    return distances


def measure_speed(pipelines: dict[str, DiffusionPipeline], plan: Plan, seed: int) -> dict[str, dict[str, float]]:
    """Tokens, parameters, seconds per image and milliseconds per transformer step: medians of interleaved runs."""
    settings = {"seed": seed, "steps": plan.sampling_steps, "prompt_tokens": PROMPT_TOKENS}
    cases = {
        BASE: Case(BASE, pipelines[BASE], SIZE // 2, **settings),
        SHIPPED: Case(SHIPPED, pipelines[SHIPPED], SIZE, **settings),
        NATIVE: Case(NATIVE, pipelines[BASE], SIZE, **settings),
    }

    # All cases in turns, so that a busy moment hits each of them.
    medians: dict[tuple[str, str], float] = {}
    for part in track(("step", "whole"), "timing", unit="parts"):
        runs = {name: make_runs(case, [part])[part] for name, case in cases.items()}
        times = measure_interleaved(runs, torch.device("cpu"), repeats=plan.repeats, warm_up=1)
        for name, measured in times.items():
            medians[name, part] = compute_spread(measured.seconds).median

    speed = {}
    for name, case in cases.items():
        speed[name] = {
            "tokens": case.tokens,
            "parameters": count_part_parameters(case)["transformer"],
            "seconds_per_picture": medians[name, "whole"],
            "step_milliseconds": 1000 * medians[name, "step"],
        }
    return speed


def make_figure(images: dict[str, list[Tensor]], real: PictureSet, shown: int) -> ImageGrid:
    """The images of some prompts side by side."""
    columns = (ENLARGED, THIS_RUN, SHIPPED)
    rows, cells = [], []
    for position in range(shown):
        index = len(real) * position // shown
        rows.append(real.captions[index])
        cells.append([*(images[name][index] for name in columns), real.image(index)])
    notes = ["128 px, enlarged; 64 tokens", "256 px; 64 tokens", "256 px; 64 tokens", "256 px"]
    caption = "Same prompts, and the same noise on the base channels."
    return ImageGrid([*columns, "real image"], rows, cells, notes=notes, caption=caption)


def make_page(
    facts: dict[str, Any], figure: ImageGrid, gallery: ImageGrid, folder: Path, plan: Plan, seed: int
) -> Report:
    """The page: figure, reconstruction, numbers, curves."""
    quality, speed = facts["reconstruction"], facts["speed"]
    gain = quality[THIS_RUN]["psnr"] - quality[ENLARGED]["psnr"]
    speedup = speed[NATIVE]["seconds_per_picture"] / speed[SHIPPED]["seconds_per_picture"]
    lead = (
        f"{plan.stage_one_steps} steps of stage 1 and {plan.stage_two_steps} of stage 2 on this machine: held-out "
        f"reconstruction {gain:+.2f} dB over base + bicubic, and {speedup:.1f} times the speed of the base at 256 px."
    )
    explanation = (
        "The difference between an image and its reconstruction from latents, on images that no training saw. The "
        "closed-form start is the autoencoder before any training."
    )

    caption = f"Means over {plan.heldout} held-out images at {SIZE} px."
    table = reconstruction.make_table(quality, caption=caption)
    # Training curves.
    stage_one = _read_series(folder / "stage1", ("l1", "lpips", "alignment"))
    stage_two = _read_series(folder / "stage2", ("base_loss", "detail_loss"))
    sections = [
        Section("Images from prompts", "", figure),
        Section("Reconstruction of held-out images", explanation, table),
        Section("Reconstructions", "", gallery),
        Section("Cost and distance to real images", "", make_cost_table(facts, plan, seed)),
        Section("Stage 1", "", Curves(stage_one, logarithmic=True)),
        Section("Stage 2", "", Curves(stage_two, smoothing=5)),
    ]

    where = environment()
    versions = where["versions"]
    footer = (
        f"davae {versions['davae']}, commit {where['commit']}, torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}, {where['cpu_count']} CPU cores, seed {seed}."
    )
    return Report("davae demo: 256 px from a 128 px model, at the same 64 tokens", lead, sections, footer)


def make_cost_table(facts: dict[str, Any], plan: Plan, seed: int) -> Table:
    """Tokens, parameters, times and KID of each pipeline."""
    rows = []
    for title, timed, generated in (
        (ENLARGED, BASE, ENLARGED),
        (f"{THIS_RUN}, 256 px", SHIPPED, THIS_RUN),
        (f"{SHIPPED}, 256 px", SHIPPED, SHIPPED),
        (NATIVE, NATIVE, None),
    ):
        speed = facts["speed"][timed]
        row = [title, f"{speed['tokens']}", f"{speed['parameters'] / 1e6:.2f} M"]
        row += [f"{speed['step_milliseconds']:.0f}", f"{speed['seconds_per_picture']:.2f}"]
        if generated in facts["kid"]:
            value, error = facts["kid"][generated]
            row.append(f"{1000 * value:.1f} +- {1000 * error:.1f}")
        else:
            row.append("-")
        rows.append(row)

    caption = (
        f"Times: medians of {plan.repeats} interleaved runs, {plan.sampling_steps} steps with guidance; both upgraded "
        f"pipelines have one shape and one time. KID ({EfficientNetLite0Features.name}) of {plan.generated} images "
        f"against {plan.generated} real ones, seed {seed}, with its standard error."
    )
    return Table(["", "tokens", "transformer", "ms a step", "s an image", "KID x 1000"], rows, caption)


def _read_series(run: Path, names: Sequence[str]) -> list[Series]:
    """Curves of the losses in a run's log, in which held-out values have lines of their own."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if names[0] in line]
    steps = [line["step"] for line in lines]
    return [Series(name.replace("_", " "), steps, [line[name] for line in lines]) for name in names]


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `make`, which an earlier run may have written to `path`; an empty one is not written."""
    if not path.is_file():
        result = make()
        if not result:
            return result
        write_json(path, result)
    return json.loads(path.read_bytes())


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds a demo with other settings, or another program's figure."""
    if (folder / "figure.png").exists() and not (folder / "settings.json").is_file():
        raise SettingsError(f"{folder} has a figure.png and no settings.json, so that is no demo's: give another --out")
    written = _once(folder / "settings.json", lambda: settings)
    if written != settings:
        raise SettingsError(f"{folder} holds a demo with {written}, not {settings}: remove it or give another --out")
