"""The state of a training run that knows no model: optimiser, EMA, schedule, metrics, checkpoints, resume."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.tracking import GeneralTracker
from rich.console import Console
from torch import Tensor, nn

from davae.errors import DataError, DavaeError, NumericsError
from davae.run import faults
from davae.run.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from davae.run.progress import StepProgress
from davae.run.ranks import Ranks
from davae.run.record import RunRecord, alone
from davae.run.storage import remove_temporaries
from davae.seeds import generator
from davae.training.companion import Companion
from davae.training.devices import computes_bfloat16
from davae.training.guards import Spikes, StepGuard
from davae.training.interruption import Interrupted, stop_requests
from davae.training.recipes import OptimisationRecipe, schedule_learning_rate
from davae.training.trackers import start_trackers
from davae.training.weights import TrainedWeights

logger = logging.getLogger(__name__)

CHECKPOINTS_KEPT = 3
Logs = Mapping[str, Tensor | float]
Batch = TypeVar("Batch")


class TrainingState:
    """Everything of a training run but the loss: the same program, run again, goes on where the last one stopped.

    The newest sound checkpoint in `folder` is loaded when the object is made; `step` is the number of steps done.

        state = TrainingState(recipe, folder, {"autoencoder": model}, parameters)
        for step in state.steps():
            for batch in state.batches():
                state.update(loss(batch))
        with state.ema_weights():
            model.save_pretrained(...)

    Without gradient accumulation a step has one batch, of the step's own number, and needs no inner loop.

    With several processes (`Ranks`) each gives the loss of its part of a batch. Loss, logs and gradients of a step are
    the means over the processes, and these means decide whether the step is skipped. Gradients are averaged here, not
    by a DDP wrapper, which lacks the methods that losses call. Only rank 0 writes. A checkpoint resumes on any number
    of ranks, with or without FSDP2.

    On the CPU a run that was killed at any moment and started again ends with the same weights, bit for bit, if the
    loss is a function of the weights, the batch and random numbers keyed by it (`seeds.generator`). torch's global
    generator is set anew from (seed, label, step, rank) at every step, for dropout inside models.

    Args:
        recipe: optimiser, schedule, EMA, precision, seed, and how often to log and save.
        folder: of the run; created. Its recipe.toml and environment.json are written.
        models: every model that has trained parameters, by a short name (a checkpoint has a file for each).
        parameters: the parameters to train, all of them out of `models`. Only these and the models' buffers are saved:
            the caller loads frozen weights again.
        label: what is trained, for the progress bar.
        companion: another model with an optimiser of its own, which joins the checkpoints; the caller updates it.
        report_to: trackers that get the lines of metrics.jsonl, too, and passed `check_trackers`.
        whole: parameters that FSDP2 does not shard, such as those at which a loss takes gradients.

    Raises:
        SettingsError: a parameter of no model, or a model with a reserved name.
        CheckpointError: the newest checkpoint belongs to another recipe or to other models.
    """

    def __init__(
        self,
        recipe: OptimisationRecipe,
        folder: Path,
        models: Mapping[str, nn.Module],
        parameters: Iterable[nn.Parameter],
        *,
        label: str = "training",
        companion: Companion | None = None,
        report_to: Sequence[str] = (),
        whole: Iterable[Tensor] = (),
    ) -> None:
        self.recipe, self.label, self.report_to = recipe, label, tuple(report_to)
        self.ranks = Ranks()
        self.device = self.ranks.device
        self.learning_rate = schedule_learning_rate(recipe)
        self.bfloat16 = recipe.precision == "bf16" or (recipe.precision == "auto" and computes_bfloat16(self.device))

        self.record = RunRecord(folder)
        self.trackers: list[GeneralTracker] = []
        self._checkpoints = self.record.folder / "checkpoints"
        self.weights = TrainedWeights(recipe, models, parameters, whole)
        self._companion = companion

        # A checkpoint, if there is one, overwrites these.
        self.step, self.seconds = 0, 0.0
        self.guard, self._spikes = StepGuard(label), Spikes()
        self._loss = math.nan
        self._updated = False
        self._pending: list[tuple[Tensor, Logs]] = []
        self._samples: list[str] = []

        self._resume()
        device, precision = str(self.device), "bf16" if self.bfloat16 else "float32"
        self.ranks.on_first(lambda: self.record.start(recipe, device=device, precision=precision))

    def steps(self) -> Iterator[int]:
        """Yield the number of every step that is left; `update` must be called once in each, for every batch of it.

        Shows progress, saves every `checkpoint_every` steps and at the end.

        Raises:
            Interrupted: one of `SIGNALS` came; the state after the running step is saved.
            NumericsError: the last step was skipped, because its loss or gradients were not finite.
        """
        lock = alone(self.record.folder) if self.ranks.first else nullcontext()
        total, samples = self.recipe.steps, self.recipe.batch_size * self.recipe.gradient_accumulation
        console = Console(stderr=True, quiet=not self.ranks.first)
        progress = StepProgress(
            self.label, done=self.step, total=total, console=console, samples=samples, device=self.device
        )
        with lock, stop_requests() as request, progress:
            self.ranks.on_first(self._begin)
            while self.step < total:
                began = time.monotonic()
                self._seed_torch()
                self._updated = False
                yield self.step
                assert self._updated, "call update() once for every batch of a step"

                self.step += 1
                self.seconds += time.monotonic() - began
                progress.show(self.step, self._loss)

                # A signal may have come to one rank only.
                signum = self.ranks.largest(request.signum)
                if signum or self.step % self.recipe.checkpoint_every == 0 or self.step == total:
                    self._save()
                if signum:
                    raise Interrupted(signum, self.step)

            # A signal may have come during the last save.
            if signum := self.ranks.largest(request.signum):
                raise Interrupted(signum, self.step)

        if self.guard.skipped_in_a_row:
            raise NumericsError(
                f"the last {self.guard.skipped_in_a_row} steps of {self.label} were not finite and changed nothing, so "
                "there is no result. Lower the learning rate, and give a new folder"
            )

    def batches(self) -> Iterator[int]:
        """Yield the number of every batch of the running step, counted over all steps; call `update` once for each."""
        count = self.recipe.gradient_accumulation
        for position in range(count):
            yield self.step * count + position

    def saving(self, load: Callable[[int], Batch]) -> Callable[[int], Batch]:
        """`load`, which makes a batch; if it fails on a rank, all ranks save the steps that are done, and end.

        A step is not saved that had some of its batches, and a companion that saw them.
        """

        def load_or_save(number: int) -> Batch:
            problem: Exception | None = None
            try:
                batch = load(number)
            except (DavaeError, OSError) as error:
                problem = error
            if not self.ranks.largest(int(problem is not None)):
                return batch

            # Every rank is here, as gathering sharded weights needs.
            if self._companion is None or not self._pending:
                self._save()
                logger.warning("%s is saved after %d steps", self.label, self.step)
            raise problem or DataError(f"another rank could not read its part of batch {number}, see its own message")

        return load_or_save

    def update(self, loss: Tensor, logs: Logs | None = None, *, samples: Sequence[str] = ()) -> None:
        """Backward pass of a batch's loss; after the step's last one a step of optimiser and EMA, and a metrics line.

        Loss and logs of a step are the means over its batches. A step whose loss or gradient norm is not finite is
        skipped: weights, optimiser and EMA stay bit for bit as they were. The skip is counted, and logged with the
        names of the step's samples. So is a spike of loss or norm, which is skipped only if `skip_spikes`. A
        NumericsError ends the run when five steps in a row were not finite.

        `loss` is a scalar with a graph, the mean over one batch; `logs` has more scalars for the metrics line, and
        `samples` the names of the samples in the batch.
        """
        assert not self._updated, "call update() once for every batch of a step, inside the loop over steps()"
        loss = faults.at("backward", faults.at("loss", loss))
        (loss / self.recipe.gradient_accumulation).backward()
        self._pending.append((loss.detach().float(), logs or {}))
        self._samples += samples
        if len(self._pending) == self.recipe.gradient_accumulation:
            self._finish_step()

    def _finish_step(self) -> None:
        loss, logs = self._step_means()
        samples, self._pending, self._samples = self._samples, [], []

        # Both numbers that decide come from the device at once.
        norm_tensor = self.weights.clip_gradients(self.recipe.clip_norm)
        self._loss, norm = torch.stack([loss, norm_tensor.float()]).tolist()
        self._updated = True

        # Take the step, or skip it whole.
        rate = self.learning_rate(self.step)
        finite = math.isfinite(self._loss) and math.isfinite(norm)
        spike = finite and self._spikes.see(self._loss, norm)
        skipped = not finite or (spike and self.recipe.skip_spikes)
        if not skipped:
            self.weights.step(rate)
        self.weights.drop_gradients()

        # Steps that stand out are always logged, with the samples that they saw.
        marks = [name for name, seen in {"skipped": skipped, "spike": spike}.items() if seen]
        if marks or self.step % self.recipe.log_every == 0 or self.step == self.recipe.steps - 1:
            line: dict[str, Any] = {"loss": self._loss, "loss_hex": self._loss.hex(), "learning_rate": rate}
            line |= {"grad_norm": norm, **logs, **dict.fromkeys(marks, True)}
            if marks and samples:
                line["samples"] = samples
            self.log(line)
        if marks:
            message = "step %d: %s: loss %g, gradient norm %g; its samples: %s"
            names = ", ".join(samples) or "not named"
            logger.warning(message, self.step, " and ".join(marks), self._loss, norm, names)
        self.guard.see(self._loss, norm, finite=finite, skipped=skipped)

    def _step_means(self) -> tuple[Tensor, Logs]:
        """The mean loss and the means of the logs over the step's batches and the ranks."""
        (loss, logs), count = self._pending[0], len(self._pending)
        if count > 1:
            loss = torch.stack([batch_loss for batch_loss, _ in self._pending]).mean()
            logs = {name: sum(batch_logs[name] for _, batch_logs in self._pending) / count for name in logs}

        if self.ranks.count > 1:
            values = (loss, *logs.values())
            numbers = [float(value.detach()) if isinstance(value, Tensor) else value for value in values]
            mean_loss, *mean_logs = self.ranks.mean(numbers)
            loss, logs = loss.new_tensor(mean_loss), dict(zip(logs, mean_logs, strict=True))
        return loss, logs

    def _seed_torch(self) -> None:
        position = (self.step, self.ranks.rank) if self.ranks.rank else (self.step,)
        torch.manual_seed(generator(self.recipe.seed, f"{self.label} step", *position).initial_seed())

    def autocast(self) -> torch.autocast:
        """The context for the networks' forward pass: bfloat16 if `precision` says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def ema_weights(self) -> AbstractContextManager[None]:
        """The models with the EMA's weights; the trained weights come back exactly at the end."""
        return self.weights.averaged()

    def log(self, values: Mapping[str, Tensor | float | str | bool | list[str]]) -> None:
        """Append a line to metrics.jsonl at once, under the running step: for example, held-out metrics."""
        if not self.ranks.first:
            return
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        self.record.append({"step": self.step, **plain, "seconds": round(self.seconds, 3)})

        # Trackers take numbers only.
        numbers = {name: float(value) for name, value in plain.items() if not isinstance(value, str | bool | list)}
        for tracker in self.trackers:
            tracker.log(numbers, step=self.step)

    def finish(self, values: Mapping[str, Any], *, counts: Mapping[str, int]) -> None:
        """Write result.json, with these counts and those of the steps, and end the trackers; for rank 0."""
        recipe, device = self.recipe, str(self.device)
        steps = {"steps": self.step, "skipped_steps": self.guard.skipped, "spikes": self._spikes.count}
        self.record.finish(values, recipe=recipe, device=device, seed=recipe.seed, counts={**counts, **steps})
        for tracker in self.trackers:
            tracker.finish()

    def _begin(self) -> None:
        remove_temporaries(self._checkpoints)
        self.record.truncate(self.step)
        self.trackers = start_trackers(self.report_to, self.record.folder, step=self.step)

    def _save(self) -> None:
        if self.ranks.first:
            self.record.sync()

        # All ranks gather sharded tensors; rank 0 writes them.
        groups = self.weights.groups()
        values: dict[str, Any] = {
            "total_steps": self.recipe.steps,
            "learning_rate": self.learning_rate(self.step),
            **self.weights.values(),
            **self.guard.values(),
            "spikes": self._spikes.count,
            "recent": list(self._spikes.recent),
            "seconds": self.seconds,
        }
        if self._companion is not None:
            groups |= self._companion.groups()
            values["companion"] = self._companion.guard.values()

        checkpoint, digest = Checkpoint(self.step, groups, values), self.recipe.run_digest()
        self.ranks.on_first(
            lambda: save_checkpoint(self._checkpoints, checkpoint, recipe_digest=digest, keep=CHECKPOINTS_KEPT)
        )

    def _resume(self) -> None:
        """Load the newest sound checkpoint, if there is one."""
        newest = self.ranks.on_first(lambda: getattr(latest_checkpoint(self._checkpoints), "name", None))
        if newest is None:
            return

        # Rank 0 has just verified the checkpoint; the others verify what they read.
        path = self._checkpoints / newest
        checkpoint = load_checkpoint(path, recipe_digest=self.recipe.run_digest(), verified=self.ranks.first)
        groups, values = checkpoint.groups, checkpoint.values
        self.weights.restore(groups, values, path)
        self.guard.restore(values)
        self._spikes = Spikes(map(tuple, values["recent"]), values["spikes"])
        self.step, self.seconds = checkpoint.step, values["seconds"]
        if self._companion is not None:
            self._companion.restore(groups, values.get("companion", {}), path)
        logger.info("%s goes on at step %d of %d", self.label, self.step, self.recipe.steps)
