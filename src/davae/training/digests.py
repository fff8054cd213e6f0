"""Digests of what a run or a cache is made from: models, other parts of a pipeline, folders of weights."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from davae.pipelines.adapter_index import VAE_FOLDER
from davae.run.storage import read_json

IRRELEVANT_KEYS = ("transformers_version", "torch_dtype", "dtype")
"""Keys of configurations that do not change the result, as those that begin with an underscore, such as paths."""


def digest_model(model: nn.Module) -> str:
    """SHA-256 over class, configuration and every bit of the weights and buffers, so that it tells precisions apart."""
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return _digest_weights(model, [type(model).__name__, _select_relevant(config)])


def _digest_weights(model: nn.Module, facts: Any) -> str:
    sha256 = hashlib.sha256(encode_facts(facts))
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        sha256.update(values.reshape(-1).view(torch.uint8).numpy().data)  # bytes, because numpy has no bfloat16
    return sha256.hexdigest()


def digest_part(part: Any) -> str:
    """SHA-256 over all that decides what a part of a pipeline computes, whatever versions of the libraries load it.

    These are every bit of the weights, a tokenizer's rules, and settings that are not the defaults of their class.
    """
    settings, config = {}, getattr(part, "config", None)
    if isinstance(config, Mapping):
        parameters = inspect.signature(type(part).__init__).parameters
        for name in sorted(config.keys() & parameters.keys()):
            if encode_facts(config[name]) != encode_facts(parameters[name].default):  # as JSON, where a tuple is a list
                settings[name] = config[name]
    facts = [type(part).__name__, _select_relevant(settings)]
    if isinstance(part, nn.Module):
        return _digest_weights(part, facts)
    return hashlib.sha256(encode_facts([*facts, *describe_tokenizer(part)])).hexdigest()


def digest_folder(folder: Path) -> str:
    """SHA-256 over the weights and settings in the folder of a model or of an adapter."""
    parts: list[Any] = []
    for path in sorted([*folder.glob("*"), *(folder / VAE_FOLDER).glob("*")]):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            parts.append([name, _select_relevant(read_json(path))])
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                parts.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hashlib.sha256(encode_facts(parts)).hexdigest()


def describe_tokenizer(component: Any) -> list[Any]:
    """All that decides a tokenizer's output, or that of a processor's tokenizer; image processors see no text."""
    tokenizer = getattr(component, "tokenizer", component)
    if not hasattr(tokenizer, "get_vocab"):
        return [type(component).__name__]

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # these two are settings of the last call
        rules.pop("padding", None)

    kinds, limit = [type(component).__name__, type(tokenizer).__name__], tokenizer.model_max_length
    return [kinds, limit, tokenizer.special_tokens_map, getattr(component, "chat_template", None), rules]


def encode_facts(value: Any) -> bytes:
    """The same bytes for equal facts, in whatever order their keys are."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def _select_relevant(value: Any) -> Any:
    """A configuration without the keys that do not change the result, at any depth."""
    if isinstance(value, list | tuple):
        return list(map(_select_relevant, value))
    if not isinstance(value, dict):
        return value
    relevant = {}
    for key, item in value.items():
        if str(key) not in IRRELEVANT_KEYS and not str(key).startswith("_"):
            relevant[str(key)] = _select_relevant(item)
    return relevant
