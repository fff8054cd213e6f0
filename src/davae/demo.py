"""The whole main job on the shipped pair and pictures: train, upgrade, fine-tune, generate, measure, show."""

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
from davae.method.metrics import EfficientNetLite0Features
from davae.method.perceptual import LPIPS
from davae.pipelines.loading import load_autoencoder, load_base_vae, load_pipeline
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
"""How the small pair's pictures are made where they are measured; the demo itself takes fewer steps."""
SMALL_PAIR_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")


@dataclass(frozen=True)
class Budget:
    """How much the demo does."""

    stage_one_steps: int
    stage_two_steps: int
    pictures: int
    """Training pictures."""
    heldout: int
    """Held-out pictures that are reconstructed."""
    shown: int
    """Prompts in the figure."""
    generated: int
    """Images made for KID, of each pipeline."""
    sampling_steps: int
    repeats: int
    """Of each timing."""


BUDGETS = {
    "tiny": Budget(4, 4, pictures=32, heldout=8, shown=2, generated=8, sampling_steps=4, repeats=2),
    "short": Budget(200, 600, pictures=512, heldout=32, shown=8, generated=64, sampling_steps=16, repeats=3),
}


def stage_one_recipe(budget: Budget, seed: int) -> AutoencoderRecipe:
    """The demo's stage 1: from the closed-form start, detail latents what the base cannot say (recipes/ablations)."""
    return AutoencoderRecipe(
        code="residual",
        limit=budget.pictures,
        steps=budget.stage_one_steps,
        fit_pictures=64,
        calibration_pictures=256,
        crop=128,
        batch_size=4,
        learning_rate=3e-4,
        latent_noise=0.3,
        evaluate_every=100,
        heldout_pictures=budget.heldout,
        checkpoint_every=50,
        ema_decay=0.99,
        seed=seed,
        loss=LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=0.02),
    )


def stage_two_recipe(budget: Budget, seed: int, autoencoder: Path) -> FinetuneRecipe:
    """The demo's stage 2: the image stream's own weights and both ports."""
    return FinetuneRecipe(
        limit=budget.pictures,
        autoencoder=str(autoencoder),
        trained="layers",
        lora_targets=SMALL_PAIR_TARGETS,
        steps=budget.stage_two_steps,
        learning_rate=3e-3,
        warmup_steps=20,
        detail_warmup_steps=budget.stage_two_steps // 4,
        batch_size=16,
        prompt_tokens=PROMPT_TOKENS,
        checkpoint_every=50,
        ema_decay=0.99,
        seed=seed,
    )


def run_demo(folder: Path, budget: str = "short", seed: int = 0) -> Path:
    """Do the main job in `folder`; run again, it goes on where it stopped.

    Returns:
        The path of the page; its main figure lies beside it as figure.png.

    Raises:
        SettingsError: an unknown budget, or a folder that holds a demo with other settings.
        DavaeError: whatever the steps raise.
    """
    if budget not in BUDGETS:
        raise SettingsError(f"budget={budget!r}: allowed are {', '.join(BUDGETS)}")
    plan = BUDGETS[budget]
    _same_settings(folder, {"budget": budget, **asdict(plan), "seed": seed})
    console = Console(stderr=True)
    source = assets.pictures()
    heldout = open_pictures(source, size=SIZE, split="heldout", limit=plan.heldout)
    console.rule("1 of 5: the detail-aligned autoencoder (stage 1)")
    autoencoder = train_autoencoder(stage_one_recipe(plan, seed), folder / "stage1")
    console.rule("2 of 5: upgrade and fine-tuning (stage 2)")
    finetuned = finetune(stage_two_recipe(plan, seed, autoencoder), folder / "stage2")
    console.rule("3 of 5: reconstruction of held-out pictures")
    ways = reconstruction_ways(folder / "stage1" / "start", autoencoder)
    quality = _kept(folder / "reconstruction.json", lambda: reconstruction.measure(heldout, ways, lpips=LPIPS.alex()))
    console.rule("4 of 5: pictures from prompts")
    pipelines = {
        BASE: load_pipeline(assets.base_pipeline()),
        THIS_RUN: load_pipeline(finetuned),
        SHIPPED: load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()),
    }
    real = open_pictures(source, size=SIZE, limit=plan.generated)
    settings = {"steps": plan.sampling_steps, "prompt_tokens": PROMPT_TOKENS, "seed": seed}
    made = {
        name: generation.sample_many(pipeline, real.captions, folder / "pictures" / _slug(name), label=name, **settings)
        for name, pipeline in pipelines.items()
    }
    made[ENLARGED] = [enlarged(picture) for picture in made.pop(BASE)]
    kid = _kept(folder / "kid.json", lambda: measure_kid(made, real, seed))
    console.rule("5 of 5: speed")
    speed = _kept(folder / "speed.json", lambda: measure_speed(pipelines, plan, seed))
    facts = {"reconstruction": quality, "kid": kid, "speed": speed}
    write_json(folder / "result.json", {**facts, "budget": asdict(plan), "seed": seed, "environment": environment()})
    figure = main_figure(made, real, plan.shown)
    write_figure(folder / "figure.png", figure, title="Same prompts, same noise, 64 tokens everywhere")
    rows = range(0, plan.heldout, plan.heldout // 4)
    gallery = reconstruction.gallery(heldout, rows, ways, differences=[ENLARGED, THIS_RUN])
    write_page(folder / "index.html", demo_page(facts, figure, gallery, folder, plan, seed))
    return folder / "index.html"


def reconstruction_ways(start: Path, trained: Path) -> dict[str, reconstruction.Way]:
    """By name: the base's two bounds, the closed-form start, what this run trained, and what is shipped."""
    vae = load_base_vae(str(assets.base_pipeline()))
    shipped = load_autoencoder(assets.upgrade(), base=vae)
    return {
        ENLARGED: reconstruction.base_enlarged(vae, shipped),
        CLOSED_FORM: reconstruction.upgraded(load_autoencoder(start)),
        THIS_RUN: reconstruction.upgraded(load_autoencoder(trained)),
        SHIPPED: reconstruction.upgraded(shipped),
        FULL: reconstruction.base_at_full_size(vae),
    }


def enlarged(picture: Tensor) -> Tensor:
    """A picture of half the size, uint8 [3, H, W], enlarged with bicubic."""
    image = F.interpolate(picture[None].float() / 127.5 - 1, scale_factor=2, mode="bicubic")
    return to_bytes(image[0])


def measure_kid(made: dict[str, list[Tensor]], real: PictureSet, seed: int) -> dict[str, list[float]]:
    """KID and its error of every set of made pictures against the real ones; empty without the `eval` extra."""
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return {}
    references = generation.extract_features([real.image(index) for index in range(len(real))], side=SIZE)
    return {
        name: list(generation.kid_with_error(generation.extract_features(pictures, side=SIZE), references, seed=seed))
        for name, pictures in track(list(made.items()), "features for KID", unit="sets")
    }


def measure_speed(pipelines: dict[str, DiffusionPipeline], plan: Budget, seed: int) -> dict[str, dict[str, float]]:
    """Tokens, parameters, seconds per picture and milliseconds per transformer step: medians of interleaved runs."""
    settings = {"seed": seed, "steps": plan.sampling_steps, "prompt_tokens": PROMPT_TOKENS}
    cases = {
        BASE: Case(BASE, pipelines[BASE], SIZE // 2, **settings),
        SHIPPED: Case(SHIPPED, pipelines[SHIPPED], SIZE, **settings),
        NATIVE: Case(NATIVE, pipelines[BASE], SIZE, **settings),
    }
    seconds: dict[str, dict[str, float]] = {}
    for part in track(("step", "whole"), "timing", unit="parts"):
        runs = {name: make_runs(case, [part])[part] for name, case in cases.items()}
        found = measure_interleaved(runs, torch.device("cpu"), repeats=plan.repeats, warm_up=1)
        seconds[part] = {name: compute_spread(measured.seconds).median for name, measured in found.items()}
    return {
        name: {
            "tokens": case.tokens,
            "parameters": count_part_parameters(case)["transformer"],
            "seconds_per_picture": seconds["whole"][name],
            "step_milliseconds": 1000 * seconds["step"][name],
        }
        for name, case in cases.items()
    }


def main_figure(made: dict[str, list[Tensor]], real: PictureSet, shown: int) -> ImageGrid:
    """The prompts' pictures side by side."""
    indices = [len(real) * position // shown for position in range(shown)]
    columns = {name: made[name] for name in (ENLARGED, THIS_RUN, SHIPPED)}
    return ImageGrid(
        columns=[*columns, "real picture"],
        rows=[real.captions[index] for index in indices],
        cells=[[*(pictures[index] for pictures in columns.values()), real.image(index)] for index in indices],
        notes=["128 px, enlarged; 64 tokens", "256 px; 64 tokens", "256 px; 64 tokens", "256 px"],
        caption="Same prompts, and the same noise on the base channels.",
    )


def demo_page(
    facts: dict[str, Any], figure: ImageGrid, gallery: ImageGrid, folder: Path, plan: Budget, seed: int
) -> Report:
    """The page: figure, reconstruction, numbers, curves."""
    quality, speed = facts["reconstruction"], facts["speed"]
    gain = quality[THIS_RUN]["psnr"] - quality[ENLARGED]["psnr"]
    native = speed[NATIVE]["seconds_per_picture"] / speed[SHIPPED]["seconds_per_picture"]
    stage_one, stage_two = (read_metrics(folder / stage / "metrics.jsonl") for stage in ("stage1", "stage2"))
    where = environment()
    return Report(
        "davae demo: 256 px from a 128 px model, at the same 64 tokens",
        f"{plan.stage_one_steps} steps of stage 1 and {plan.stage_two_steps} of stage 2 on this machine: held-out "
        f"reconstruction {gain:+.2f} dB over base + bicubic, and {native:.1f} times the speed of the base at 256 px.",
        [
            Section("Images from prompts", "", figure),
            Section(
                "Reconstruction of held-out pictures",
                "What is lost between a picture and its latents, on pictures that no training saw. The closed-form "
                "start is the autoencoder before any training.",
                reconstruction.table(quality, caption=f"Means over {plan.heldout} held-out pictures at {SIZE} px."),
            ),
            Section("Reconstructions", "", gallery),
            Section("Cost and distance to real pictures", "", _cost_table(facts, plan, seed)),
            Section("Stage 1", "", Curves(_series(stage_one, ("l1", "lpips", "alignment")), logarithmic=True)),
            Section("Stage 2", "", Curves(_series(stage_two, ("base_loss", "detail_loss")), smoothing=5)),
        ],
        footer=f"davae {where['versions']['davae']}, commit {where['commit']}, torch {where['versions']['torch']}, "
        f"diffusers {where['versions']['diffusers']}, {where['cpu_count']} CPU cores, seed {seed}.",
    )


def _cost_table(facts: dict[str, Any], plan: Budget, seed: int) -> Table:
    speed, kid = facts["speed"], facts["kid"]

    def distance(name: str) -> str:
        return f"{1000 * kid[name][0]:.1f} +- {1000 * kid[name][1]:.1f}" if name in kid else "-"

    def row(title: str, cost: str, distance_of: str) -> list[str]:
        case = speed[cost]
        return [
            title,
            f"{case['tokens']}",
            f"{case['parameters'] / 1e6:.2f} M",
            f"{case['step_milliseconds']:.0f}",
            f"{case['seconds_per_picture']:.2f}",
            distance(distance_of),
        ]

    return Table(
        ["", "tokens", "transformer", "ms a step", "s a picture", "KID x 1000"],
        [
            row(ENLARGED, BASE, ENLARGED),
            row(f"{THIS_RUN}, 256 px", SHIPPED, THIS_RUN),
            row(f"{SHIPPED}, 256 px", SHIPPED, SHIPPED),
            row(NATIVE, NATIVE, ""),
        ],
        caption=f"Times: medians of {plan.repeats} interleaved runs, {plan.sampling_steps} steps with guidance; both "
        f"upgraded pipelines have one shape and one time. KID ({EfficientNetLite0Features.name}) of {plan.generated} "
        f"pictures against {plan.generated} real ones, seed {seed}, with its standard error.",
    )


def _series(metrics: list[dict[str, Any]], names: Sequence[str]) -> list[Series]:
    lines = [line for line in metrics if names[0] in line]
    steps = [line["step"] for line in lines]
    return [Series(name.replace("_", " "), steps, [line[name] for line in lines]) for name in names]


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, out of `path` if an earlier run has written it there; nothing is not kept."""
    if not path.is_file():
        found = make()
        if not found:
            return found
        write_json(path, found)
    return json.loads(path.read_bytes())


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    given = _kept(folder / "settings.json", lambda: settings)
    if given != settings:
        raise SettingsError(f"{folder} holds a demo with {given}, not {settings}: remove it or give another --out")


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")
