"""The weights of a training run: trained parameters, whole or sharded, their optimiser and EMA, all of a checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from davae.errors import CheckpointError, SettingsError
from davae.run import faults
from davae.run.ranks import Ranks
from davae.training.optimizers import COUNTS, make_optimizer
from davae.training.recipes import OptimisationRecipe
from davae.training.sharding import gather, gather_into, own_part, own_tensor, part_of, shard

Parameters = Mapping[str, nn.Parameter]
"""Trained parameters by "model.name"."""
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
        whole: Iterable[Tensor],
    ) -> None:
        self._ranks, self._models = Ranks(), dict(models)
        for model in self._models.values():
            model.to(self._ranks.device)

        # Sharding puts other parameters in the models; the optimiser and the EMA see this rank's part of each.
        names = _find_names(self._models, parameters)
        self._twins = shard(self._models, self._ranks, whole) if self._ranks.sharded else {}
        present = _all_parameters(self._models)
        self._trained = {name: present[name] for name in names}
        self._parts = {name: own_part(parameter) for name, parameter in self._trained.items()}
        weights = list(self._parts.values())
        self.optimizer = make_optimizer(recipe, weights)

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
        pieces: list[nn.Parameter] = []
        whole: list[nn.Parameter] = []
        for name, part in self._parts.items():
            gradient = self._trained[name].grad
            if gradient is not None:
                part.grad = own_tensor(gradient)
                (whole if part is self._trained[name] else pieces).append(part)
        self._ranks.average_(_gradients(whole))
        if not pieces:
            return nn.utils.clip_grad_norm_(whole, largest)

        # The norm of all gradients together: the squares of the pieces are summed over the ranks.
        norms = [nn.utils.get_total_norm(_gradients(parts)).to(self._ranks.device) for parts in (pieces, whole)]
        norm = (self._ranks.sum_(norms[0].square()) + norms[1].square()).sqrt()
        nn.utils.clip_grads_with_norm_([*pieces, *whole], largest, norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """One step of the optimiser, and of the EMA."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        faults.at("step")
        self.optimizer.step()
        with self.evaluated():
            self._ema.step(self._parts.values())
        self._ema.shadow_params[0] = faults.at("ema", self._ema.shadow_params[0])

    def drop_gradients(self) -> None:
        """After a step, taken or skipped."""
        for parameter in (*self._trained.values(), *self._parts.values()):
            parameter.grad = None

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The models with the trained weights as they are to be used; the trained values come back exactly at the end.

        They differ for schedule-free only: it trains at y, between the averages x, which are to be used, and the
        sequence z of its steps (arXiv 2405.15682).
        """
        optimizer: Any = self.optimizer
        if not hasattr(optimizer, "eval"):
            yield
            return

        # Copies, because going to and fro has rounding errors.
        weights: list[Tensor] = list(self._parts.values())
        trained = [weight.detach().clone() for weight in weights]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                torch._foreach_copy_(weights, trained)

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
            groups["ema"][name] = _on_cpu(shadow, parameter)
        groups["optimizer"] = optimizer_tensors(self.optimizer, self._trained, self._parts)
        return groups

    def values(self) -> dict[str, Any]:
        """The plain values for a checkpoint."""
        values: dict[str, Any] = {"ema_steps": self._ema.optimization_step}
        counts = {name: value for name, value in self.optimizer.param_groups[0].items() if name in COUNTS}
        return {**values, "optimizer": counts} if counts else values

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], path: Path) -> None:
        """Take back the `groups` and `values` of the checkpoint `path`, or refuse those of other models."""
        for name, model in self._models.items():
            restore_tensors(model, name, self._trained, groups, path)

        shadows = dict(zip(self._trained, self._ema.shadow_params, strict=True))
        saved = dict(groups["ema"])
        for name in saved.keys() & shadows.keys():
            saved[name] = part_of(saved[name], self._trained[name])
        _copy_into(shadows, saved, path / "ema.safetensors")
        self._ema.optimization_step = values["ema_steps"]

        restore_optimizer(self.optimizer, self._trained, self._parts, groups["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(values.get("optimizer", {}))


def saved_tensors(model: nn.Module, model_name: str, trained: Parameters) -> dict[str, Tensor]:
    """The tensors of a model for a checkpoint, copied to the CPU: trained parameters and persistent buffers."""
    return {name: _on_cpu(tensor, tensor) for name, tensor in _live_tensors(model, model_name, trained).items()}


def restore_tensors(
    model: nn.Module, model_name: str, trained: Parameters, groups: Mapping[str, Mapping[str, Tensor]], path: Path
) -> None:
    """Take back the `saved_tensors` in the checkpoint `path`, or refuse those of another model."""
    live = _live_tensors(model, model_name, trained)
    _copy_into(live, groups.get(model_name, {}), path / f"{model_name}.safetensors")


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: Parameters, parts: Parameters) -> dict[str, Tensor]:
    """The state of an optimiser of `parts` (`own_part` of the trained parameters) by "model.name/key"."""
    tensors = {}
    for name, weight in parts.items():
        for key, value in optimizer.state.get(weight, {}).items():
            value = torch.as_tensor(value)
            # The tables of bitsandbytes are one tensor for all weights, and no file may hold one twice.
            own = value if value.shape == weight.shape else value.clone()
            tensors[f"{name}/{key}"] = _on_cpu(own, trained[name])
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, trained: Parameters, parts: Parameters, saved: Mapping[str, Tensor]
) -> None:
    """Take back the state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor | int]] = {}
    positions = {name: position for position, name in enumerate(trained)}
    for full_name, tensor in saved.items():
        name, key = full_name.rsplit("/", 1)
        own, weight = part_of(tensor, trained[name]), parts[name]
        if own.shape == weight.shape:
            # The fused optimiser pairs memory, not indices: moments must lie in memory as their weight does.
            own = torch.empty_like(weight, dtype=own.dtype).copy_(own)

        # bitsandbytes counts its steps in an int.
        is_int = not own.ndim and own.dtype == torch.int64
        state.setdefault(positions[name], {})[key] = int(own) if is_int else own
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _find_names(models: Mapping[str, nn.Module], parameters: Iterable[nn.Parameter]) -> list[str]:
    """The names "model.name" of parameters; refuses those of no model, none, and a model with a reserved name."""
    if reserved := {"ema", "optimizer"} & set(models):
        raise SettingsError(f"a model cannot be called {reserved.pop()}: a checkpoint has a file of that name")

    # Parameters are found by identity: two may hold equal values.
    names = {id(parameter): name for name, parameter in _all_parameters(models).items()}
    parameters = list(parameters)
    strangers = [tuple(p.shape) for p in parameters if id(p) not in names]
    if strangers or not parameters:
        raise SettingsError(f"parameters to train must belong to the models given; these do not (shapes): {strangers}")
    return [names[id(p)] for p in parameters]


def _all_parameters(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{model}.{name}": p for model in models for name, p in models[model].named_parameters()}


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _live_tensors(model: nn.Module, model_name: str, trained: Parameters) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    live = {name: p.detach() for name, p in parameters.items() if f"{model_name}.{name}" in trained}
    return live | {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def _on_cpu(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor for a file: whole, on the CPU; all ranks must call, and all but rank 0 get an empty tensor."""
    whole = gather(own_tensor(tensor), like).detach()
    return torch.empty(0) if dist.is_initialized() and dist.get_rank() else whole.cpu().contiguous()


def _copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors that were read from `path` into `live`; each rank takes its part of sharded tensors."""
    # Other names: the model has other layers.
    for name in sorted(live.keys() ^ saved.keys()):
        holder = "the checkpoint, not the model," if name in saved else "the model, not the checkpoint,"
        raise CheckpointError(f"{path} does not fit: {holder} has a tensor {name}. Give a new folder to start afresh")

    # Other shapes or dtypes: its layers have other sizes.
    for name, tensor in live.items():
        if (tensor.shape, tensor.dtype) != (saved[name].shape, saved[name].dtype):
            raise CheckpointError(
                f"{path} does not fit: {name} is {tuple(saved[name].shape)} {saved[name].dtype} there and "
                f"{tuple(tensor.shape)} {tensor.dtype} in the model. Give a new folder to start afresh"
            )
        own_tensor(tensor).copy_(part_of(saved[name], tensor))
