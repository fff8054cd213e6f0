"""How long a job takes and how much disk it needs, from three timed steps of each stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from davae.backbones import backbone_of
from davae.cost.workload import count_parameters
from davae.errors import StorageError
from davae.job.recipe import JobRecipe
from davae.job.trial import Trial
from davae.run.storage import free_bytes
from davae.training.state import CHECKPOINTS_KEPT

# A step is a forward and a backward pass, and the latter costs about two of the former.
PASSES = 3
# Of a trained parameter in a checkpoint: the weight, two moments and the EMA, in float32.
CHECKPOINT_BYTES = 16


@dataclass(frozen=True)
class Estimate:
    """Seconds by the name of the step, and bytes."""

    seconds: dict[str, float]
    cache_bytes: float
    disk_bytes: float
    peak_bytes: int | None

    @property
    def total(self) -> float:
        """Seconds of the whole job."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """For job.json."""
        return {**vars(self), "total_seconds": self.total, "text": self.to_text()}

    def to_text(self) -> str:
        """One line: the steps that take time, the whole, the disk."""
        parts = [f"{name} {in_words(seconds)}" for name, seconds in self.seconds.items()]
        memory = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**30:.1f} GiB of GPU memory"
        disk = f"{size_in_words(self.disk_bytes)} of disk, {size_in_words(self.cache_bytes)} of it caches"
        return f"about {in_words(self.total)} in all ({', '.join(parts)}); {disk}{memory}"


def estimate_job(recipe: JobRecipe, trial: Trial, base: DiffusionPipeline, pictures: int) -> Estimate:
    """The estimate for a set of so many training images."""
    one, two, results = recipe.stage_one, recipe.stage_two, recipe.results

    # Stage 1 reconstructs the held-out images at every evaluation; a step has crops of them.
    evaluations = one.steps // one.evaluate_every + 2
    crops = one.batch_size * one.gradient_accumulation * (one.crop / one.size) ** 2
    heldout = min(one.heldout_pictures, pictures // 9 + 1)  # about one image in ten
    evaluating = evaluations * heldout * trial.stage_one_step / (PASSES * max(crops, 1e-9))

    # An image is sampled in guided steps: two forward passes of one image, or one where guidance is an input.
    forward = trial.stage_two_step / (PASSES * two.batch_size * two.gradient_accumulation)
    rows = backbone_of(base.transformer).guided_rows
    drawn = 0
    if two.validation_every:
        drawn = 2 * (len(two.validation_prompts) or 4) * (two.steps // two.validation_every + 2)
    drawing = drawn * two.validation_steps * rows * forward
    made = 2 * (results.count + len(results.prompts))

    seconds = {
        "stage 1": one.steps * trial.stage_one_step + evaluating,
        "caches": 0.0 if two.online else pictures * trial.encoding,
        "stage 2": two.steps * trial.stage_two_step + drawing,
        "generate": made * results.steps * rows * forward,
    }

    # The upgraded pipeline in float32, checkpoints, caches.
    weights = 0
    for part in base.components.values():
        if isinstance(part, nn.Module):
            weights += 4 * count_parameters(part)
    caches = 0.0 if two.online else pictures * trial.cached_bytes
    disk = caches + weights + CHECKPOINTS_KEPT * CHECKPOINT_BYTES * trial.trained
    return Estimate(seconds, caches, disk, trial.peak_bytes)


def check_disk(folder: Path, needed: float) -> None:
    """Refuse a disk on which the job would not fit."""
    free = free_bytes(folder)
    if free < needed:
        raise StorageError(
            f"{folder} needs about {size_in_words(needed)}, and {size_in_words(free)} are free there: make room, or "
            "give another --out"
        )


def in_words(seconds: int | float) -> str:
    """A time as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size_in_words(count: int | float) -> str:
    """Bytes as people say them."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"
