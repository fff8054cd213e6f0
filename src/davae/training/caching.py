"""Caches of what is encoded once: fills in the entries that one lacks, and digests all that texts depend on."""

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from rich.console import Console
from torch import nn

from davae.backbones import backbone_of
from davae.data.cache import Entry, TensorCache
from davae.errors import CheckpointError
from davae.run import faults
from davae.run.progress import StepProgress
from davae.run.ranks import Ranks
from davae.training.digests import describe_tokenizer, digest_model, encode_facts

SHARD_BYTES = 128 << 20
"""A shard is written at this size or after `SHARD_SECONDS`; a killed process loses no more than that."""
SHARD_SECONDS = 60.0


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
        parts += [name, digest_model(component) if is_model else describe_tokenizer(component)]
    # Attributes such as an instruction before each caption.
    parts += [getattr(pipeline, name) for name in backbone_of(pipeline.transformer).text_settings] or [None]
    return hashlib.sha256(encode_facts(parts)).hexdigest()
