"""What a cached result depends on, as digests: of a model to the last bit, of a tokenizer, of a text encoding."""

import hashlib
import importlib.metadata
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.backbones import backbone_of

ELSEWHERE = ("transformers_version", "torch_dtype", "dtype")
"""Keys of configurations that do not say what is computed; and those that begin with an underscore, such as paths."""


def model_digest(model: nn.Module) -> str:
    """SHA-256 over class, configuration and every bit of the weights and buffers.

    Unlike `adapter.digest_tensors`, it is another after the least change, and in another precision.
    """
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    sha256 = hashlib.sha256(_canonical([type(model).__name__, _computed(config)]))
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        sha256.update(values.reshape(-1).view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    return sha256.hexdigest()


def sha256_of(text: str) -> str:
    """SHA-256 of a text, as hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_digest(pipeline: DiffusionPipeline) -> str:
    """SHA-256 over all that turns a caption into what the transformer is told: encoders, tokenizers, library versions.

    The versions are part of it, because the pipelines' templates and instructions are code.
    """
    parts: list[Any] = [type(pipeline).__name__]
    parts += [importlib.metadata.version(name) for name in ("diffusers", "transformers")]
    for name, component in sorted(pipeline.components.items()):
        if name in ("transformer", "vae", "scheduler") or component is None:
            continue
        parts += [name, model_digest(component) if isinstance(component, nn.Module) else _tokenizer(component)]
    parts += [getattr(pipeline, name) for name in backbone_of(pipeline.transformer).text_settings] or [None]
    return hashlib.sha256(_canonical(parts)).hexdigest()


def _tokenizer(component: Any) -> list[Any]:
    """What a tokenizer, or the one inside a processor, does to a text; image processors do nothing to one."""
    tokenizer = getattr(component, "tokenizer", component)
    if not hasattr(tokenizer, "get_vocab"):
        return [type(component).__name__]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if backend is not None:
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # the last call's
    kinds, limit = [type(component).__name__, type(tokenizer).__name__], tokenizer.model_max_length
    return [kinds, limit, tokenizer.special_tokens_map, getattr(component, "chat_template", None), rules]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _computed(value: Any) -> Any:
    """A configuration without the keys that do not say what is computed, at any depth."""
    if isinstance(value, dict):
        kept = {str(key): item for key, item in value.items()}
        return {key: _computed(item) for key, item in kept.items() if key not in ELSEWHERE and not key.startswith("_")}
    return [_computed(item) for item in value] if isinstance(value, list | tuple) else value
