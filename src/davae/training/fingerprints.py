"""Digests of what a cached result depends on: a model to the last bit, tokenizers, a text encoding."""

import hashlib
import importlib.metadata
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.backbones import backbone_of

IRRELEVANT_KEYS = ("transformers_version", "torch_dtype", "dtype")
"""Keys of configurations that do not change the result, as those that begin with an underscore, such as paths."""


def digest_model(model: nn.Module) -> str:
    """SHA-256 over class, configuration and every bit of the weights and buffers.

    Unlike `adapter.digest_tensors`, it changes with the precision and with the smallest change of a weight.
    """
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    sha256 = hashlib.sha256(_encode([type(model).__name__, _select_relevant(config)]))
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        sha256.update(values.reshape(-1).view(torch.uint8).numpy().data)  # bytes, because numpy has no bfloat16
    return sha256.hexdigest()


def digest_text(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_text_encoding(pipeline: DiffusionPipeline) -> str:
    """SHA-256 over all that turns a caption into conditions: text encoders, tokenizers, versions of the libraries.

    The versions count because the pipelines' templates and instructions are code.
    """
    # All parts but those that see no text.
    parts: list[Any] = [type(pipeline).__name__]
    parts += map(importlib.metadata.version, ("diffusers", "transformers"))
    for name, component in sorted(pipeline.components.items()):
        if name in ("transformer", "vae", "scheduler") or component is None:
            continue
        is_model = isinstance(component, nn.Module)
        parts += [name, digest_model(component) if is_model else _describe_tokenizer(component)]
    # Attributes such as an instruction before each caption.
    parts += [getattr(pipeline, name) for name in backbone_of(pipeline.transformer).text_settings] or [None]
    return hashlib.sha256(_encode(parts)).hexdigest()


def _describe_tokenizer(component: Any) -> list[Any]:
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


def _encode(value: Any) -> bytes:
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
