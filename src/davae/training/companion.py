"""A second model in a training run, with an optimiser of its own: stage 1's discriminator."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.run import faults
from davae.run.checkpoint import LARGEST
from davae.run.ranks import Ranks
from davae.training.guards import StepGuard
from davae.training.optimizers import make_optimizer
from davae.training.tensors import (
    copy_into,
    find_names,
    live_tensors,
    optimizer_tensors,
    restore_optimizer,
    saved_tensors,
)

logger = logging.getLogger(__name__)


class Companion:
    """A model, an AdamW at a constant learning rate, and their part of a `TrainingState`'s checkpoints.

    The state moves it to its device and loads it when it resumes. For every batch of a step in which the model is
    trained, call `update` once; `gradient_accumulation` calls make one step of its optimiser. All parameters of the
    model are trained, and its buffers are saved. It has no EMA. Every rank holds it whole, with FSDP2, too. A
    checkpoint has the files `name`.safetensors and `name`_optimizer.safetensors.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
        gradient_accumulation: int = 1,
    ) -> None:
        self.name, self.model = name, model
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.clip_norm, self.gradient_accumulation = clip_norm, gradient_accumulation
        self.guard = StepGuard(name)
        self._pending: list[Tensor] = []
        names = find_names({name: model}, model.parameters())
        self._trained = dict(zip(names, model.parameters(), strict=True))

    def prepare(self, ranks: Ranks) -> None:
        """Move the model to this rank's device and make its optimiser."""
        self._ranks = ranks
        self.model.to(ranks.device)
        self.optimizer = make_optimizer(
            "AdamW",
            list(self._trained.values()),
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )
        self._keep_buffers()

    def update(self, loss: Tensor) -> None:
        """Backward pass of a batch's loss, and after a step's last batch one step of the optimiser.

        If the loss or the norm of the gradients is not finite, or a buffer (BatchNorm's statistics) is not fit for a
        checkpoint, the step is skipped: weights and moments stay bit for bit as they were, and the buffers go back to
        their values after the last step that was taken.

        Raises:
            NumericsError: five steps in a row were skipped.
        """
        loss = faults.at("discriminator", loss)
        (loss / self.gradient_accumulation).backward()
        self._pending.append(loss.detach().float())
        if len(self._pending) < self.gradient_accumulation:
            return

        # Loss and gradients are the means over the batches and the ranks.
        mean = torch.stack(self._pending).mean()
        self._pending = []
        if self._ranks.count > 1:
            mean = mean.new_tensor(self._ranks.mean([mean.item()])[0])
            self._ranks.average_(p.grad for p in self._trained.values() if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self.clip_norm)

        # All numbers that decide come from the device at once.
        largest = [buffer.abs().amax().float() for buffer in self.model.buffers()]
        mean_value, norm_value, *buffers = torch.stack([mean, norm.float(), *largest]).tolist()
        finite = math.isfinite(mean_value) and math.isfinite(norm_value) and all(size <= LARGEST for size in buffers)

        # Take the step, or undo what the forward pass did to BatchNorm's statistics.
        if finite:
            self.optimizer.step()
            self._keep_buffers()
        else:
            for buffer, before in zip(self.model.buffers(), self._buffers, strict=True):
                buffer.copy_(before)
            logger.warning("a step of the %s skipped: loss %g, gradient norm %g", self.name, mean_value, norm_value)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.see(finite=finite, skipped=not finite)
        self.guard.check(mean_value, norm_value)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors for a checkpoint, on the CPU."""
        return {
            self.name: saved_tensors(self.model, self.name, self._trained),
            f"{self.name}_optimizer": optimizer_tensors(self.optimizer, self._trained, self._trained),
        }

    def values(self) -> dict[str, int]:
        """Its plain values for a checkpoint."""
        return self.guard.values()

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], path: Path) -> None:
        """Take back the `groups` and `values` of the checkpoint `path`, or refuse those of another model."""
        live = live_tensors(self.model, self.name, self._trained)
        copy_into(live, groups.get(self.name, {}), path / f"{self.name}.safetensors")
        restore_optimizer(self.optimizer, self._trained, self._trained, groups[f"{self.name}_optimizer"])
        self.guard.restore(values)
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        self._buffers = [buffer.clone() for buffer in self.model.buffers()]
