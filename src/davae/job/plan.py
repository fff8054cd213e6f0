"""The settings of a job for one set of images, one base and one machine; each follows from a number that is known."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from davae.backbones import backbone_of
from davae.cost import workload
from davae.cost.budget import Memory, estimate_stage_one, estimate_stage_two_memory, make_autoencoder, read_memory
from davae.cost.geometry import Geometry
from davae.errors import SettingsError
from davae.job.estimate import Estimate, size_in_words
from davae.job.recipe import JobRecipe, ResultsRecipe
from davae.models.base_autoencoders import base_facts, downsample_factor
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_two_recipe import FinetuneRecipe

# Of a device's memory, the share that weights, gradients and activations may take.
USABLE = 0.85
# Images in a step of each stage, over all batches of it.
STAGE_ONE_IMAGES, STAGE_TWO_IMAGES = 8, 16
# The paper's numbers of steps, and how often an image is seen at most: more teaches a small set by heart.
STAGE_ONE_STEPS, STAGE_TWO_STEPS = 10_000, 20_000
MOST_EPOCHS, LEAST_STEPS = 400, 300
# Transformers with fewer parameters train their own weights, faster; larger ones train a LoRA.
SMALL = 100_000_000
# At most this share of the usable images may be too small for the size.
LEFT_OUT = 0.2
VALIDATIONS = 10


@dataclass(frozen=True)
class Request:
    """What `davae init` was told, and what it has found out about the images and the machine."""

    base: str
    pictures: str
    size: int
    count: int  # of training images
    memory_bytes: int
    seed: int = 0


def parse_memory(text: str) -> int:
    """Bytes of "24GB", "24 GiB" or "24", which all mean GiB, as on the boxes of GPUs."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SettingsError(f"--memory {text}: give the memory of the GPU, such as 24GB")
    return round(float(match[1]) * 2**30)


def choose_size(geometry: Geometry, sides: Sequence[int], size: int | None) -> int:
    """The upgraded size: twice the base's own, or the base's own where the images (their shorter `sides`) are small."""
    config = geometry.transformer.config
    native = config.get("sample_size", 128) * downsample_factor(geometry.vae.config)
    if size is not None:
        return size
    for candidate in (2 * native, native):
        if sum(side < candidate for side in sides) <= LEFT_OUT * len(sides):
            return candidate
    large = sum(side >= native for side in sides)
    raise SettingsError(
        f"{large} of {len(sides)} images have {native} pixels on their shorter side, the least for this base: "
        "nothing is scaled up. Give larger images, or a --size that they have"
    )


def plan_job(request: Request, geometry: Geometry) -> JobRecipe:
    """A recipe that fits the memory; its numbers of steps are those that the images are good for."""
    shared: dict[str, Any] = {"base": request.base, "pictures": request.pictures, "size": request.size}
    shared["seed"] = request.seed
    small = workload.count_parameters(geometry.transformer) < SMALL

    # Stage 1: weights of the terms as in the ablations (docs/method.md), from the closed-form start.
    one = AutoencoderRecipe(
        **shared,
        detail_channels=base_facts(geometry.vae.config).latent_channels,
        code="residual",
        crop=choose_crop(request.size, downsample_factor(geometry.vae.config)),
        batch_size=1,
        learning_rate=3e-4 if small else 1e-4,
        latent_noise=0.3,
        fit_pictures=min(128, request.count),
        calibration_pictures=min(512, request.count),
        loss=LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=0.02),
    )
    two = FinetuneRecipe(
        **shared,
        trained="layers" if small else "lora",
        batch_size=1,
        learning_rate=1e-3 if small else 1e-4,
        # Images are drawn from captions only; `with_steps` sets the interval.
        validation_every=0 if backbone_of(geometry.transformer).classes else 1,
    )

    # Batches as large as the memory allows, the rest of a step by accumulation.
    one_memory = read_memory(estimate_stage_one(one, geometry))
    two_memory = estimate_stage_two_memory(two, geometry, make_autoencoder(one, geometry))
    one_batch, _ = choose_batch(one_memory, request.memory_bytes, STAGE_ONE_IMAGES, "stage 1")
    two_batch, checkpointing = choose_batch(two_memory, request.memory_bytes, STAGE_TWO_IMAGES, "stage 2")
    one = one.model_copy(update={"batch_size": one_batch, "gradient_accumulation": STAGE_ONE_IMAGES // one_batch})
    changes = {"batch_size": two_batch, "gradient_accumulation": STAGE_TWO_IMAGES // two_batch}
    two = two.model_copy(update={**changes, "gradient_checkpointing": checkpointing})
    return with_steps(JobRecipe(one, two, ResultsRecipe(**shared)), *wanted_steps(request.count))


def choose_crop(size: int, factor: int) -> int:
    """Stage 1's crops: half of the image, and at most 256 px, in multiples of the upgraded autoencoder's factor."""
    unit = 2 * factor
    return min(size, max(unit, 64 // unit * unit, min(256, size // 2) // unit * unit))


def choose_batch(memory: Memory, available: int, images: int, stage: str) -> tuple[int, bool]:
    """The batch size of a step of so many images, and whether blocks must be computed again in the backward pass."""
    left = USABLE * available - memory.state
    if left <= 0:
        raise SettingsError(
            f"{stage} needs {size_in_words(memory.state)} for weights and optimiser alone, and "
            f"{size_in_words(USABLE * available)} of {size_in_words(available)} can be used: choose a smaller base, "
            "or a GPU with more memory (davae doctor shows what fits)"
        )
    fitting = int(left / memory.activations)
    if fitting < 1:
        return 1, True
    return min(images, 2 ** int(math.log2(fitting))), False


def wanted_steps(count: int) -> tuple[int, int]:
    """Steps of both stages for so many images: the paper's at most."""
    most = []
    for images, steps in ((STAGE_ONE_IMAGES, STAGE_ONE_STEPS), (STAGE_TWO_IMAGES, STAGE_TWO_STEPS)):
        most.append(min(steps, max(LEAST_STEPS, MOST_EPOCHS * count // images)))
    return most[0], most[1]


def with_steps(recipe: JobRecipe, one: int, two: int, validations: int = VALIDATIONS) -> JobRecipe:
    """The recipe with so many steps, and intervals, warm-ups and averages that suit them."""
    every = max(1, two // validations) if recipe.stage_two.validation_every else 0
    first = {**suit_steps(one), "evaluate_every": max(1, one // validations)}
    second = {**suit_steps(two), "validation_every": every, "detail_warmup_steps": max(1, two // 4)}
    return replace(
        recipe,
        stage_one=recipe.stage_one.model_copy(update=first),
        stage_two=recipe.stage_two.model_copy(update=second),
    )


def suit_steps(steps: int) -> dict[str, Any]:
    """What both stages set by their number of steps."""
    return {
        "steps": steps,
        "warmup_steps": min(50, max(1, steps // 20)),
        "ema_decay": 0.999 if steps >= 5000 else 0.99,
        "checkpoint_every": max(1, min(250, steps // VALIDATIONS)),
        "log_every": max(1, min(10, steps // 50)),
    }


def fit_time(recipe: JobRecipe, hours: float | None, estimate: Callable[[JobRecipe], Estimate]) -> JobRecipe:
    """The recipe with as many steps as the time allows, if both stages want more, and with as many validations."""
    one, two = recipe.stage_one.steps, recipe.stage_two.steps
    validations = VALIDATIONS
    if hours is not None:
        # Steps and validations both shrink, until what is not training has its share of the time.
        while True:
            fitted = with_steps(recipe, one, two, validations)
            seconds = estimate(fitted).seconds
            scale = 3600 * hours / sum(seconds.values())
            if scale >= 1 or (one, two, validations) == (1, 1, 1):
                return fitted
            one, two = max(1, int(scale * one)), max(1, int(scale * two))
            validations = max(1, int(scale * validations))
    return with_steps(recipe, one, two, validations)
