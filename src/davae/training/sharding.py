"""Weights in pieces, one on each rank: torch's FSDP2, and how whole tensors go in and out of it.

The optimiser, the EMA and the norm of gradients see a rank's piece as a plain tensor on FSDP2's memory: all three work
number by number, so that no step of theirs needs another rank.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from davae.run.ranks import Ranks


def shard(models: Mapping[str, nn.Module], ranks: Ranks, whole: Iterable[Tensor] = ()) -> dict[str, nn.Module]:
    """Spread the parameters of models over the ranks, in place, and return twins for `gather_into`.

    FSDP2 gathers one element of a model's outermost lists at a time, such as a transformer's block, and then the rest
    of the model. An autoencoder is called by its methods, not as a module, so its rest is gathered layer by layer. The
    parameters in `whole` stay whole: their gradients are averaged as without FSDP2.
    """
    mesh = DeviceMesh(ranks.device.type, torch.arange(ranks.count))
    kept = {id(parameter) for parameter in whole}
    twins = {}
    for name, model in models.items():
        # A copy of the model without memory for its parameters.
        empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
        twins[name] = copy.deepcopy(model, memo=dict(empty))

        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 does not keep channels_last
        is_autoencoder = isinstance(model, AutoencoderMixin)
        modules = blocks_of(model, layers=is_autoencoder)
        if not is_autoencoder:
            modules.append(model)

        for module in modules:
            parameters = set(module.parameters())
            ignored = {p for p in parameters if id(p) in kept}
            if ignored != parameters:
                reshard = ranks.reshard_after_forward
                fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored)
    return twins


def blocks_of(model: nn.Module, *, layers: bool = False) -> list[nn.Module]:
    """The elements of the model's outermost lists and, if wanted, the `layers` with parameters outside of them."""
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks += [element for element in child if list(element.parameters())]
        elif layers and list(child.parameters(recurse=False)):
            blocks.append(child)
        else:
            blocks += blocks_of(child, layers=layers)
    return blocks


def own_part(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter; or this rank's piece of a sharded one, on the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        return nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)


def own_tensor(tensor: Tensor) -> Tensor:
    """The tensor, such as a gradient; or this rank's piece of a sharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of all ranks' parts if it is sharded as `like` is, otherwise `part`. All ranks must call."""
    if not isinstance(like, DTensor) or part.ndim != like.ndim:
        return part
    placed = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed.full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of `whole` if `like` is sharded, otherwise `whole`."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()


def gather_into(twin: nn.Module, model: nn.Module) -> nn.Module:
    """The twin of `shard` with the model's whole tensors on rank 0's CPU; elsewhere empty. All ranks must call."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state:
        twin.load_state_dict(state, assign=True)
    return twin
