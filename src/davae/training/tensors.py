"""The tensors of models and their optimisers in a checkpoint, by name, and how they come back."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from davae.errors import CheckpointError, SettingsError
from davae.training.sharding import gather, part_of


def all_parameters(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters by "model.name"."""
    return {f"{model}.{name}": p for model in models for name, p in models[model].named_parameters()}


def find_names(models: Mapping[str, nn.Module], parameters: Iterable[nn.Parameter]) -> list[str]:
    """The names "model.name" of parameters.

    Raises:
        SettingsError: a parameter of no model, or none at all, or a model with a name that a checkpoint needs itself.
    """
    if reserved := {"ema", "optimizer"} & set(models):
        raise SettingsError(f"a model cannot be called {reserved.pop()}: a checkpoint has a file of that name")

    # Parameters are found by identity: two may hold equal values.
    names = {id(parameter): name for name, parameter in all_parameters(models).items()}
    parameters = list(parameters)
    strangers = [tuple(p.shape) for p in parameters if id(p) not in names]
    if strangers or not parameters:
        raise SettingsError(f"parameters to train must belong to the models given; these do not (shapes): {strangers}")
    return [names[id(p)] for p in parameters]


def live_tensors(model: nn.Module, model_name: str, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint has: trained parameters and persistent buffers, not copied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    live = {name: p.detach() for name, p in parameters.items() if f"{model_name}.{name}" in trained}
    return live | {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def saved_tensors(model: nn.Module, model_name: str, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of `live_tensors` on the CPU."""
    return {name: on_cpu(tensor, tensor) for name, tensor in live_tensors(model, model_name, trained).items()}


def on_cpu(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor for a file: whole, on the CPU; all ranks must call, and all but rank 0 get an empty tensor."""
    whole = gather(tensor.to_local() if isinstance(tensor, DTensor) else tensor, like).detach()
    return torch.empty(0) if dist.is_initialized() and dist.get_rank() else whole.cpu().contiguous()


def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors that were read from `path` into `live`; each rank takes its part of sharded tensors.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
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
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        own.copy_(part_of(saved[name], tensor))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], parts: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The state of an optimiser of `parts` (`own_part` of the trained parameters) by "model.name/key"."""
    tensors = {}
    for name, weight in parts.items():
        for key, value in optimizer.state.get(weight, {}).items():
            value = torch.as_tensor(value)
            # The tables of bitsandbytes are one tensor for all weights, and no file may hold one twice.
            own = value if value.shape == weight.shape else value.clone()
            tensors[f"{name}/{key}"] = on_cpu(own, trained[name])
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    trained: Mapping[str, nn.Parameter],
    parts: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
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
