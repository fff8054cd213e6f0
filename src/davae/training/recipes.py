"""The settings that both stages share: optimiser, schedule, checkpoints, training pictures."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from davae.data.buckets import Bucket, bucket_table
from davae.errors import SettingsError
from davae.run.recipe import Recipe

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
OptimizerName = Literal["AdamW", "AdamW8bit", "AdamWScheduleFree"]


class OptimisationRecipe(Recipe):
    """An optimiser with a linear warm-up and a half cosine, clipped gradients, an EMA, checkpoints."""

    free_to_change: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "log_every"})

    steps: NotNegative = 1000
    batch_size: Positive = 8
    """Images in a batch, over all GPUs together."""
    optimizer: OptimizerName = "AdamW"
    """torch's AdamW; AdamW8bit of bitsandbytes, whose moments take a quarter of the memory; or AdamWScheduleFree, which
    averages weights instead of lowering the learning rate: that stays at its peak, and the EMA averages the averages.
    The discriminator always has AdamW."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The peak, reached after `warmup_steps`."""
    final_learning_rate: Weight = 1e-5
    """At the end of the half cosine; schedule-free has none."""
    warmup_steps: NotNegative = 50
    restarts: tuple[Positive, ...] = ()
    """Steps at which warm-up and half cosine begin anew, the cosine before each ending there. A run whose rate falls
    gets more steps by one at its end: steps = 2000 and restarts = [1000] after 1000."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    """Decoupled."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of all gradients together."""
    ema_decay: Decay = 0.999
    ema_warmup: bool = False
    """Update n of the EMA has decay min(ema_decay, (1 + n) / (10 + n)), the usual warm-up; otherwise
    min(ema_decay, 1 - (1 + n)^-0.75), a slower one. In both cases update 0 copies the weights."""
    gradient_accumulation: Positive = 1
    """Batches of `batch_size` in a step; its loss is their mean."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the networks' forward pass; losses are float32. "auto" is bf16 if the device computes in it."""
    checkpoint_every: Positive = 250
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl; skipped steps, spikes and the last step always have a line."""
    skip_spikes: bool = False
    """Skip a step whose loss or gradient norm is over 6 standard deviations above the mean of the last 128 steps, as
    OLMo does. Otherwise such a step is clipped as any other. Both ways it is logged with its images."""
    seed: NotNegative = 0

    @model_validator(mode="after")
    def _schedule_free_has_no_cosine(self) -> "OptimisationRecipe":
        if self.optimizer != "AdamWScheduleFree":
            return self
        final = self.final_learning_rate
        if final != type(self).model_fields["final_learning_rate"].default:
            raise ValueError(f"final_learning_rate = {final}: AdamWScheduleFree has no end of a schedule; leave it out")
        if not self.betas[0]:
            raise ValueError("betas[0] = 0: AdamWScheduleFree averages by it; it must be above 0")
        return self

    @model_validator(mode="after")
    def _restarts_lie_between_the_ends(self) -> "OptimisationRecipe":
        if self.restarts and self.optimizer == "AdamWScheduleFree":
            raise ValueError(f"restarts = {list(self.restarts)}: AdamWScheduleFree has no schedule; leave it out")
        if self.restarts and any(start >= end for start, end in self.cycles):
            raise ValueError(f"restarts = {list(self.restarts)}: allowed are rising numbers under steps = {self.steps}")
        return self

    @property
    def cycles(self) -> list[tuple[int, int]]:
        """First step and end of each warm-up with its half cosine."""
        return list(pairwise((0, *self.restarts, self.steps))) if self.restarts else [(0, self.steps)]

    def late_settings(self) -> list[str]:
        """What the run ends too early for, in a sentence each: the setting, and what never happens."""
        if self.warmup_steps <= min(end - start for start, end in self.cycles):
            return []
        return [f"warmup_steps = {self.warmup_steps}: the learning rate never reaches {self.learning_rate:g}"]

    def free_beside(self, before: "OptimisationRecipe") -> frozenset[str]:
        """The settings in which this recipe may differ from `before`, that of a run which goes on with this one.

        These are those that are always free; more steps, if the learning rates until the old end stay; and the images
        of a batch, if those of a step stay.
        """
        free = self.free_to_change
        if self.steps >= before.steps:
            rate, old_rate = schedule_learning_rate(self), schedule_learning_rate(before)
            if all(rate(step) == old_rate(step) for step in range(before.steps)):
                free |= {"steps", "restarts"}
        if self.may_split_steps and self.step_size == before.step_size:
            free |= {"batch_size", "gradient_accumulation"}
        return free

    @property
    def step_size(self) -> int:
        """Images in a step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def may_split_steps(self) -> bool:
        """Whether a step is the same, up to rounding, in however many batches its images come."""
        return True

    def run_digest(self) -> str:
        """As `digest`, without what a run may go on with otherwise (`free_beside`)."""
        normal = {"steps": 0, "restarts": (), "batch_size": self.step_size, "gradient_accumulation": 1}
        return self.model_copy(update=normal).digest()


class PicturesRecipe(OptimisationRecipe):
    """The training images, and the sizes that they are scaled to."""

    free_to_change: ClassVar[frozenset[str]] = OptimisationRecipe.free_to_change | {"max_unreadable"}
    places: ClassVar[frozenset[str]] = frozenset({"pictures", "base", "autoencoder"})

    pictures: str = ""
    """What `davae.data.sources.open_pictures` opens: a folder, shards here or at a URL, parquet files, datasets:NAME.
    Stage 2 needs captions or, for a class-conditional base, classes."""
    limit: Positive | None = None
    """At most so many images, evenly spread over the set."""
    size: Positive = 256
    """Side of the images in pixels: twice the base's."""
    aspect_ratios: tuple[str, ...] = ()
    """Of the buckets, as width:height, such as "3:2": areas of about size^2. () trains on squares."""
    sizes: tuple[Positive, ...] = ()
    """Further sides, to train at more resolutions at once: an image goes to the largest that it fills."""
    bucket_step: Positive = 32
    """The buckets' sides are multiples of this: downsample factor times patch side, or a multiple of it. Only used with
    `aspect_ratios` or `sizes`."""
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The largest share of damaged or otherwise unreadable images, rounded up to whole images, and three in any case
    unless it is 0 or they are over half of the set; a run with more stops before it begins. Images that are too small,
    or lack a caption or class, are left out and do not count."""

    @property
    def may_split_steps(self) -> bool:
        """With several buckets the order of the images goes by batches."""
        return not (self.aspect_ratios or self.sizes)

    @property
    def source(self) -> str:
        """Where the images are, or a SettingsError if the recipe names no place."""
        if not self.pictures:
            raise SettingsError(
                'pictures = "": give a folder, shards or another source; `davae data avatars FOLDER` draws a set'
            )
        return self.pictures

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sizes of the training images, or a SettingsError if sides and ratios do not fit each other."""
        several = self.aspect_ratios or self.sizes
        return bucket_table((self.size, *self.sizes), self.aspect_ratios, multiple=self.bucket_step if several else 1)

    @property
    def sides(self) -> list[int]:
        """All sides of the buckets in pixels, from the shortest to the longest."""
        return sorted({side for bucket in self.buckets for side in bucket[:2]})

    @property
    def heldout_size(self) -> int:
        """Side of the held-out squares: the shortest side of a bucket, so that no held-out image is too small."""
        return self.sides[0]


def warmup_cosine(peak: float, *, floor: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """A learning rate that rises linearly to `peak`, then falls on a half cosine to `floor` at `total_steps`."""

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        # From 0 at the end of the warm-up to 1 at the last step.
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return learning_rate


def schedule_learning_rate(recipe: OptimisationRecipe) -> Callable[[int], float]:
    """The recipe's learning rate as a function of the step; schedule-free stays at the peak."""
    peak, warmup = recipe.learning_rate, recipe.warmup_steps
    floor = peak if recipe.optimizer == "AdamWScheduleFree" else recipe.final_learning_rate
    cycles = []
    for start, end in recipe.cycles:
        cycles.append((start, warmup_cosine(peak, floor=floor, warmup_steps=warmup, total_steps=end - start)))

    def learning_rate(step: int) -> float:
        start, rate = next(cycle for cycle in reversed(cycles) if cycle[0] <= step)
        return rate(step - start)

    return learning_rate
