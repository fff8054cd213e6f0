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
from davae.training.recipes import OptimisationRecipe
from davae.training.weights import optimizer_tensors, restore_optimizer, restore_tensors, saved_tensors

logger = logging.getLogger(__name__)


class Companion:
    """A model, its optimiser at the recipe's constant learning rate, and their part of a `TrainingState`'s checkpoints.

    For every batch of a step in which the model is trained, call `update` once. All parameters of the model are
    trained, and its buffers are saved. It has no EMA. Every rank holds it whole, with FSDP2, too. A checkpoint has the
    files `name`.safetensors and `name`_optimizer.safetensors.
    """

    def __init__(self, name: str, model: nn.Module, recipe: OptimisationRecipe) -> None:
        self._ranks = Ranks()
        self.name, self.model, self.recipe = name, model.to(self._ranks.device), recipe
        self.guard = StepGuard(name)
        self._pending: list[Tensor] = []
        self._trained = {f"{name}.{own_name}": parameter for own_name, parameter in model.named_parameters()}
        self.optimizer = make_optimizer(recipe, list(self._trained.values()))
        self._keep_buffers()

    def update(self, loss: Tensor) -> None:
        """Backward pass of a batch's loss, and after a step's last batch one step of the optimiser.

        If the loss or the norm of the gradients is not finite, or a buffer (BatchNorm's statistics) is not fit for a
        checkpoint, the step is skipped: weights and moments stay bit for bit as they were, and the buffers go back to
        their values after the last step that was taken. A NumericsError ends the run at the fifth skip in a row.
        """
        loss = faults.at("discriminator", loss)
        (loss / self.recipe.gradient_accumulation).backward()
        self._pending.append(loss.detach().float())
        if len(self._pending) < self.recipe.gradient_accumulation:
            return

        # Loss and gradients are the means over the batches and the ranks.
        mean = torch.stack(self._pending).mean()
        self._pending = []
        if self._ranks.count > 1:
            mean = mean.new_tensor(self._ranks.mean([mean.item()])[0])
            self._ranks.average_(p.grad for p in self._trained.values() if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self.recipe.clip_norm)

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
        self.guard.see(mean_value, norm_value, finite=finite, skipped=not finite)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors for a checkpoint, on the CPU."""
        return {
            self.name: saved_tensors(self.model, self.name, self._trained),
            f"{self.name}_optimizer": optimizer_tensors(self.optimizer, self._trained, self._trained),
        }

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], path: Path) -> None:
        """Take back the `groups` and guard's `values` of the checkpoint `path`, or refuse those of another model."""
        restore_tensors(self.model, self.name, self._trained, groups, path)
        restore_optimizer(self.optimizer, self._trained, self._trained, groups[f"{self.name}_optimizer"])
        self.guard.restore(values)
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        self._buffers = [buffer.clone() for buffer in self.model.buffers()]
