"""Caches of what is encoded once: fills in the entries that one lacks, and digests all that an entry depends on."""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from torch import nn

from davae.backbones import backbone_of
from davae.data.cache import Entry, TensorCache
from davae.errors import CheckpointError
from davae.run import faults
from davae.run.progress import StepProgress
from davae.run.ranks import Ranks

SHARD_BYTES = 128 << 20
"""A shard is written at this size or after `SHARD_SECONDS`; a killed process loses no more than that."""
SHARD_SECONDS = 60.0
IRRELEVANT_KEYS = ("transformers_version", "torch_dtype", "dtype")
"""Keys of configurations that do not change the result, as those that begin with an underscore, such as paths."""


def fill_cache(
    cache: TensorCache,
    keys: Sequence[str],
    encode_block: Callable[[list[int]], list[Entry]],
    *,
    block: int,
    unit: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Compute the entries of all `keys` that are missing or damaged, on all ranks at once.

    `encode_block` always computes whole blocks: places 0 to `block` - 1 of `keys`, the next `block`, and so on. So the
    bits of an entry depend neither on kills and restarts nor on the number of ranks. Equal keys have the first place's
    entry. `unit` is a plural noun for the progress bar.
    """
    ranks = Ranks()

    # Damaged shards are renamed by all ranks before any rank looks for entries.
    cache.set_damaged_aside(process=ranks.rank, processes=ranks.count)
    ranks.wait("encoding")
    cache.find()
    missing = _find_missing(cache, keys, block, ranks)
    total, console = sum(map(len, missing.values())), Console(stderr=True, quiet=not ranks.first)

    if missing:
        pending: dict[str, Entry] = {}
        pending_bytes, began = 0, time.monotonic()
        with cache.writing(), StepProgress(f"encoding {unit}", done=0, total=total, console=console, unit=unit) as bar:
            for number, places in sorted(missing.items()):
                start = number * block
                entries = encode_block(list(range(start, min(start + block, len(keys)))))
                for place in places:
                    pending[keys[place]] = entry = entries[place - start]
                    pending_bytes += sum(tensor.nbytes for tensor in entry.values())
                bar.show(bar.done + len(places))

                is_late = time.monotonic() - began > SHARD_SECONDS
                if pending_bytes >= shard_bytes or is_late or bar.done == total:
                    faults.at("cache")
                    cache.write(pending)
                    pending, pending_bytes, began = {}, 0, time.monotonic()

    # The ranks' shards together must hold all entries now.
    ranks.wait("encoding")
    cache.find()
    if gone := {key for key in keys if key not in cache}:
        raise CheckpointError(
            f"{cache.folder} lacks {len(gone)} entries that should be there: another process removed them or failed to "
            "make them. Run again"
        )


def _find_missing(cache: TensorCache, keys: Sequence[str], block: int, ranks: Ranks) -> dict[int, list[int]]:
    """The places whose entries this rank has to compute, by the number of their block."""
    missing: dict[int, list[int]] = {}
    seen: set[str] = set()
    for place, key in enumerate(keys):
        # Equal keys share the entry of the first place; the ranks share the work, block by block in turn.
        if key not in seen and key not in cache and place // block % ranks.count == ranks.rank:
            missing.setdefault(place // block, []).append(place)
        seen.add(key)
    return missing


def digest_model(model: nn.Module) -> str:
    """SHA-256 over class, configuration and every bit of the weights and buffers, so that it tells precisions apart."""
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    sha256 = hashlib.sha256(_encode([type(model).__name__, _select_relevant(config)]))
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        sha256.update(values.reshape(-1).view(torch.uint8).numpy().data)  # bytes, because numpy has no bfloat16
    return sha256.hexdigest()


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
