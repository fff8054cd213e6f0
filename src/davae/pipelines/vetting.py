"""What stands in front of every `from_pretrained`: which classes a folder may ask for, and which files it may read.

No version of diffusers or transformers decides this: older ones run a module that lies beside the weights, and both
read weights from elsewhere if a file of the folder says so.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from davae.errors import CheckpointError
from davae.pipelines.sizes import check_sizes, walk
from davae.run.storage import read_json

# The libraries that a part may come from, and of what kinds it may be there.
PARTS: dict[str, tuple[type, ...]] = {
    "diffusers": (ModelMixin, SchedulerMixin),
    "transformers": (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        ImageProcessingMixin,
        FeatureExtractionMixin,
    ),
    "davae": (ModelMixin,),
}
PORTABLE_CODE = "davae_autoencoder.py"  # lies beside the weights of a portable autoencoder; never run here
LARGEST_CONFIG = 1 << 20  # bytes; a tokenizer's own files may be larger
# Keys of configs that may name a kernel, which transformers would fetch from the Hub and run.
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def find_part_class(library: object, name: object, whose: str) -> type[Any]:
    """The class of a part of a pipeline; refuses one that is not on the list."""
    if library in PARTS and isinstance(name, str) and name.isidentifier():
        found = getattr(importlib.import_module(str(library)), name, None)
        if isinstance(found, type) and issubclass(found, PARTS[str(library)]):
            return found
    raise CheckpointError(
        f"{whose} would be loaded as {library!r}, {name!r}: allowed are the models and schedulers of diffusers, the "
        "models, tokenizers and processors of transformers, and davae's own models; no code beside weights is run"
    )


def find_classes(folder: Path, index: Mapping[str, Any]) -> tuple[type[DiffusionPipeline], dict[str, type[Any]]]:
    """The classes of a pipeline's `model_index.json` and of its parts; refuses one that is not on the list."""
    from davae.pipelines.class_conditional import ClassConditionalFlowPipeline  # diffusers does not know it

    name: Any = index.get("_class_name")
    found: Any = None
    if name == ClassConditionalFlowPipeline.__name__:
        found = ClassConditionalFlowPipeline
    elif isinstance(name, str):
        found = getattr(diffusers, name, None)
    is_pipeline = isinstance(found, type) and issubclass(found, DiffusionPipeline)
    if not is_pipeline or getattr(found, "_load_connected_pipes", False):  # those fetch others that a card names
        raise CheckpointError(f"{folder} cannot be loaded as a pipeline: {name!r} is no pipeline of diffusers or davae")

    # Everything that the class takes and that has no default, or is optional, is a part.
    optional = getattr(found, "_optional_components", ())
    settings = set()
    for key, parameter in inspect.signature(found).parameters.items():
        if parameter.default is not inspect.Parameter.empty and key not in optional:
            settings.add(key)
    parts: dict[str, type[Any]] = {}
    for key, entry in index.items():
        if key.startswith("_") or key in settings or entry == [None, None]:
            continue
        if isinstance(entry, list) and len(entry) == 2 and key.isidentifier():
            parts[key] = find_part_class(entry[0], entry[1], f"the {key} of {folder}")
        elif isinstance(entry, list | dict | str):
            raise CheckpointError(
                f"{folder}: {key} in model_index.json is {entry!r}; allowed are a library and a class"
            )
    return found, parts


def check_files(folder: Path, part_class: type[Any]) -> None:
    """Refuse a part's folder with code in it, weights from elsewhere or pickled, or a config that does not fit them."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: copy the pipeline anew")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.name != PORTABLE_CODE:
            raise CheckpointError(f"{path} is code beside weights, which is never run: remove it")
        if path.name == "adapter_config.json":
            raise CheckpointError(
                f"{path} would read weights from elsewhere: merge the adapter into the model, and save"
            )
        if path.suffix in (".json", ".safetensors") and not path.is_file():
            raise CheckpointError(f"{path} is no regular file")
        if path.name.endswith(".safetensors.index.json"):
            _check_shards(path)

    config = folder / "config.json"
    if config.is_file():
        if config.stat().st_size > LARGEST_CONFIG:
            raise CheckpointError(f"{config} has {config.stat().st_size:,} bytes; allowed are {LARGEST_CONFIG:,}")
        for key, value in walk(read_json(config)):
            if key in KERNEL_KEYS and "/" in json.dumps(value):
                raise CheckpointError(f"{config} names code to fetch, {key} = {value!r}: remove that line")
    check_sizes(folder, part_class)


def _check_shards(path: Path) -> None:
    """Refuse an index of shards that names anything but .safetensors files beside it."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise CheckpointError(f"{path} has no weight_map: copy the folder anew")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shard!r}; allowed are .safetensors files beside it")
