"""The state of a training run that knows no model: optimiser, EMA, schedule, metrics, checkpoints, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console
from torch import Tensor, nn

from davae.errors import NumericsError
from davae.run import faults
from davae.run.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_litter,
    save_checkpoint,
)
from davae.run.progress import StepProgress
from davae.run.ranks import Ranks
from davae.run.record import RunRecord, alone
from davae.seeds import generator
from davae.training.accumulation import Logs, means
from davae.training.companion import MAX_SKIPPED_IN_A_ROW, Companion
from davae.training.interruption import Interrupted, stop_requests
from davae.training.optimizers import ADAMW, OptimizerSettings
from davae.training.precision import computes_bfloat16
from davae.training.spikes import Spikes
from davae.training.trackers import check_trackers, start_trackers
from davae.training.weights import TrainedWeights

logger = logging.getLogger(__name__)


class TrainingState:
    """Everything of a training run but the loss: the same program, run again, goes on where the last one stopped.

    The newest sound checkpoint in `folder` is loaded when the object is made; `step` is the number of steps done.

        state = TrainingState(folder, {"autoencoder": model}, parameters, total_steps=1000, ...)
        for step in state.steps():
            for batch in state.batches():
                state.update(loss(batch))
        with state.ema_weights():
            model.save_pretrained(...)

    Without gradient accumulation a step has one batch, of the step's own number, and needs no inner loop.

    Of several processes (`Ranks`) each gives the loss of its part of a batch; a step's loss, logs and gradients are the
    means over them, and so is what decides whether it is skipped. Gradients are averaged here, after a step's last
    backward pass, not by a DDP wrapper, which lacks the methods that losses call. Rank 0 alone writes, and its
    checkpoints go on with any number of ranks, FSDP2 or not.

    On the CPU a run that was killed at any moment and started again ends with the same weights, bit for bit, if the
    loss is a function of the weights, the batch and random numbers keyed by it (`seeds.generator`). torch's global
    generator is set anew from (seed, label, step, rank) at every step, for dropout inside models.
    """

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, nn.Module],
        parameters: Iterable[nn.Parameter],
        *,
        total_steps: int,
        learning_rate: Callable[[int], float],
        seed: int,
        recipe_digest: str,
        label: str = "training",
        optimizer: OptimizerSettings = ADAMW,
        clip_norm: float = 1.0,
        ema_decay: float = 0.999,
        ema_warmup: bool = False,
        gradient_accumulation: int = 1,
        mixed_precision: Literal["auto", "bf16"] | None = None,
        checkpoint_every: int = 100,
        keep: int = 3,
        log_every: int = 10,
        skip_spikes: bool = False,
        console: Console | None = None,
        companion: Companion | None = None,
        samples: int = 0,
        report_to: Sequence[str] = (),
        ranks: Ranks | None = None,
        whole: Iterable[Tensor] = (),
    ) -> None:
        """Move the models to the device, make optimiser and EMA, and load the newest sound checkpoint if there is one.

        Args:
            folder: holds `checkpoints/` and `metrics.jsonl`; created.
            models: every model that has trained parameters, by a short name (a checkpoint has a file for each).
            parameters: the parameters to train, all of them out of `models`. Only these and the models' buffers are
                saved: frozen weights are the caller's to load again.
            total_steps: optimiser steps of the whole run.
            learning_rate: the learning rate of a step, a pure function (`warmup_cosine`).
            seed: the seed of the run.
            recipe_digest: `Recipe.digest()`; a checkpoint of another recipe is refused.
            label: what is trained, for the progress bar.
            optimizer: which one, with its settings.
            clip_norm: the largest norm of all gradients together.
            ema_decay: the decay of the EMA after its warm-up.
            ema_warmup: of EMA update n > 0, by decays of at most (1 + n) / (10 + n), or else 1 - (1 + n)^-0.75.
            gradient_accumulation: batches in a step; its loss is the mean of theirs.
            mixed_precision: what `autocast` does: nothing, or bfloat16; "auto" is the latter where `computes_bfloat16`.
            checkpoint_every: steps between checkpoints.
            keep: how many of the newest checkpoints stay.
            log_every: steps between lines of metrics.jsonl.
            skip_spikes: skip the steps that `Spikes` sees, instead of only telling of them.
            console: where progress is shown; the default is a new one on stderr.
            companion: another model with an optimiser of its own, whose steps the caller takes and which joins the
                checkpoints.
            samples: pictures in a batch, for the samples a second that are shown.
            report_to: trackers that are told what metrics.jsonl is (`start_trackers`).
            ranks: the processes of the run; by default those of the environment.
            whole: parameters that FSDP2 does not shard, such as those at which a loss takes gradients.

        Raises:
            SettingsError: a parameter of no model, a reserved name, or a tracker that is not there.
            RankError: another process is missing.
            CheckpointError: the newest checkpoint belongs to another recipe or to other models.
            StorageError: the folder cannot be written.
        """
        self.ranks = Ranks() if ranks is None else ranks
        self.device = self.ranks.device
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0
        self.total_steps, self.learning_rate, self.seed, self.label = total_steps, learning_rate, seed, label
        self.clip_norm, self.gradient_accumulation = clip_norm, gradient_accumulation
        if mixed_precision == "auto":
            mixed_precision = "bf16" if computes_bfloat16(self.device) else None
        self.mixed_precision = mixed_precision
        self.checkpoint_every, self.keep, self.log_every = checkpoint_every, keep, log_every
        self.skip_spikes, self.recipe_digest = skip_spikes, recipe_digest
        self.samples, self.report_to = samples, tuple(report_to)
        check_trackers(self.report_to)
        self.trackers: list[GeneralTracker] = []
        self.record = RunRecord(folder)
        self._folder = self.record.folder / "checkpoints"
        self._console = (console or Console(stderr=True)) if self.ranks.first else Console(quiet=True)
        self.weights = TrainedWeights(
            models,
            parameters,
            self.ranks,
            whole=whole,
            optimizer=optimizer,
            learning_rate=learning_rate(0),
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
        )
        self._companion = companion
        if companion is not None:
            companion.prepare(self.ranks)
        self._streak = 0
        self._updated = False
        self._pending: list[tuple[Tensor, Logs]] = []
        self._samples: list[str] = []
        self._spikes = Spikes()
        self._loss = math.nan
        newest = self.ranks.on_first(lambda: getattr(latest_checkpoint(self._folder), "name", None))
        if newest is not None:
            path, verified = self._folder / newest, self.ranks.first  # by rank 0 just now; others verify what they read
            self._restore(load_checkpoint(path, recipe_digest=recipe_digest, verified=verified), path)
            logger.info("%s goes on at step %d of %d", label, self.step, total_steps)

    def steps(self) -> Iterator[int]:
        """Yield the number of every step that is left; `update` must be called once in each, for every batch of it.

        Shows progress, saves every `checkpoint_every` steps and at the end.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state after the running step is saved.
            SettingsError: another process trains in the same folder.
            StorageError: a checkpoint or a metrics line cannot be written.
            NumericsError: the last step was skipped, because its loss or gradients were not finite.
            RankError: another rank is missing.
        """
        lock = alone(self.record.folder) if self.ranks.first else nullcontext()
        with lock, stop_requests() as request, self._progress() as progress:
            self.ranks.on_first(self._begin)
            while self.step < self.total_steps:
                began = time.monotonic()
                position = (self.step, self.ranks.rank) if self.ranks.rank else (self.step,)
                torch.manual_seed(generator(self.seed, f"{self.label} step", *position).initial_seed())
                self._updated = False
                yield self.step
                assert self._updated, "call update() once for every batch of a step"
                self.step += 1
                self.seconds += time.monotonic() - began
                progress.show(self.step, self._loss)
                stop = self.ranks.largest(request.signum or 0)  # it may have come to one rank only
                if stop or self.step % self.checkpoint_every == 0 or self.step == self.total_steps:
                    self._save()
                if stop:
                    raise Interrupted(stop, self.step)
            if stop := self.ranks.largest(request.signum or 0):  # it came during the last save
                raise Interrupted(stop, self.step)
        if self._streak:
            raise NumericsError(
                f"the last {self._streak} steps of {self.label} were not finite and changed nothing, so there is no "
                "result. Lower the learning rate, and give a new folder"
            )

    @property
    def spikes(self) -> int:
        """How many steps of the whole run were spikes."""
        return self._spikes.count

    @property
    def batch(self) -> int:
        """The number of the running batch, counted over all steps: what its random numbers are keyed by."""
        return self.step * self.gradient_accumulation + len(self._pending)

    def batches(self) -> Iterator[int]:
        """Yield `batch` for every batch of the running step; `update` must be called once for each."""
        for _ in range(self.gradient_accumulation):
            yield self.batch

    def update(self, loss: Tensor, logs: Logs | None = None, *, samples: Sequence[str] = ()) -> None:
        """Backward of a batch's loss; after the step's last one a step of optimiser, schedule, EMA, and a metrics line.

        A step's loss and logs are the means over its batches. If the loss or the norm of the gradients is not finite,
        the step is skipped: weights, optimiser and EMA stay bit for bit as they were; the skip is counted and logged,
        with the names of the step's samples. So is a spike of loss or norm, which is skipped only if `skip_spikes`.

        Args:
            loss: a scalar with a graph, the mean over one batch.
            logs: more scalars for the metrics line.
            samples: names of what is in the batch.

        Raises:
            NumericsError: five steps in a row were skipped.
        """
        assert not self._updated, "call update() once for every batch of a step, inside the loop over steps()"
        loss = faults.at("backward", faults.at("loss", loss))
        (loss / self.gradient_accumulation).backward()
        self._pending.append((loss.detach().float(), logs or {}))
        self._samples += samples
        if len(self._pending) < self.gradient_accumulation:
            return
        mean_loss, logs = means(self._pending)
        samples, self._pending, self._samples = self._samples, [], []
        if self.ranks.count > 1:
            numbers = (v.detach() if isinstance(v, Tensor) else v for v in (mean_loss, *logs.values()))
            value, *values = self.ranks.mean(map(float, numbers))
            mean_loss, logs = mean_loss.new_tensor(value), dict(zip(logs, values, strict=True))
        norm = self.weights.clipped_norm(self.clip_norm)
        self._loss, norm = torch.stack([mean_loss, norm.float()]).tolist()
        self._updated = True
        rate = self.learning_rate(self.step)
        finite = math.isfinite(self._loss) and math.isfinite(norm)
        spike = finite and self._spikes.see(self._loss, norm)
        skipped = not finite or (spike and self.skip_spikes)
        if not skipped:
            self.weights.step(rate)
        self.weights.drop_gradients()
        self._streak = 0 if finite else self._streak + 1
        self.skipped += skipped
        odd = {name: True for name, seen in {"skipped": skipped, "spike": spike}.items() if seen}
        if skipped or spike or self.step % self.log_every == 0 or self.step == self.total_steps - 1:
            line = {"loss": self._loss, "loss_hex": self._loss.hex(), "learning_rate": rate, "grad_norm": norm}
            self.log({**line, **logs, **odd, **({"samples": list(samples)} if odd and samples else {})})
        if odd:
            what, names = " and ".join(odd), ", ".join(samples) or "not named"
            message = "step %d: %s: loss %g, gradient norm %g; its samples: %s"
            logger.warning(message, self.step, what, self._loss, norm, names)
        if self._streak == MAX_SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"{self.label}: loss or gradient was not finite in {self._streak} steps in a row (step {self.step}: "
                f"loss {self._loss}, gradient norm {norm}). The weights are those of before; look at the data of these "
                "steps or lower the learning rate"
            )

    def log(self, values: Mapping[str, Tensor | float | str | bool | list[str]]) -> None:
        """Append a line to metrics.jsonl at once, under the running step: for example, held-out metrics."""
        if not self.ranks.first:
            return
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        self.record.append({"step": self.step, **plain, "seconds": round(self.seconds, 3)})
        numbers = {name: float(value) for name, value in plain.items() if not isinstance(value, str | bool | list)}
        for tracker in self.trackers:
            tracker.log(numbers, step=self.step)

    def autocast(self) -> torch.autocast:
        """The context for the networks' forward pass: bfloat16 where `mixed_precision` says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def ema_weights(self) -> AbstractContextManager[None]:
        """The models with the EMA's weights; the trained weights come back exactly at the end."""
        return self.weights.of_ema()

    def whole(self, name: str) -> nn.Module:
        """The model of that name; with FSDP2 a copy on rank 0's CPU, to save it, for which all ranks must call."""
        return self.weights.whole(name)

    def _begin(self) -> None:
        remove_litter(self._folder)
        self.record.truncate(self.step)
        self.trackers = start_trackers(self.report_to, self.record.folder, step=self.step)

    def _progress(self) -> StepProgress:
        return StepProgress(
            self.label,
            done=self.step,
            total=self.total_steps,
            console=self._console,
            samples=self.samples * self.gradient_accumulation,
            device=self.device,
        )

    def _save(self) -> None:
        if self.ranks.first:
            self.record.sync()
        groups = self.weights.groups()
        values: dict[str, Any] = {
            "total_steps": self.total_steps,
            "learning_rate": self.learning_rate(self.step),
            **self.weights.values(),
            "skipped": self.skipped,
            "skipped_in_a_row": self._streak,
            "spikes": self._spikes.count,
            "recent": list(self._spikes.recent),
            "seconds": self.seconds,
        }
        if self._companion is not None:
            groups |= self._companion.groups()
            values["companion"] = self._companion.values()
        checkpoint = Checkpoint(self.step, groups, values)
        digest, keep = self.recipe_digest, self.keep
        self.ranks.on_first(lambda: save_checkpoint(self._folder, checkpoint, recipe_digest=digest, keep=keep))

    def _restore(self, checkpoint: Checkpoint, path: Path) -> None:
        groups, values = checkpoint.groups, checkpoint.values
        self.weights.restore(groups, values, path)
        self.step = checkpoint.step
        self.skipped = values["skipped"]
        self._streak = values["skipped_in_a_row"]
        self._spikes = Spikes(tuple(pair) for pair in values["recent"])
        self._spikes.count = values["spikes"]
        self.seconds = values["seconds"]
        if self._companion is not None:
            self._companion.restore(groups, values.get("companion", {}), path)
