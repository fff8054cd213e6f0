"""Sizes in a config are checked against the weights' headers before anything is allocated; loaded weights, for NaN.

The model is made on the meta device, where tensors have no storage, and stopped as soon as it grows beyond its weights.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from davae.errors import CheckpointError
from davae.pipelines.places import loading
from davae.run.storage import read_json

# A model without weights, such as a tokenizer, has no header: numbers in its config are bounded themselves.
LARGEST_NUMBER, LARGEST_SIZE = 10**6, 1 << 24
UNBOUNDED = ("max_length", "model_max_length")  # tokenizers have 10^30 there, for "no limit"
# Numbers and operations of a model being made: so many for each in its weights, and some for buffers.
NUMBERS, SPARE_NUMBERS, OPERATIONS, SPARE_OPERATIONS = 16, 1 << 26, 64, 5_000


class _Budget(TorchDispatchMode):
    """Counts what a model allocates while it is made, and raises before it is too much."""

    def __init__(self, tensors: int, numbers: int) -> None:
        super().__init__()
        self.numbers = NUMBERS * numbers + SPARE_NUMBERS
        self.operations = OPERATIONS * tensors + SPARE_OPERATIONS

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else 0
        if isinstance(first, list | tuple) and all(isinstance(size, int) for size in first):
            self.numbers -= math.prod(first)
        self.operations -= 1
        if self.numbers < 0 or self.operations < 0:
            raise ValueError("the config describes a model that is far larger than its weights")
        return function(*args, **(kwargs or {}))


def check_sizes(folder: Path, model_class: type[Any]) -> None:
    """Refuse a part of a pipeline whose config does not fit the headers of its weights, before these are read."""
    shapes = _read_shapes(folder)
    largest = max((math.prod(shape) for shape in shapes.values()), default=0)
    is_model = issubclass(model_class, ModelMixin | PreTrainedModel)
    bound = max(LARGEST_SIZE, largest) if is_model else LARGEST_NUMBER
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _check_numbers(folder / name, bound)
    if not is_model or not shapes or "quantization_config" in read_json(folder / "config.json"):
        return

    budget = _Budget(len(shapes), sum(math.prod(shape) for shape in shapes.values()))
    with loading(folder, f"an {model_class.__name__}"), torch.device("meta"), budget:
        if issubclass(model_class, ModelMixin):
            model = model_class.from_config(model_class.load_config(folder))
        else:
            model = model_class(model_class.config_class.from_pretrained(folder))
    for name, tensor in model.state_dict().items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder} cannot be loaded as an {model_class.__name__}: its config gives {name} the shape "
                f"{list(tensor.shape)}, its weights have {list(shapes[name])}: copy the folder anew"
            )


def check_finite(module: nn.Module, name: str) -> None:
    """Refuse weights that are not finite: they would make black images without a word."""
    for key, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(
                f"the {name} has numbers that are not finite in {key}: copy it anew, or train it again"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; one pass and no copy, because models are large."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    tensor = tensor if tensor.element_size() > 1 else tensor.float()  # of eight bits
    smallest, largest = torch.aminmax(tensor)
    return bool(smallest.isfinite() and largest.isfinite())


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in a folder, by name, from the headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with loading(path, "weights"), safe_open(path, framework="pt") as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _check_numbers(path: Path, bound: int) -> None:
    for key, value in walk(read_json(path)):
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int) and abs(number) > bound and key not in UNBOUNDED:
                raise CheckpointError(f"{path}: {key} is {number}; with these weights allowed are {bound:,} at most")


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values in a nest of dicts and lists."""
    if isinstance(value, dict):
        yield from value.items()
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from walk(item)
