"""What both stages say about their optimiser, and the training state that follows from it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from davae.errors import CheckpointError, SettingsError
from davae.run.ranks import Ranks
from davae.run.recipe import Recipe, load_recipe
from davae.run.record import alone
from davae.run.storage import remove_temporaries
from davae.training.companion import Companion
from davae.training.optimizers import OptimizerName, OptimizerSettings
from davae.training.state import TrainingState

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def warmup_cosine(peak: float, *, floor: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """A learning rate that rises linearly to `peak`, then falls on a half cosine to `floor` at `total_steps`."""

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return learning_rate


class OptimisationRecipe(Recipe):
    """An optimiser with a linear warm-up and a half cosine, clipped gradients, an EMA, checkpoints."""

    steps: NotNegative = 1000
    batch_size: Positive = 8
    """Pictures in a batch."""
    optimizer: OptimizerName = "AdamW"
    """torch's AdamW; AdamW8bit of bitsandbytes, whose moments take a quarter of the memory; or AdamWScheduleFree, whose
    averaged weights take the half cosine's place: its learning rate stays at the peak, and the EMA is of the averages.
    The discriminator's is AdamW in any case."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak, reached after `warmup_steps`."""
    final_learning_rate: Weight = 1e-5
    """At the end of the half cosine; schedule-free has none."""
    warmup_steps: NotNegative = 50
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Decay = 0.999
    ema_warmup: bool = False
    """Update n of the EMA has decay min(ema_decay, (1 + n) / (10 + n)), the usual warm-up; otherwise
    min(ema_decay, 1 - (1 + n)^-0.75), a slower one. Either way update 0 copies the weights."""
    gradient_accumulation: Positive = 1
    """Batches of `batch_size` in a step; its loss is their mean."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the networks' forward pass; losses are float32. "auto" is bf16 where the device computes in it."""
    checkpoint_every: Positive = 250
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl; skipped steps, spikes and the last step have one in any case."""
    skip_spikes: bool = False
    """Skip a step whose loss or gradient norm is over 6 standard deviations above the mean of the last 128 steps, as
    OLMo does. Without, such a step is clipped as any other; either way it is logged with its pictures."""
    seed: NotNegative = 0

    @model_validator(mode="after")
    def _schedule_free_has_no_cosine(self) -> "OptimisationRecipe":
        final = self.final_learning_rate
        if self.optimizer == "AdamWScheduleFree" and final != type(self).model_fields["final_learning_rate"].default:
            raise ValueError(f"final_learning_rate = {final}: AdamWScheduleFree has no end of a schedule; leave it out")
        if self.optimizer == "AdamWScheduleFree" and not self.betas[0]:
            raise ValueError("betas[0] = 0: AdamWScheduleFree averages by it; it must be above 0")
        return self

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        """The optimiser, without its learning rate."""
        return OptimizerSettings(self.optimizer, self.betas, self.weight_decay)

    @contextmanager
    def alone_in(self, folder: Path, ranks: Ranks) -> Iterator[None]:
        """Hold the folder's lock, and refuse it if a run of another recipe has begun there, before it is used.

        Raises:
            CheckpointError: one has; with the settings that differ.
            SettingsError: another run trains there, or the optimiser cannot be used (`OptimizerSettings.check`).
            StorageError: the folder cannot be written.
            RankError: a process of this run is missing, then or before the end.
        """
        self.optimizer_settings.check(ranks)
        with ExitStack() as stack, ranks.together("a step"):
            ranks.on_first(lambda: self._enter(folder, stack))
            yield

    def _enter(self, folder: Path, stack: ExitStack) -> None:
        kept = folder / "recipe.toml"
        stack.enter_context(alone(folder))
        remove_temporaries(folder)
        if kept.is_file() and any((folder / name).is_dir() for name in ("start", "checkpoints")):
            try:
                theirs = load_recipe(type(self), kept)  # which may be older: what it does not say is the default
            except SettingsError as error:
                raise CheckpointError(
                    f"{folder} holds a run of the other stage, or of a newer davae, see {kept}. Give a new folder"
                ) from error
            fixed = [name for name in type(self).model_fields if name not in self.free_to_change]
            names = [name for name in fixed if getattr(theirs, name) != getattr(self, name)]
            if names:
                raise CheckpointError(
                    f"{folder} holds a run of another recipe, see {kept}, where "
                    f"{', '.join(f'{name} = {getattr(theirs, name)!r}' for name in names)}. "
                    "Give that recipe to go on with it, or a new folder"
                )

    def training_state(
        self,
        folder: Path,
        models: Mapping[str, nn.Module],
        parameters: Iterable[nn.Parameter],
        *,
        label: str,
        ranks: Ranks,
        companion: Companion | None = None,
        report_to: Sequence[str] = (),
        whole: Iterable[Tensor] = (),
    ) -> TrainingState:
        """The state of a run with these settings in `folder`, resumed if there is one, its recipe on record."""
        schedule_free = self.optimizer == "AdamWScheduleFree"
        state = TrainingState(
            folder,
            models,
            parameters,
            total_steps=self.steps,
            learning_rate=warmup_cosine(
                self.learning_rate,
                floor=self.learning_rate if schedule_free else self.final_learning_rate,
                warmup_steps=self.warmup_steps,
                total_steps=self.steps,
            ),
            optimizer=self.optimizer_settings,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
            ema_warmup=self.ema_warmup,
            gradient_accumulation=self.gradient_accumulation,
            mixed_precision=None if self.precision == "float32" else self.precision,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            skip_spikes=self.skip_spikes,
            seed=self.seed,
            recipe_digest=self.digest(),
            label=label,
            companion=companion,
            samples=self.batch_size,
            report_to=report_to,
            ranks=ranks,
            whole=whole,
        )
        facts = {"device": str(state.device), "precision": state.mixed_precision or "float32"}
        ranks.on_first(lambda: state.record.start(self, **facts))
        return state

    def finish(self, state: TrainingState, values: Mapping[str, Any], *, counts: Mapping[str, int]) -> None:
        """Write the run's result.json; `counts` are completed by those of the steps. The trackers are done, too."""
        steps = {"steps": state.step, "skipped_steps": state.skipped, "spikes": state.spikes}
        state.record.finish(values, recipe=self, device=str(state.device), seed=self.seed, counts={**counts, **steps})
        for tracker in state.trackers:
            tracker.finish()


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """Attention as plain products on a CPU, whose fused kernel's backward pass is slower (benchmarks/attention.py)."""
    if device.type != "cpu":
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # holds for CPUs, too, whatever its name says
    return sdpa_kernel(SDPBackend.MATH)
