"""Computing what a cache lacks, by all ranks at once."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console

from davae.data.cache import Entry, TensorCache
from davae.errors import CheckpointError
from davae.run import faults
from davae.run.progress import StepProgress
from davae.run.ranks import Ranks

SHARD_BYTES = 128 << 20
"""A shard is written when it is so large, or after `SHARD_SECONDS`: no more is lost when a process is killed."""
SHARD_SECONDS = 60.0


def fill(
    cache: TensorCache,
    keys: Sequence[str],
    encode: Callable[[list[int]], list[Entry]],
    *,
    block: int,
    unit: str,
    ranks: Ranks,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Make the entries that the cache lacks; after it, the cache holds all of `keys`, and none that is damaged.

    What is computed together is always the same: places 0 to `block` - 1 of `keys`, the next `block`, and so on, each
    block by one rank. So bits depend neither on kills and restarts nor on the number of ranks. Of equal keys the
    first place's entry is taken.

    Args:
        cache: to fill.
        keys: one for each place.
        encode: computes the entries of these places, which are one block.
        block: places that are computed together.
        unit: what is encoded, in the plural, for the progress bar.
        ranks: the processes that share the work.
        shard_bytes: size of a shard, about.

    Raises:
        StorageError: the cache cannot be written.
        CheckpointError: entries are gone that had just been written.
    """
    cache.set_damaged_aside(process=ranks.rank, processes=ranks.count)
    ranks.wait("encoding")
    cache.find()
    lacking = lacking_places(cache, keys, block, ranks)
    if lacking:
        total, console = sum(map(len, lacking.values())), Console(stderr=True, quiet=not ranks.first)
        progress = StepProgress(f"encoding {unit}", done=0, total=total, console=console, unit=unit)
        with cache.writing(), progress:
            pending: dict[str, Entry] = {}
            began = time.monotonic()
            for number, places in sorted(lacking.items()):
                start = number * block
                entries = encode(list(range(start, min(start + block, len(keys)))))
                pending |= {keys[place]: entries[place - start] for place in places}
                progress.show(progress.done + len(places))
                size = sum(tensor.nbytes for entry in pending.values() for tensor in entry.values())
                if size >= shard_bytes or time.monotonic() - began > SHARD_SECONDS or progress.done == total:
                    faults.at("cache")
                    cache.write(pending)
                    pending, began = {}, time.monotonic()
    ranks.wait("encoding")
    cache.find()
    if gone := {key for key in keys if key not in cache}:
        raise CheckpointError(
            f"{cache.folder} lacks {len(gone)} entries that were to be there: another process has removed them, or has "
            "failed to make them. Run again"
        )


def lacking_places(cache: TensorCache, keys: Sequence[str], block: int, ranks: Ranks) -> dict[int, list[int]]:
    """The places whose entries this rank has to compute, by the number of their block; of equal keys the first."""
    first: dict[str, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    lacking: dict[int, list[int]] = {}
    for key, place in first.items():
        if key not in cache and place // block % ranks.count == ranks.rank:
            lacking.setdefault(place // block, []).append(place)
    return lacking
