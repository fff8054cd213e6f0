"""Weights in pieces, one on each rank: torch's FSDP2, and how a checkpoint of whole tensors goes in and out of it.

The optimiser, the EMA and the norm of gradients see what a rank holds as plain tensors, which lie where FSDP2 has them:
all three work number by number, so that no step of theirs needs another rank.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from davae.run.ranks import Ranks


def shard(models: Mapping[str, nn.Module], ranks: Ranks, whole: Iterable[Tensor] = ()) -> dict[str, nn.Module]:
    """Spread the parameters of models over the ranks, in place; all ranks have the same before.

    What is gathered at a time is an element of a model's outermost lists, a transformer's block, and then the rest of
    the model. Of an autoencoder, which is not called as a module but by its methods, the rest is gathered layer by
    layer. The parameters in `whole` stay whole: their gradients are averaged as without FSDP2.

    Returns:
        Twins of the models as they were, whose parameters are on the meta device, for `gathered_into`.
    """
    mesh, kept = DeviceMesh(ranks.device.type, torch.arange(ranks.count)), {id(p) for p in whole}
    twins = {}
    for name, model in models.items():
        empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
        twins[name] = copy.deepcopy(model, memo=dict(empty))
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 knows no channels_last
        rest = [] if isinstance(model, AutoencoderMixin) else [model]
        for module in [*blocks_of(model, layers=not rest), *rest]:
            ignored = {p for p in module.parameters() if id(p) in kept}
            if len(ignored) < len(list(module.parameters())):
                fully_shard(
                    module, mesh=mesh, reshard_after_forward=ranks.reshard_after_forward, ignored_params=ignored
                )
    return twins


def now_trained(models: Mapping[str, nn.Module], trained: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of these names, "model.name", in their order: `shard` has put others in their places."""
    now = {f"{name}.{part}": p for name, model in models.items() for part, p in model.named_parameters()}
    return {name: now[name] for name in trained}


def blocks_of(model: nn.Module, *, layers: bool = False) -> list[nn.Module]:
    """The elements of the model's outermost lists and, if wanted, the `layers` with parameters outside of them."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [element for element in child if any(True for _ in element.parameters())]
        elif layers and any(True for _ in child.parameters(recurse=False)):
            found.append(child)
        else:
            found += blocks_of(child, layers=layers)
    return found


def own_part(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself; or what this rank holds of a sharded one, on the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        return nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)


def own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of `own_part`."""
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what all ranks hold in parts as they do of `like`; `part` itself if that is whole. All must call."""
    if not isinstance(like, DTensor) or part.ndim != like.ndim:
        return part
    placed = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed.full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `whole` if it is spread as `like` is."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


def gathered_into(twin: nn.Module, model: nn.Module) -> nn.Module:
    """The twin that `shard` returned, with the model's parameters and buffers whole, on the CPU. All ranks must call.

    Ranks other than 0 drop what they gather: their twin stays on the meta device.
    """
    first = dist.get_rank() == 0
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        if first:
            new = nn.Parameter(whole.cpu().clone(), requires_grad=parameter.requires_grad)
            setattr(twin.get_submodule(owner), leaf, new)
    for name, buffer in model.named_buffers():
        twin.get_buffer(name).data = buffer.cpu().clone()
    return twin
