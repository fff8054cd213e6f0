"""What a checkpoint holds of models and their optimisers, by name, and how it comes back into them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from davae.errors import CheckpointError, SettingsError
from davae.training.sharding import gathered, part_of


def named_parameters(models: Mapping[str, nn.Module], parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters by "model.name".

    Raises:
        SettingsError: a parameter of no model, or none at all, or a model with a name that a checkpoint needs itself.
    """
    if reserved := {"ema", "optimizer"} & set(models):
        raise SettingsError(f"a model cannot be called {reserved.pop()}: a checkpoint has a file of that name")
    names = {id(p): f"{model}.{name}" for model in models for name, p in models[model].named_parameters()}
    parameters = list(parameters)
    strangers = [tuple(p.shape) for p in parameters if id(p) not in names]
    if strangers or not parameters:
        raise SettingsError(f"parameters to train must belong to the models given; these do not (shapes): {strangers}")
    return {names[id(p)]: p for p in parameters}


def live_tensors(model: nn.Module, model_name: str, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its trained parameters and its persistent buffers, not copied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    live = {name: p.detach() for name, p in parameters.items() if f"{model_name}.{name}" in trained}
    return live | {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def saved_tensors(model: nn.Module, model_name: str, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of `live_tensors` on the CPU."""
    return {name: on_cpu(tensor, tensor) for name, tensor in live_tensors(model, model_name, trained).items()}


def on_cpu(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor as a file holds it: a copy if it lies elsewhere; gathered, if it is sharded as `like` is.

    All ranks must call; but as only rank 0 writes files, the others get nothing, an empty tensor.
    """
    whole = gathered(tensor.to_local() if isinstance(tensor, DTensor) else tensor, like).detach()
    return torch.empty(0) if dist.is_initialized() and dist.get_rank() else whole.cpu().contiguous()


def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy `saved`, which was read from `path`, into `live`; of sharded tensors each rank takes its part.

    Raises:
        CheckpointError: they have not the same names, shapes and dtypes.
    """
    for name in sorted(live.keys() ^ saved.keys()):
        holder = "the checkpoint, not the model," if name in saved else "the model, not the checkpoint,"
        raise CheckpointError(f"{path} does not fit: {holder} has a tensor {name}. Give a new folder to start afresh")
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
    """The optimiser's state by "model.name/key".

    Args:
        optimizer: of `parts`.
        trained: the models' parameters by name.
        parts: `own_part` of each: with one process, the same.
    """
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
    """Give an optimiser of `parts`, in that order, the state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor | int]] = {}
    positions = {name: position for position, name in enumerate(trained)}
    for full_name, tensor in saved.items():
        name, key = full_name.rsplit("/", 1)
        own, weight = part_of(tensor, trained[name]), parts[name]
        # The fused optimiser pairs memory, not indices: moments must lie in memory as their weight does.
        alike = torch.empty_like(weight, dtype=own.dtype).copy_(own) if own.shape == weight.shape else own
        whole_number = not own.ndim and own.dtype == torch.int64  # bitsandbytes' step, an int
        state.setdefault(positions[name], {})[key] = int(own) if whole_number else alike
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
