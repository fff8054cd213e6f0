"""The weights of a training run: the models' trained parameters, whole or sharded, their optimiser and their EMA."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from davae.run import faults
from davae.run.ranks import Ranks
from davae.training.gradients import clipped_norm
from davae.training.optimizers import OptimizerSettings, averages, counts, evaluated, restore_counts
from davae.training.sharding import gathered_into, now_trained, own_part, part_of, shard
from davae.training.tensors import (
    copy_into,
    live_tensors,
    named_parameters,
    on_cpu,
    optimizer_tensors,
    restore_optimizer,
    saved_tensors,
)

EMA_WARMUP_POWER = 0.75  # the EMA averages over about step ** 0.75 steps until its decay is reached


class TrainedWeights:
    """What a `TrainingState` trains: parameters, optimiser and EMA; with FSDP2, this rank's part of each.

    Args:
        models: every model that has trained parameters, by a short name; moved to the ranks' device.
        parameters: the parameters to train, all of them out of `models`.
        ranks: the processes of the run.
        whole: parameters that FSDP2 does not shard.
        optimizer: which one, with its settings.
        learning_rate: before the first step.
        ema_decay: the decay of the EMA after its warm-up.
        ema_warmup: of EMA update n > 0, by decays of at most (1 + n) / (10 + n), or else 1 - (1 + n)^-0.75.

    Raises:
        SettingsError: a parameter of no model, or a reserved name.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        parameters: Iterable[nn.Parameter],
        ranks: Ranks,
        *,
        whole: Iterable[Tensor],
        optimizer: OptimizerSettings,
        learning_rate: float,
        ema_decay: float,
        ema_warmup: bool,
    ) -> None:
        self._ranks, self._models = ranks, dict(models)
        for model in self._models.values():
            model.to(ranks.device)
        self._trained = named_parameters(self._models, parameters)
        self._twins = shard(self._models, ranks, whole) if ranks.sharded else {}
        self._trained = now_trained(self._models, self._trained)
        self._parts = {name: own_part(parameter) for name, parameter in self._trained.items()}
        weights = list(self._parts.values())
        self.optimizer = optimizer.make(weights, learning_rate=learning_rate)
        other = not ema_warmup  # diffusers' own warm-up is the power; without, it has (1 + n) / (10 + n)
        self._ema = EMAModel(weights, decay=ema_decay, use_ema_warmup=other, power=EMA_WARMUP_POWER, foreach=True)

    def clipped_norm(self, most: float) -> Tensor:
        """Average the gradients over the ranks and clip them to a norm of `most`; returns their norm before that."""
        first = next(iter(self._trained.values()))
        first.grad = faults.at("clip", faults.at("grad", first.grad))
        return clipped_norm(self._trained, self._parts, self._ranks, most)

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
    def of_ema(self) -> Iterator[None]:
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
        return gathered_into(self._twins[name], self._models[name]) if name in self._twins else self._models[name]

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Their tensors for a checkpoint, whole and on the CPU; all ranks must call."""
        assert self._ema.temp_stored_params is None, "leave ema_weights() before the step ends"
        groups = {name: saved_tensors(model, name, self._trained) for name, model in self._models.items()}
        shadows = zip(self._trained.items(), self._ema.shadow_params, strict=True)
        groups["ema"] = {name: on_cpu(shadow, parameter) for (name, parameter), shadow in shadows}
        groups["optimizer"] = optimizer_tensors(self.optimizer, self._trained, self._parts)
        return groups

    def values(self) -> dict[str, Any]:
        """Their plain values for a checkpoint."""
        kept = counts(self.optimizer)
        return {"ema_steps": self._ema.optimization_step, **({"optimizer": kept} if kept else {})}

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], path: Path) -> None:
        """Take back what `groups` and `values` gave to the checkpoint `path`.

        Raises:
            CheckpointError: it belongs to other models.
        """
        for name, model in self._models.items():
            copy_into(live_tensors(model, name, self._trained), groups.get(name, {}), path / f"{name}.safetensors")
        shadows = dict(zip(self._trained, self._ema.shadow_params, strict=True))
        kept = {name: part_of(whole, self._trained[name]) for name, whole in groups["ema"].items() if name in shadows}
        copy_into(shadows, {**groups["ema"], **kept}, path / "ema.safetensors")
        restore_optimizer(self.optimizer, self._trained, self._parts, groups["optimizer"])
        restore_counts(self.optimizer, values.get("optimizer", {}))
        self._ema.optimization_step = values["ema_steps"]
