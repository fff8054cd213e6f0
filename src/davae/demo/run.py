"""The demo on the shipped pair: draw, train both stages, generate from held-out prompts, measure, show."""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from torch import Tensor

from davae import assets
from davae.cost.cases import Case, count_part_parameters, make_runs
from davae.cost.timing import compute_spread, measure_interleaved
from davae.data import avatars
from davae.data.avatar_shards import write_avatar_shards
from davae.data.pictures import to_floats
from davae.data.sources import PictureSet, open_pictures
from davae.demo.page import (
    BASE,
    CLOSED_FORM,
    ENLARGED,
    FULL,
    NATIVE,
    SHIPPED,
    THIS_RUN,
    describe_training,
    make_figure,
    make_page,
)
from davae.demo.plan import AVATARS_PER_SEED, PLANS, Plan, stage_one_recipe, stage_two_recipe
from davae.demo.prompts import SAMPLING, SIZE
from davae.errors import SettingsError
from davae.evaluation import reconstruction
from davae.evaluation.attributes import SIDE, accuracy, read_attributes
from davae.evaluation.generation import extract_features, kid_with_error, resize, sample_many
from davae.evaluation.report import ImageGrid, write_figure, write_page
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer
from davae.method.metrics import METRICS, EfficientNetLite0Features, compare_images
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.run.progress import track
from davae.run.record import environment
from davae.run.storage import write_json
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_run import finetune


def run_demo(
    folder: Path, budget: str = "short", seed: int = 0, *, base: Path | None = None, adapter: Path | None = None
) -> Path:
    """Run the demo in `folder`; a second call resumes it.

    Args:
        folder: of the run.
        budget: how much it does, a key of `PLANS`.
        seed: of every random number, and of the people in the images.
        base: folder of the base pipeline; by default the shipped one.
        adapter: folder of its finished upgrade; by default the shipped one.

    Returns:
        The path of the page; its main figure lies beside it as figure.png.

    Raises:
        SettingsError: an unknown budget, a folder that holds a demo with other settings, or an extra is missing.
        DavaeError: whatever the steps raise.
    """
    if budget not in PLANS:
        raise SettingsError(f"budget={budget!r}: allowed are {', '.join(PLANS)}")
    plan = PLANS[budget]
    base, adapter = base or assets.base_pipeline(), adapter or assets.upgrade()
    EfficientNetLite0Features()  # if an extra is missing, say so before the training
    _check_settings(folder, {"budget": budget, **asdict(plan), "seed": seed})
    console = Console(stderr=True)
    console.print(f"{describe_training(plan)}, from the shipped base")

    console.rule("1 of 6: images")
    counts, start = {"training": plan.images, "held_out": plan.heldout}, AVATARS_PER_SEED * (seed + 1)
    images = write_avatar_shards(folder / "images", **counts, size=SIZE, start=start)

    if plan.stage_one_steps:
        console.rule("2 of 6: the detail-aligned autoencoder (stage 1)")
        autoencoder = train_autoencoder(stage_one_recipe(plan, seed, images, base), folder / "stage1")
    else:
        console.rule("2 of 6: the shipped upgrade's autoencoder, instead of a stage 1")
        autoencoder = adapter

    console.rule("3 of 6: upgrade and fine-tuning (stage 2)")
    finetuned = finetune(stage_two_recipe(plan, seed, images, base, autoencoder), folder / "stage2")

    console.rule("4 of 6: reconstruction of held-out images")
    real = open_pictures(images, size=SIZE, split="heldout")
    ways = load_ways(base, folder / "stage1", adapter)
    quality = _once(folder / "reconstruction.json", lambda: reconstruction.measure(real, ways, lpips=LPIPS.alex()))

    console.rule("5 of 6: images from held-out prompts")
    pipelines = {BASE: load_pipeline(base), THIS_RUN: load_pipeline(finetuned)}
    pipelines[SHIPPED] = load_pipeline(base, adapter=adapter)
    made = generate_images(pipelines, real.captions, folder / "pictures", plan, seed)
    generation = _once(folder / "generation.json", lambda: measure_images(made, real, start, seed))

    console.rule("6 of 6: speed")
    speed = _once(folder / "speed.json", lambda: measure_speed(pipelines, plan, seed))

    facts = {"reconstruction": quality, "generation": generation, "speed": speed}
    rows = range(0, plan.heldout, plan.heldout // 4)
    gallery = reconstruction.make_gallery(real, rows, ways, differences=[ENLARGED, SHIPPED])
    return write_results(facts, make_figure(made, real, plan.shown), gallery, folder, plan, seed)


def write_results(
    facts: dict[str, Any], figure: ImageGrid, gallery: ImageGrid, folder: Path, plan: Plan, seed: int
) -> Path:
    """Write numbers, figure and page."""
    write_json(folder / "result.json", {**facts, "budget": asdict(plan), "seed": seed, "environment": environment()})
    write_figure(folder / "figure.png", figure, title="Same prompts, same noise, 64 tokens everywhere")
    write_page(folder / "index.html", make_page(facts, figure, gallery, folder, plan, seed))
    return folder / "index.html"


def load_ways(base: Path, stage_one: Path, adapter: Path) -> dict[str, reconstruction.Way]:
    """The base's two bounds, the shipped autoencoder and, of a run with a stage 1, its start and end, by name."""
    vae = load_base_vae(str(base))
    shipped = load_autoencoder(adapter, base=vae)
    ways = {ENLARGED: enlarge_base(vae, shipped)}
    if stage_one.is_dir():
        ways[CLOSED_FORM] = make_tokenizer(load_autoencoder(stage_one / "start"))
        ways[THIS_RUN] = make_tokenizer(load_autoencoder(stage_one / "autoencoder"))
    return {**ways, SHIPPED: make_tokenizer(shipped), FULL: make_tokenizer(vae)}


def generate_images(
    pipelines: Mapping[str, DiffusionPipeline], captions: Sequence[str], folder: Path, plan: Plan, seed: int
) -> dict[str, list[Tensor]]:
    """Images of each pipeline at 256 px, by name; the base's are enlarged."""
    settings = {**SAMPLING, "steps": plan.sampling_steps, "seed": seed}
    made = {}
    for name, pipeline in pipelines.items():
        place = folder / name.replace(",", "").replace(" ", "-")
        made[name] = sample_many(pipeline, captions, place, label=name, **settings)
    made[ENLARGED] = [resize(image, SIZE) for image in made.pop(BASE)]
    return made


@torch.no_grad()
def measure_images(
    made: Mapping[str, list[Tensor]], real: PictureSet, start: int, seed: int
) -> dict[str, dict[str, Any]]:
    """By set: KID and its error, distances to the exact images, and the shares of attributes that are right."""
    exact = [real.image(index) for index in range(len(real))]
    references = extract_features(exact, side=SIZE)
    lpips = LPIPS.alex()

    facts: dict[str, dict[str, Any]] = {}
    for name, images in track(list(made.items()), "distances", unit="sets"):
        distances = compare_images(to_floats(torch.stack(images)), to_floats(torch.stack(exact)), lpips)
        means = distances.mean(dim=-1).tolist()
        kid = kid_with_error(extract_features(images, side=SIZE), references, seed=seed)
        facts[name] = {"kid": list(kid), **dict(zip(METRICS, means, strict=True))}

    # The same people in the same order as in the set.
    numbers = itertools.islice(avatars.numbers(held_out=True, start=start), len(real))
    answers: defaultdict[str, list[dict[str, bool]]] = defaultdict(list)
    for index, number in enumerate(track(list(numbers), "reading attributes", unit="images")):
        shown = {name: resize(images[index], SIDE) for name, images in made.items()}
        for name, right in read_attributes(shown, avatars.draw_attributes(number)).items():
            answers[name].append(right)
    for name, rights in answers.items():
        facts[name]["attributes"] = {key: share for key, (share, _) in accuracy(rights).items()}
    return facts


def measure_speed(pipelines: Mapping[str, DiffusionPipeline], plan: Plan, seed: int) -> dict[str, dict[str, float]]:
    """Tokens, parameters, seconds per image and milliseconds per transformer step: medians of interleaved runs."""
    settings: dict[str, Any] = {"seed": seed, "steps": plan.sampling_steps, "prompt_tokens": SAMPLING["prompt_tokens"]}
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


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `make`, which an earlier run may have written to `path`."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_bytes())


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds a demo with other settings, or another program's figure."""
    if (folder / "figure.png").exists() and not (folder / "settings.json").is_file():
        raise SettingsError(f"{folder} has a figure.png and no settings.json, so that is no demo's: give another --out")
    written = _once(folder / "settings.json", lambda: settings)
    if written != settings:
        raise SettingsError(f"{folder} holds a demo with {written}, not {settings}: remove it or give another --out")
