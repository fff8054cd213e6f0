"""Where a pipeline's weights are while it makes images, and in which precision."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.errors import SettingsError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("model", "sequential", "group")


def choose_dtype(name: str | None, device: torch.device | str) -> torch.dtype:
    """The precision of that name; by default float32 on a CPU and bfloat16 elsewhere."""
    if name is None:
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise SettingsError(f"dtype={name}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name]


def place(pipeline: DiffusionPipeline, device: torch.device | str, offload: str | None = None) -> DiffusionPipeline:
    """Put a pipeline on a device, or let its weights wait in the computer's memory until they are needed there.

    Args:
        pipeline: on the CPU, with its LoRAs.
        device: where it runs.
        offload: None for all weights on the device at all times; "model" for one model at a time, which costs little
            time; "group" for a few layers at a time, prefetched; "sequential" for one layer at a time, which is slow
            and takes least memory.
    """
    place = torch.device(device)
    if offload is None:
        return pipeline.to(place)
    if offload not in OFFLOADS:
        raise SettingsError(f"offload={offload}: allowed are {', '.join(OFFLOADS)}")
    if place.type == "cpu":
        raise SettingsError("offload is for a GPU, and this runs on a CPU: leave it out")

    if offload == "model":
        pipeline.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=place)
    else:
        settings: dict[str, Any] = {"offload_type": "leaf_level", "use_stream": place.type == "cuda"}
        pipeline.enable_group_offload(onload_device=place, offload_device=torch.device("cpu"), **settings)
    return pipeline


def read_weights(module: nn.Module) -> Mapping[str, Tensor]:
    """A module's tensors, also those that sequential offloading keeps outside of it."""
    tensors = module.state_dict()
    if any(tensor.is_meta for tensor in tensors.values()):
        return get_state_dict_offloaded_model(module)
    return tensors
