"""Ablations of the method on the small pair: one choice changed at a time, equal budgets, several seeds.

    davae data avatars runs/images --training 512
    python recipes/ablations/run.py runs/ablations runs/images

trains stage 1 and stage 2 of every arm, first all arms with seed 0, then with the next seed; measures each, and writes
RUN/result.json after every run. The same command resumes, and skips the arms that have numbers. Runs of one
seed share images, crops, prompts and all noise. Prompts are captions of held-out images. With `--only SEED` another
process may run a later seed in RUN once seed 0 is through stage 1. `figure.py` draws the result.
"""

import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from davae import assets
from davae.backbones import backbone_of
from davae.data.sources import PictureSet, open_pictures
from davae.demo.plan import TRAINED_LAYERS
from davae.demo.prompts import SAMPLING as PAIR_SAMPLING
from davae.errors import SettingsError
from davae.evaluation.generation import extract_features, resize, sample_many
from davae.method.flow import flow_matching_losses, interpolate, velocity_target
from davae.method.losses import detail_alignment_loss
from davae.method.metrics import kid
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.run.ranks import Ranks
from davae.run.record import environment, read_metrics
from davae.run.storage import replaced_whole, write_json
from davae.seeds import generator
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import heldout_metrics, train_autoencoder
from davae.training.stage_one_start import start_autoencoder
from davae.training.stage_two_inputs import encode_captions
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

REFERENCE, BASE = "reference", "base + bicubic"
Measured = dict[str, Any]
Results = dict[str, dict[int, Measured]]
"""By arm and seed."""
STAGE_ONE: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "alignment 0": {"alignment": 0.0},
    "alignment 0.5": {"alignment": 0.5},
    "alignment 1": {"alignment": 1.0},
    "unit variance": {"code": "unit variance"},
    "base added": {"code": "base added"},
    "residual": {"code": "residual"},
    "residual, alignment 0": {"code": "residual", "alignment": 0.0},
    "r = 2": {"detail_channels": 32},
    "r = 2, zero sum": {"detail_channels": 32, "code": "zero sum"},
    "r = 3": {"detail_channels": 48},
}
"""Changes to `stage_one`, whose own settings are the reference: turned code, alignment 0.02, r = 1, antialiased."""
STAGE_ONE_ONLY: dict[str, dict[str, Any]] = {
    "random start": {"start": "random"},
    "plain bicubic": {"base_downsample": "bicubic"},
}
"""The same, for arms without a stage 2; they come last."""
STAGE_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: (REFERENCE, {}),
    "alignment 0": ("alignment 0", {}),
    "alignment 0.5": ("alignment 0.5", {}),
    "alignment 1": ("alignment 1", {}),
    "ports at random": (REFERENCE, {"ports_start": "random"}),
    "ports repeated": (REFERENCE, {"ports_start": "repeat"}),
    "no schedule": (REFERENCE, {"detail_warmup_steps": 0}),
    "unit variance": ("unit variance", {}),
    "base added": ("base added", {}),
    "residual": ("residual", {}),
    "residual, alignment 0": ("residual, alignment 0", {}),
    "r = 2": ("r = 2", {}),
    "r = 2, zero sum": ("r = 2, zero sum", {}),
    "LoRA": (REFERENCE, {"trained": "lora"}),
    "full": (REFERENCE, {"trained": "full"}),
    "r = 3": ("r = 3", {}),
}
"""The autoencoder of which arm of stage 1, and changes to `stage_two`: warm start, schedule, the layers themselves."""
ARMS = STAGE_ONE | STAGE_ONE_ONLY
PICTURES = 192
"""Training pictures of stage 2, and held-out ones that KID compares with, evenly spread over the set."""
PROMPTS = 48
SAMPLING = {**PAIR_SAMPLING, "steps": 10}
HELDOUT = 16
SIGMAS = (0.2, 0.4, 0.6, 0.8)
"""Noise levels of the held-out losses."""


@dataclass(frozen=True)
class Source:
    """What every run begins with."""

    base: str
    pictures: str
    size: int

    def open(self, split: str, limit: int) -> PictureSet:
        """So many images of a split."""
        return open_pictures(self.pictures, size=self.size, split=split, limit=limit).sound()

    def places(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {"base": self.base, "pictures": self.pictures, "size": self.size}


def stage_one_recipe(source: Source, arm: Mapping[str, Any], steps: int, seed: int) -> AutoencoderRecipe:
    """Stage 1 of an arm, on small crops."""
    changes = dict(arm)
    alignment = changes.pop("alignment", 0.02)
    return AutoencoderRecipe(
        **{"detail_channels": 16, **source.places(), **changes},
        limit=512,
        steps=steps,
        seed=seed,
        crop=min(64, source.size),
        batch_size=4,
        learning_rate=3e-4,
        warmup_steps=20,
        ema_decay=0.98,
        latent_noise=0.3,
        calibration_pictures=64,
        fit_pictures=96,
        heldout_pictures=4,
        evaluate_every=steps,
        checkpoint_every=steps,
        loss=LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=alignment),
    )


def stage_two_recipe(
    source: Source, arm: Mapping[str, Any], autoencoder: Path, steps: int, seed: int, cache: Path
) -> FinetuneRecipe:
    """Stage 2 of an arm, on stage 1's autoencoder; arms of one autoencoder share its latents in `cache`."""
    changes: dict[str, Any] = {"trained": "layers", "detail_warmup_steps": steps // 4, **arm}
    return FinetuneRecipe(
        **source.places(),
        **changes,
        limit=PICTURES,
        autoencoder=str(autoencoder),
        cache=str(cache),
        lora_targets=TRAINED_LAYERS,
        steps=steps,
        learning_rate=3e-3,
        warmup_steps=20,
        batch_size=16,
        prompt_tokens=SAMPLING["prompt_tokens"],
        checkpoint_every=steps,
        ema_decay=0.98,
        seed=seed,
    )


def make_start(folder: Path, source: Source, changes: Mapping[str, Any], seed: int) -> Path:
    """The start of an arm, made once in `folder`: the closed form for all seeds, and for all arms that share it."""
    own = {name: value for name, value in changes.items() if name != "alignment"}
    seed = seed if own.get("start") == "random" else 0
    made = folder / name_folder("-".join(map(str, [*own.values(), seed]))) / "start"
    if not made.is_dir():
        recipe = stage_one_recipe(source, own, 1, seed)
        start_autoencoder(recipe, source.open("train", recipe.limit or 0), made)
    return made


def measure_reconstruction(autoencoder: AutoencoderDA, pictures: PictureSet, lpips: LPIPS) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of whole images, and the alignment loss of the detail posterior's mean."""
    values = heldout_metrics(autoencoder, pictures, lpips, Ranks())
    with torch.no_grad():
        losses = []
        for indices in torch.arange(len(pictures)).split(8):
            image = pictures.batch(indices.tolist())
            base = autoencoder.encode_base(image)
            losses.append(detail_alignment_loss(autoencoder.encode_detail(image, base)[0], base).item())
    return {**values, "heldout_alignment": statistics.mean(losses)}


def measure_stage_one(
    folder: Path, starts: Path, source: Source, arm: str, steps: int, seed: int, heldout: PictureSet
) -> Measured:
    """Train an arm of stage 1; its held-out numbers before and after."""
    changes, lpips = ARMS[arm], LPIPS.alex()
    made = make_start(starts, source, changes, seed)
    first = partial(measure_reconstruction, load_autoencoder(made), heldout, lpips)
    before = measure_once(made.with_name("measured.json"), first)

    if not (folder / "start").is_dir():
        with replaced_whole(folder / "start") as unfinished:
            shutil.copytree(made, unfinished, dirs_exist_ok=True)
    train_autoencoder(stage_one_recipe(source, changes, steps, seed), folder)
    after = measure_reconstruction(load_autoencoder(folder / "autoencoder"), heldout, lpips)
    return {"before": before, "after": after}


@torch.no_grad()
def measure_heldout_losses(pipeline, heldout: PictureSet) -> dict[str, float]:
    """Velocity losses of held-out latents at fixed noise levels, the same noise for every arm."""
    vae, transformer = pipeline.vae, pipeline.transformer
    backbone, channels = backbone_of(transformer), vae.config.base_channels

    image = heldout.batch(range(len(heldout)))
    clean = vae.to_units(vae.encode(image).latent_dist.mode())
    condition = encode_captions(pipeline, backbone, heldout.captions, SAMPLING["prompt_tokens"])

    shape = (len(clean), channels, *clean.shape[2:])
    rows = []
    for level in SIGMAS:
        halves = [torch.randn(shape, generator=generator(0, "held-out base noise"))]
        for group in range(clean.shape[1] // channels - 1):
            halves.append(torch.randn(shape, generator=generator(0, "held-out detail noise", group)))
        noise, sigma = torch.cat(halves, dim=1), torch.full((len(clean),), level)

        velocity = backbone.velocity(transformer, interpolate(clean, noise, sigma), sigma, condition)
        target = velocity_target(clean, noise)
        _, logs = flow_matching_losses(velocity, target, base_channels=channels, detail_weight=1.0)
        rows.append(torch.stack([logs["base_loss"], logs["detail_loss"]]))

    base, detail = torch.stack(rows).mean(dim=0).tolist()
    return {"heldout_base_loss": base, "heldout_detail_loss": detail}


def measure_stage_two(
    folder: Path, recipe: FinetuneRecipe, real: PictureSet, references: Tensor, heldout: PictureSet
) -> Measured:
    """Train an arm; its losses on held-out latents, its training losses, and KID of pictures from PROMPTS prompts."""
    pipeline = load_pipeline(finetune(recipe, folder))
    numbers: dict[str, Any] = measure_heldout_losses(pipeline, heldout)
    curve = [row for row in read_metrics(folder / "metrics.jsonl") if "base_loss" in row]
    numbers["curve"] = [[row["step"], row["base_loss"], row["detail_loss"]] for row in curve]
    prompts = choose_captions(real)
    images = sample_many(pipeline, prompts, folder / "pictures", label="generating", seed=recipe.seed, **SAMPLING)
    numbers["kid"] = 1000 * kid(extract_features(images, side=recipe.size), references)

    for heavy in ("pipeline", "checkpoints", "adapter"):  # the numbers stay
        shutil.rmtree(folder / heavy, ignore_errors=True)
    return numbers


def choose_captions(real: PictureSet) -> list[str]:
    """PROMPTS captions, evenly spread over the pictures."""
    return [real.captions[index * len(real) // PROMPTS] for index in range(PROMPTS)]


def measure_base(folder: Path, source: Source, seed: int, real: PictureSet, references: Tensor) -> Measured:
    """KID of the base pipeline at its own size, enlarged with bicubic."""
    pipeline = load_pipeline(source.base)
    prompts = choose_captions(real)
    small = sample_many(pipeline, prompts, folder / "pictures", label="generating", seed=seed, **SAMPLING)
    images = [resize(image, source.size) for image in small]
    return {"kid": 1000 * kid(extract_features(images, side=source.size), references)}


def measure_once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `make`, from `path` if an earlier run has written it there."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_bytes())


def mean_and_deviation(values: list[float]) -> list[float]:
    """Over the seeds."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def summarise_arm(
    arm: str, numbers: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Numbers of one arm by seed as mean and deviation; "kid_difference" is to the reference of the same seed."""
    names = [name for name, value in next(iter(numbers.values())).items() if isinstance(value, float)]
    values: dict[str, Any] = {name: mean_and_deviation([one[name] for one in numbers.values()]) for name in names}
    if "kid" in names:
        differences = [numbers[seed]["kid"] - reference[seed]["kid"] for seed in numbers if seed in reference]
        values["kid_difference"] = mean_and_deviation(differences)
    return {"arm": arm, "seeds": len(numbers), **values}


def summarise(one: Results, two: Results) -> dict[str, Any]:
    """Every number so far, as in result.json."""
    reference = two.get(REFERENCE, {})
    rows: dict[str, list[dict[str, Any]]] = {"stage_one_before": [], "stage_one_after": []}
    for moment in ("before", "after"):
        for arm in ARMS:
            if arm in one:
                numbers = {seed: measured[moment] for seed, measured in one[arm].items()}
                rows[f"stage_one_{moment}"].append(summarise_arm(arm, numbers, {}))
    rows["stage_two"] = [summarise_arm(arm, two[arm], reference) for arm in (BASE, *STAGE_TWO) if arm in two]

    # Losses of the training, averaged over the seeds.
    curves = {}
    for arm in STAGE_TWO:
        if arm in two:
            curves[arm] = torch.tensor([measured["curve"] for measured in two[arm].values()]).mean(dim=0).tolist()
    return {**rows, "curves": curves}


def main(
    run: Path,
    images: Annotated[Path, typer.Argument(help="Captioned images, such as those of `davae data avatars`.")],
    base: Annotated[Path | None, typer.Option(help="The base pipeline; by default the shipped one.")] = None,
    size: Annotated[int, typer.Option(help="Side of the images: twice the base's.")] = 256,
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    stage_one_steps: Annotated[int, typer.Option(help="Of every arm of stage 1.")] = 120,
    stage_two_steps: Annotated[int, typer.Option(help="Of every arm of stage 2.")] = 160,
    only: Annotated[int | None, typer.Option(help="This seed alone: several processes may share RUN.")] = None,
    arm: Annotated[list[str], typer.Option(help="These arms alone, beside the reference. Repeatable.")] = [],  # noqa: B006
) -> None:
    """Train and measure every arm that has no numbers yet."""
    chosen = choose_arms(arm)
    source = Source(str(base or assets.base_pipeline()), str(images), size)
    heldout, real = source.open("heldout", HELDOUT), source.open("heldout", PICTURES)
    references = extract_features([real.image(index) for index in range(len(real))], side=size)
    one: Results = defaultdict(dict)
    two: Results = defaultdict(dict)
    budget = {"seeds": seeds, "stage_one_steps": stage_one_steps, "stage_two_steps": stage_two_steps}
    one_folder, two_folder = run / f"stage1_{stage_one_steps}", run / f"stage2_{stage_one_steps}_{stage_two_steps}"
    counts = {"heldout": len(heldout), "real": len(real), "prompts": PROMPTS}

    def write() -> None:
        facts = {**budget, "counts": counts, "sampling": SAMPLING, "sigmas": SIGMAS, "environment": environment()}
        name = "result.json" if only is None else f"result-{only}.json"
        write_json(run / name, {**summarise(one, two), **facts})

    def measure_one(arm: str, seed: int) -> None:
        folder = one_folder / f"{name_folder(arm)}-{seed}"
        make = partial(measure_stage_one, folder, run / "starts", source, arm, stage_one_steps, seed, heldout)
        one[arm][seed] = measure_once(folder / "measured.json", make)
        after = one[arm][seed]["after"]
        typer.echo(f"stage 1, seed {seed}, {arm}: {after['heldout_psnr']:.2f} dB")
        write()

    def measure_two(arm: str, seed: int) -> None:
        autoencoder_arm, changes = STAGE_TWO[arm]
        folder = two_folder / f"{name_folder(arm)}-{seed}"
        autoencoder = one_folder / f"{name_folder(autoencoder_arm)}-{seed}" / "autoencoder"
        recipe = stage_two_recipe(source, changes, autoencoder, stage_two_steps, seed, two_folder / "cache")
        make = partial(measure_stage_two, folder, recipe, real, references, heldout)
        two[arm][seed] = measure_once(folder / "measured.json", make)
        typer.echo(f"stage 2, seed {seed}, {arm}: KID x 1000 {two[arm][seed]['kid']:.1f}")
        write()

    # All arms of a seed before the next seed; arms without a stage 2 come last.
    each_seed = range(seeds) if only is None else (only,)
    for seed in each_seed:
        for name in [each for each in STAGE_ONE if each in chosen]:
            measure_one(name, seed)
        folder = two_folder / f"base-{seed}"
        make = partial(measure_base, folder, source, seed, real, references)
        two[BASE][seed] = measure_once(folder / "measured.json", make)
        for name in [each for each in STAGE_TWO if each in chosen]:
            measure_two(name, seed)
    for seed, name in product(each_seed, STAGE_ONE_ONLY):
        if name in chosen:
            measure_one(name, seed)


def choose_arms(names: Sequence[str]) -> set[str]:
    """The named arms, the reference, and the arms of stage 1 whose autoencoders they need; all arms without names."""
    known = [*ARMS, *STAGE_TWO]
    if unknown := sorted(set(names) - set(known)):
        raise SettingsError(f"--arm {', '.join(unknown)}: allowed are {', '.join(dict.fromkeys(known))}")
    arms = {REFERENCE, *(names or known)}
    return arms | {STAGE_TWO[name][0] for name in arms if name in STAGE_TWO}


def name_folder(arm: str) -> str:
    """The name of an arm's folder."""
    return arm.replace(",", "").replace(" = ", "").replace(" ", "-")


if __name__ == "__main__":
    typer.run(main)
