"""Larger steps for the small pair: 128 -> 512 px at 64 tokens, s = 4 in one go against 2 x 2, an upgrade upgraded.

    python recipes/larger_steps/build_pictures.py ...    # says what it needs
    python recipes/larger_steps/run.py runs/larger_steps

The first step of 2 x 2 is the shipped upgrade, 128 -> 256 px; it and s = 4 have 64 latent channels in the end. "s = 4,
r = 2" has 48, which the transformer's width holds. All have equal pictures, crops, steps and batches here.

Writes RUN/result.json (copied into experiments/results/larger_steps.json) after stage 1. --stage-two adds its losses,
KID of images from prompts, times, and RUN/samples.png: prompts from top to bottom; from left to right base, shipped
upgrade, and the arms, all at 512 px. The first two were trained on images in another style. --arm limits stage 2 to
some arms. --steps changes its length, and its numbers are then in RUN/result-STEPS.json. The same command resumes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from torch import Tensor

from davae import assets, demo
from davae.cost.cases import Case, make_runs
from davae.cost.timing import compute_spread, measure_interleaved
from davae.data.pictures import write_png
from davae.data.sources import open_pictures
from davae.evaluation import generation
from davae.evaluation.reconstruction import measure
from davae.evaluation.tokenizers import enlarge_base, make_tokenizer
from davae.method.perceptual import LPIPS
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.run.recipe import load_recipe
from davae.run.record import environment, read_metrics
from davae.run.storage import read_json, write_json
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

HERE = Path(__file__).parent
ONE_GO, NARROW, TWICE = "s = 4", "s = 4, r = 2", "2 x 2"
SIZE = 512
SAMPLING = {"seed": 0, **demo.SAMPLING}


def prepare_arms(run: Path) -> dict[str, dict[str, Any]]:
    """The settings of each arm in stage 1; writes the base of the second step of 2 x 2."""
    once = run / "once"
    if not once.is_dir():
        save_pipeline(load_pipeline(assets.base_pipeline(), adapter=assets.upgrade()), once)
    twice = {"base": str(once), "resolution_factor": 2, "detail_channels": 32}
    return {ONE_GO: {}, NARROW: {"detail_channels": 32}, TWICE: twice}


def reconstruct(autoencoders: dict[str, Path], pictures: Path, once: Path, count: int) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS of held-out images at 512 px."""
    vae, first = load_base_vae(str(assets.base_pipeline())), load_base_vae(str(once))
    made = {name: load_autoencoder(folder) for name, folder in autoencoders.items()}

    heldout = open_pictures(pictures, size=SIZE, split="heldout", limit=count)
    ways = {
        "base + bicubic": enlarge_base(vae, made[ONE_GO]),
        "shipped upgrade at 256 px + bicubic": enlarge_base(first, made[TWICE]),
        **{name: make_tokenizer(autoencoder) for name, autoencoder in made.items()},
        "base at full size": make_tokenizer(vae),
    }

    small = open_pictures(pictures, size=SIZE // 4, split="heldout", limit=count)
    lpips = LPIPS.alex()
    return {
        "reconstruction_512": measure(heldout, ways, lpips=lpips),
        "base_reconstruction_128": measure(small, {"base": make_tokenizer(vae)}, lpips=lpips),
        "heldout": len(heldout),
    }


def read_heldout(folders: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """Stage 1's log of its few held-out images, before the first step and at the end."""
    names = ("step", "heldout_psnr", "heldout_ssim", "heldout_lpips")
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in folders}
    for arm, folder in folders.items():
        for row in read_metrics(folder / "stage1" / "metrics.jsonl"):
            if "heldout_psnr" in row:
                rows[arm].append({name: row[name] for name in names})
    return rows


def measure_distances(
    pipelines: dict[str, DiffusionPipeline], pictures: Path, folder: Path, count: int
) -> dict[str, Any]:
    """KID at 512 px of images from prompts, and of the same images reduced to 128 px and enlarged."""
    real = open_pictures(pictures, size=SIZE, limit=count)
    prompts = generation.repeat_captions(real, count)
    references = generation.extract_features([real.image(index) for index in range(len(real))], side=SIZE)

    distances = {}
    for name, pipeline in pipelines.items():
        images = generation.sample_many(pipeline, prompts, folder / name, label=name, **SAMPLING)
        reduced = [generation.resize(generation.resize(image, SIZE // 4), SIZE) for image in images]
        for title, compared in {name: images, f"{name}, reduced to 128 px + bicubic": reduced}.items():
            features = generation.extract_features(compared, side=SIZE)
            value, error = generation.kid_with_error(features, references, seed=SAMPLING["seed"])
            distances[title] = {"kid": value, "kid_error": error, "count": count}
    return distances


def measure_times(pipelines: dict[str, DiffusionPipeline], base: DiffusionPipeline) -> dict[str, Any]:
    """Seconds of a guided step and of an image, interleaved; the base at 512 px has 16 times the tokens."""
    wide = SD3Transformer2DModel.from_config({**base.transformer.config, "pos_embed_max_size": SIZE // 16})
    native = type(base)(**{**base.components, "transformer": wide.eval()})
    options = {"steps": SAMPLING["steps"], "prompt_tokens": SAMPLING["prompt_tokens"]}
    cases = {name: Case(name, pipeline, SIZE, **options) for name, pipeline in pipelines.items()}
    cases["base at 512 px, untrained"] = Case("native", native, SIZE, **options)
    cases["base at 128 px"] = Case("base", base, SIZE // 4, **options)

    parts = ("step", "decode", "whole")
    runs = {}
    for name, case in cases.items():
        for part, run in make_runs(case, parts).items():
            runs[f"{name}: {part}"] = run
    measured = measure_interleaved(runs, torch.device("cpu"), repeats=7, warm_up=1, shortest=0.2)

    times: dict[str, Any] = {name: {"tokens": case.tokens} for name, case in cases.items()}
    for name in cases:
        for part in parts:
            times[name][part] = asdict(compute_spread(measured[f"{name}: {part}"].seconds))
    return times


def main(
    run: Path,
    heldout: Annotated[int, typer.Option(help="Held-out images that are reconstructed.")] = 32,
    stage_two: Annotated[bool, typer.Option(help="Also train and sample the transformers.")] = False,
    arm: Annotated[list[str] | None, typer.Option(help="An arm of stage 2; by default all.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of stage 2; by default the recipe's.")] = None,
    count: Annotated[int, typer.Option(help="Images from prompts for KID.")] = 400,
) -> None:
    """Train all arms, and write the numbers."""
    arms, once = prepare_arms(run), run / "once"
    folders = {name: run / name.replace(" ", "") for name in arms}

    # Stage 1 of all arms.
    autoencoders = {}
    for name, changes in arms.items():
        recipe = load_recipe(AutoencoderRecipe, HERE / "stage1.toml", changes)
        autoencoders[name] = folders[name] / "stage1" / "autoencoder"
        if not (folders[name] / "stage1" / "result.json").exists():  # it would calibrate and measure again
            train_autoencoder(recipe, folders[name] / "stage1")

    numbers = run / "reconstruction.json"
    if not numbers.exists():
        write_json(numbers, reconstruct(autoencoders, Path(recipe.pictures), once, heldout))
    result = {**read_json(numbers), "start": read_heldout(folders), "environment": environment()}
    write_json(run / "result.json", result)
    if not stage_two:
        return

    # Stage 2.
    suffix = f"-{steps}" if steps else ""
    losses, trained = {}, {}
    for name in arm or list(arms):
        changes = {"base": arms[name].get("base", ""), "autoencoder": str(autoencoders[name])}
        if steps:
            changes["steps"] = steps
        recipe = load_recipe(FinetuneRecipe, HERE / "stage2.toml", changes)
        trained[name] = load_pipeline(finetune(recipe, folders[name] / f"stage2{suffix}"))
        losses[name] = read_json(folders[name] / f"stage2{suffix}" / "result.json")

    # Some prompts from top to bottom, the pipelines from left to right.
    base, pictures = load_pipeline(assets.base_pipeline()), Path(recipe.pictures)
    for pipeline in (base, *trained.values()):
        pipeline.set_progress_bar_config(disable=True)
    shown = open_pictures(pictures, size=SIZE, split="train")
    prompts = [shown.captions[len(shown) * row // 6] for row in range(6)]
    rows: list[list[Tensor]] = [[] for _ in prompts]
    for name, pipeline in {"base": base, "shipped upgrade": load_pipeline(once), **trained}.items():
        images = generation.sample_many(pipeline, prompts, run / f"shown{suffix}" / name, label=name, **SAMPLING)
        for row, image in zip(rows, images, strict=True):
            row.append(generation.resize(image, SIZE) if image.shape[-1] < SIZE else image)
    write_png(run / f"samples{suffix}.png", torch.cat([torch.cat(row, dim=2) for row in rows], dim=1))

    # Numbers.
    facts = {"stage_two": losses, "times": measure_times(trained, base), "prompts": prompts, "sampling": SAMPLING}
    kid = measure_distances(trained, pictures, run / f"samples{suffix}", count)
    write_json(run / f"result{suffix}.json", {**result, **facts, "kid_512": kid})


if __name__ == "__main__":
    typer.run(main)
