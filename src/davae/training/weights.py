"""The weights of a training run: the models' trained parameters, whole or sharded, their optimiser and their EMA."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from davae.run import faults
from davae.run.ranks import Ranks
from davae.training.optimizers import averages, counts, evaluated, make_optimizer, restore_counts
from davae.training.recipes import OptimisationRecipe
from davae.training.sharding import gather_into, own_gradient, own_part, part_of, shard
from davae.training.tensors import (
    all_parameters,
    copy_into,
    find_names,
    live_tensors,
    on_cpu,
    optimizer_tensors,
    restore_optimizer,
    saved_tensors,
)

EMA_WARMUP_POWER = 0.75
"""The EMA averages over about step ** 0.75 steps until its decay is reached."""


class TrainedWeights:
    """The trained parameters of a `TrainingState`, their optimiser and their EMA; with FSDP2, this rank's part of each.

    The models are moved to the ranks' device. FSDP2 does not shard the parameters in `whole`.
    """

    def __init__(
        self,
        recipe: OptimisationRecipe,
        models: Mapping[str, nn.Module],
        parameters: Iterable[nn.Parameter],
        ranks: Ranks,
        *,
        whole: Iterable[Tensor],
    ) -> None:
        self._ranks, self._models = ranks, dict(models)
        for model in self._models.values():
            model.to(ranks.device)

        # Sharding puts other parameters in the models; the optimiser and the EMA see this rank's part of each.
        names = find_names(self._models, parameters)
        self._twins = shard(self._models, ranks, whole) if ranks.sharded else {}
        present = all_parameters(self._models)
        self._trained = {name: present[name] for name in names}
        self._parts = {name: own_part(parameter) for name, parameter in self._trained.items()}
        self._sharded = [name for name, part in self._parts.items() if part is not self._trained[name]]

        # The optimiser of this rank's parts.
        weights = list(self._parts.values())
        self.optimizer = make_optimizer(
            recipe.optimizer,
            weights,
            learning_rate=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
        )

        # diffusers' own warm-up is the power law; without it, diffusers has (1 + n) / (10 + n).
        power_law = not recipe.ema_warmup
        self._ema = EMAModel(
            weights, decay=recipe.ema_decay, use_ema_warmup=power_law, power=EMA_WARMUP_POWER, foreach=True
        )

    def clip_gradients(self, largest: float) -> Tensor:
        """Average the gradients over the ranks and clip them to a norm; returns their norm before that, a scalar."""
        first = next(iter(self._trained.values()))
        first.grad = faults.at("clip", faults.at("grad", first.grad))

        # FSDP2 has averaged the gradients of sharded parameters already.
        for name in self._sharded:
            self._parts[name].grad = own_gradient(self._trained[name])
        pieces: list[nn.Parameter] = []
        whole: list[nn.Parameter] = []
        for name, part in self._parts.items():
            if part.grad is not None:
                (pieces if name in self._sharded else whole).append(part)
        self._ranks.average_([part.grad for part in whole if part.grad is not None])
        if not self._sharded:
            return nn.utils.clip_grad_norm_(whole, largest)

        # The norm of all gradients together: the squares of the pieces are summed over the ranks.
        norms = []
        for parts in (pieces, whole):
            gradients = [part.grad for part in parts if part.grad is not None]
            norms.append(nn.utils.get_total_norm(gradients).to(self._ranks.device))
        norm = (self._ranks.sum_(norms[0].square()) + norms[1].square()).sqrt()
        nn.utils.clip_grads_with_norm_([*pieces, *whole], largest, norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """One step of the optimiser, and of the EMA."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        faults.at("step")
        self.optimizer.step()
        self._ema.step(averages(self.optimizer, self._parts.values()))
        self._ema.shadow_params[0] = faults.at("ema", self._ema.shadow_params[0])

    def drop_gradients(self) -> None:
        """After a step, taken or skipped."""
        for parameter in (*self._trained.values(), *self._parts.values()):
            parameter.grad = None

    def evaluated(self) -> AbstractContextManager[None]:
        """The models with the trained weights as they are to be used: `optimizers.evaluated`."""
        return evaluated(self.optimizer)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The models with the EMA's weights; the trained weights come back exactly at the end."""
        weights = list(self._parts.values())
        assert self._ema.temp_stored_params is None, "ema_weights() does not nest"
        self._ema.store(weights)
        try:
            self._ema.copy_to(weights)
            yield
        finally:
            self._ema.restore(weights)

    def whole(self, name: str) -> nn.Module:
        """The model of that name; with FSDP2 a copy on rank 0's CPU, to save it, for which all ranks must call."""
        return gather_into(self._twins[name], self._models[name]) if name in self._twins else self._models[name]

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors for a checkpoint, whole and on the CPU; all ranks must call."""
        assert self._ema.temp_stored_params is None, "leave ema_weights() before the step ends"
        groups = {name: saved_tensors(model, name, self._trained) for name, model in self._models.items()}

        # The EMA's tensors are parts as the weights are.
        groups["ema"] = {}
        for (name, parameter), shadow in zip(self._trained.items(), self._ema.shadow_params, strict=True):
            groups["ema"][name] = on_cpu(shadow, parameter)
        groups["optimizer"] = optimizer_tensors(self.optimizer, self._trained, self._parts)
        return groups

    def values(self) -> dict[str, Any]:
        """The plain values for a checkpoint."""
        values: dict[str, Any] = {"ema_steps": self._ema.optimization_step}
        if optimizer_counts := counts(self.optimizer):
            values["optimizer"] = optimizer_counts
        return values

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], path: Path) -> None:
        """Take back the `groups` and `values` of the checkpoint `path`, or refuse those of other models."""
        for name, model in self._models.items():
            copy_into(live_tensors(model, name, self._trained), groups.get(name, {}), path / f"{name}.safetensors")

        shadows = dict(zip(self._trained, self._ema.shadow_params, strict=True))
        saved = dict(groups["ema"])
        for name in saved.keys() & shadows.keys():
            saved[name] = part_of(saved[name], self._trained[name])
        copy_into(shadows, saved, path / "ema.safetensors")
        self._ema.optimization_step = values["ema_steps"]

        restore_optimizer(self.optimizer, self._trained, self._parts, groups["optimizer"])
        restore_counts(self.optimizer, values.get("optimizer", {}))
