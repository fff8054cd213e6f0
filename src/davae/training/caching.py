"""Fills a cache with the entries that it lacks, on all ranks at once."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from davae.data.cache import Entry, TensorCache
from davae.errors import CheckpointError
from davae.run import faults
from davae.run.progress import StepProgress
from davae.run.ranks import Ranks

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
    ranks: Ranks,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Compute the entries of all `keys` that are missing or damaged.

    `encode_block` always computes whole blocks: places 0 to `block` - 1 of `keys`, the next `block`, and so on. So the
    bits of an entry depend neither on kills and restarts nor on the number of ranks. Equal keys have the first place's
    entry. `unit` is a plural noun for the progress bar.
    """
    # Damaged shards are renamed by all ranks before any rank looks for entries.
    cache.set_damaged_aside(process=ranks.rank, processes=ranks.count)
    ranks.wait("encoding")
    cache.find()
    missing = find_missing(cache, keys, block, ranks)
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


def find_missing(cache: TensorCache, keys: Sequence[str], block: int, ranks: Ranks) -> dict[int, list[int]]:
    """The places whose entries this rank has to compute, by the number of their block."""
    # Equal keys share the entry of the first place.
    first: dict[str, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)

    # Block by block in turn, the ranks share the work.
    missing: dict[int, list[int]] = {}
    for key, place in first.items():
        if key not in cache and place // block % ranks.count == ranks.rank:
            missing.setdefault(place // block, []).append(place)
    return missing
