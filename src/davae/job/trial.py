"""Three steps of each stage on this machine, as the run takes them: how long a job takes, and how much it needs."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline

from davae.backbones import backbone_of
from davae.cost.workload import count_parameters
from davae.job.recipe import JobRecipe
from davae.method.perceptual import LPIPS
from davae.method.stage_one_loss import compared_weights
from davae.method.widen import start_ports
from davae.pipelines.autoencoders import load_base_vae
from davae.pipelines.upgrade import upgrade
from davae.run.ranks import Ranks
from davae.seeds import generator
from davae.training.devices import fastest_layout, keep_stream_in_float32, lay_out
from davae.training.folders import open_training_pictures
from davae.training.stage_one import choose_trained, make_discriminator, train_networks
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import load_crops
from davae.training.stage_one_start import make_slim, make_untrained, name_base
from davae.training.stage_two import choose_objectives, train_transformer
from davae.training.stage_two_inputs import load_batch, load_pictures, prepare_inputs
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_transformer import choose_parameters, choose_targets
from davae.training.state import TrainingState

TIMED_STEPS = 3
# Images that are encoded to learn how long the caches take and how large they are.
ENCODED = 16

Batch = TypeVar("Batch")


class _Enough(Exception):
    """The stopwatch has seen enough steps."""


@dataclass
class Stopwatch:
    """Times the steps of a training loop by its calls for batches, and ends the loop after one step and three more."""

    batches_a_step: int
    began: float = 0.0
    seconds: float = 0.0

    def watch(self, load: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """`load`, which makes the batch of a number."""

        def timed(number: int) -> Batch:
            step, position = divmod(number, self.batches_a_step)
            if position == 0 and step == 1:
                self.began = time.perf_counter()
            if position == 0 and step == 1 + TIMED_STEPS:
                self.seconds = (time.perf_counter() - self.began) / TIMED_STEPS
                raise _Enough
            return load(number)

        return timed


@dataclass(frozen=True)
class Timed:
    """Seconds of a step, and the parameters that it trains."""

    step: float
    trained: int


@dataclass(frozen=True)
class Trial:
    """What was measured."""

    stage_one_step: float  # seconds
    stage_two_step: float  # seconds
    encoding: float  # seconds of an image and its caption
    cached_bytes: float  # of an image and its caption
    trained: int  # parameters of both stages
    peak_bytes: int | None  # of the GPU; None on a CPU


def try_job(recipe: JobRecipe, base: DiffusionPipeline, folder: Path) -> Trial:
    """Time the steps of both stages; `folder` is for what the trainers write, and the caller removes it."""
    device = Ranks().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = time_stage_one(recipe.stage_one, folder / "autoencoder")
    second, encoding, cached = time_stage_two(recipe.stage_two, recipe.stage_one, base, folder / "finetune")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Trial(first.step, second.step, encoding, cached, first.trained + second.trained, peak)


def time_stage_one(recipe: AutoencoderRecipe, folder: Path) -> Timed:
    """A step from a start that is not fitted, after one step that warms up."""
    ranks = Ranks()
    recipe = recipe.model_copy(update={"limit": _limit(recipe), "steps": 2 + TIMED_STEPS, "max_unreadable": 1.0})
    pictures = open_training_pictures(recipe, None, captions=False)

    # The networks of the run, without the fits that begin it.
    vae = load_base_vae(name_base(recipe))
    autoencoder = make_slim(make_untrained(recipe, vae), recipe)
    lay_out(keep_stream_in_float32(autoencoder), fastest_layout(ranks.device))
    lpips = LPIPS.vgg(recipe.loss.lpips_weights) if recipe.loss.lpips_weights else LPIPS.alex()
    discriminator = make_discriminator(recipe)
    target = vae.to(ranks.device) if recipe.target == "base reconstruction" else None
    lpips.to(ranks.device)

    models, parameters = {"autoencoder": autoencoder}, choose_trained(autoencoder, recipe)
    whole = compared_weights(autoencoder).values()
    state = TrainingState(
        recipe, folder, models, parameters, label="trying stage 1", companion=discriminator, whole=whole
    )
    watch = Stopwatch(recipe.gradient_accumulation)
    load = watch.watch(partial(load_crops, recipe, pictures, ranks))
    with suppress(_Enough):
        train_networks(
            autoencoder, recipe, state, load, lambda: None, lpips=lpips, base_vae=target, discriminator=discriminator
        )
    return Timed(watch.seconds, count_parameters(autoencoder, trained=True))


def time_stage_two(
    recipe: FinetuneRecipe, stage_one: AutoencoderRecipe, base: DiffusionPipeline, folder: Path
) -> tuple[Timed, float, float]:
    """A step; then seconds and bytes of a cached image with its caption."""
    ranks = Ranks()
    changes = {"limit": _limit(recipe), "steps": 2 + TIMED_STEPS, "cache": "", "validation_every": 0}
    recipe = recipe.model_copy(update={**changes, "adapter": "", "max_unreadable": 1.0})

    # The upgraded base, with an autoencoder that is not trained yet.
    pipeline = upgrade(base, make_slim(make_untrained(stage_one, base.vae), stage_one).eval())
    transformer = pipeline.transformer
    start_ports(
        transformer,
        backbone_of(transformer).ports,
        base_channels=pipeline.vae.config.base_channels,
        start=recipe.ports_start,
        generator=generator(recipe.seed, "ports"),
    )
    pictures = load_pictures(recipe, transformer, folder, ranks)
    began = time.perf_counter()
    read_latents, read_conditions = prepare_inputs(recipe, pipeline, pictures, folder, ranks)
    encoding = (time.perf_counter() - began) / len(pictures)
    cached = count_bytes(folder / "cache") / len(pictures)

    # The steps of the run.
    parameters = choose_parameters(transformer, recipe, choose_targets(transformer, recipe), "")
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objectives = choose_objectives(pipeline, recipe, pictures.buckets)
    state = TrainingState(recipe, folder, {"transformer": transformer}, parameters, label="trying stage 2")
    watch = Stopwatch(recipe.gradient_accumulation)
    load = watch.watch(partial(load_batch, recipe, pictures, read_latents, ranks))
    with suppress(_Enough):
        train_transformer(transformer, recipe, state, load, read_conditions, objectives, lambda: None)
    return Timed(watch.seconds, count_parameters(transformer, trained=True)), encoding, cached


def count_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _limit(recipe: AutoencoderRecipe | FinetuneRecipe) -> int:
    return min(ENCODED, recipe.limit or ENCODED)
