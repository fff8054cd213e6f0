"""The processes of one run, as torchrun or `accelerate launch` starts them: who does what, and what they tell others.

A rank is the number of a process, `count` is how many there are. A batch in a recipe is that of all ranks together:
rank r takes the r-th of `count` equal parts of it. Random numbers are keyed by a sample's number in the run, so that
any number of ranks draws the same. With one process, everything here is what it would be without it.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from davae import errors
from davae.errors import DavaeError, RankError, SettingsError

Whole = TypeVar("Whole", Tensor, list[int])
Result = TypeVar("Result")

TIMEOUT = 1800.0
"""Seconds that a rank waits for another before it gives up: also the longest that rank 0 may work alone."""
ROLL_CALL = 3.0
"""Seconds that a rank whose exchange failed waits for others to say that they are there, too."""
BUCKET = 1 << 26
"""Gradients that are exchanged at a time."""

_stores: dict[int, dist.Store] = {}
"""Where ranks leave a word for others when nothing else works any more; by process, for a fork inherits it."""


class Ranks:
    """This process among those of its run.

    torchrun and `accelerate launch` say in the environment how many there are; accelerate's settings for FSDP (version
    2) say whether weights are sharded over them. Made again in a process, it is the same ranks.

    Args:
        timeout: seconds that an exchange may take; only the first `Ranks` of a process sets it.

    Raises:
        SettingsError: DeepSpeed or FSDP's first version is asked for.
        RankError: the others did not come.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise SettingsError(
                "DeepSpeed's engine is not what davae trains with: launch with recipes/launch/zero2.yaml, which shards "
                "the same (gradients and the optimiser's state) by FSDP2, or with fsdp2.yaml, which shards all"
            )
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        gpu, limit = torch.cuda.is_available(), timedelta(seconds=timeout)
        if several and not dist.is_initialized():
            self._come_together(gpu, limit)
        state = PartialState(cpu=several and not gpu)
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device
        self.sharded = self.count > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
        self.reshard_after_forward = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True)
        version, offload = os.environ.get("FSDP_VERSION", "1"), parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
        if self.sharded and (version != "2" or offload):
            raise SettingsError(
                f"FSDP of version {version}{' with offload' if offload else ''}: allowed is version 2 without offload, "
                "as in recipes/launch/fsdp2.yaml"
            )

    def _come_together(self, gpu: bool, limit: timedelta) -> None:
        """Make the process group.

        Raises:
            RankError: not all came in time.
        """
        try:
            store, self.rank, self.count = next(iter(dist.rendezvous("env://", timeout=limit)))
            store = meeting(store, self.rank, self.count, limit.total_seconds())
        except RuntimeError as error:  # torch's own for the network are of this type
            raise RankError(f"the processes of this run found no place to meet in {limit}: {error}") from error
        _stores[os.getpid()] = store
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        try:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=limit)
            dist.all_reduce(torch.zeros(1))  # whoever goes on has seen all others
        except RuntimeError as error:
            raise self._failed("coming together", error) from error

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes the record, metrics, pictures, checkpoints and results."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------ who does what

    def check_divides(self, name: str, number: int) -> None:
        """Refuse a setting that the ranks cannot share equally.

        Raises:
            SettingsError: with the setting's `name`.
        """
        if number % self.count:
            below = number // self.count * self.count
            near = " or ".join(str(n) for n in (below, below + self.count) if n)
            raise SettingsError(
                f"{name}={number} is of all {self.count} processes together, and they cannot share it equally: "
                f"allowed are multiples of {self.count}, such as {near}"
            )

    def share(self, whole: Whole) -> Whole:
        """This rank's part of what belongs to a whole batch, along its first axis."""
        assert len(whole) % self.count == 0, "check_divides comes first"
        length = len(whole) // self.count
        return whole[self.rank * length : (self.rank + 1) * length]

    def sample_numbers(self, batch: int, length: int) -> range:
        """The numbers in the run, counted over all batches, of this rank's `length` samples of batch number `batch`.

        They are the same for any number of ranks, and however a step's samples are cut into batches.
        """
        first = (batch * self.count + self.rank) * length
        return range(first, first + length)

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 do `work` while the others wait; all return its result, which must be what JSON can say.

        Raises:
            DavaeError: what `work` raised, on every rank.
            RankError: rank 0 stopped, died, took longer than the timeout, or had another error.
        """
        if self.count == 1:
            return work()
        if not self.first:
            told = json.loads(self._hear())
            if "error" not in told:
                return told["value"]
            raise getattr(errors, told["error"], RankError)(f"on rank 0: {told['message']}")
        try:
            value = work()
        except Exception as error:
            self._tell({"error": type(error).__name__, "message": str(error)})
            raise
        self._tell({"value": value})
        return value

    def first_does(self, work: Callable[[], object]) -> None:
        """`on_first`, whose result is nobody's business."""
        self.on_first(lambda: (work(), None)[1])

    def first_then_all(self, work: Callable[[], Result]) -> Result:
        """Let rank 0 do `work`, which leaves files; the others then do the same, and find them there."""
        done: list[Result] = []
        self.first_does(lambda: done.append(work()))
        return done[0] if done else work()

    # ------------------------------------------------------------------------------------------ what they tell others

    def mean(self, values: Iterable[float]) -> list[float]:
        """The means of numbers over the ranks, in float64; one that is not finite anywhere makes a mean that is not."""
        numbers = torch.tensor(list(values), dtype=torch.float64)
        if self.count > 1:
            with self.together("the mean of losses"):
                dist.all_reduce(numbers)
            numbers /= self.count
        return numbers.tolist()

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number])
        with self.together("the end of a step"):
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers.item())

    def wait(self, what: str) -> None:
        """Wait until all ranks are done with `what`."""
        if self.count > 1:
            with self.together(what):
                dist.all_reduce(torch.zeros(1))

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype, such as gradients, by their means over the ranks; in few exchanges."""
        tensors = list(tensors)
        if self.count == 1:
            return
        while tensors:
            bucket, size = [tensors.pop(0)], 0
            while tensors and (size := size + bucket[-1].numel()) + tensors[0].numel() <= BUCKET:
                bucket.append(tensors.pop(0))
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self.together("the mean of gradients"):
                dist.all_reduce(flat)
            flat /= self.count
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks."""
        if self.count > 1:
            with self.together("a sum"):
                dist.all_reduce(tensor)
        return tensor

    def gather(self, part: Tensor) -> Tensor:
        """All ranks' tensors of one shape, joined along the first axis in the order of ranks; no gradient."""
        part = part.detach().contiguous()
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        with self.together("gathering"):
            dist.all_gather(parts, part)
        return torch.cat(parts)

    def over(self, chunks: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`compute` of all chunks [n] of indices, each a tensor [..., n], in their order; the ranks share the work.

        All ranks compute equally often, as sharded models need: who has no chunk left does the last one again.
        """
        if self.count == 1:
            return [compute(chunk) for chunk in chunks]
        results: list[Tensor] = []
        for first in range(0, len(chunks), self.count):
            mine = compute(chunks[min(first + self.rank, len(chunks) - 1)])
            padded = torch.nn.functional.pad(mine, (0, len(chunks[0]) - mine.shape[-1]))
            found = zip(self.gather(padded.unsqueeze(0)), chunks[first : first + self.count], strict=False)
            results += [result[..., : len(chunk)] for result, chunk in found]
        return results

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Turn torch's error about an exchange that failed into one that names the rank that is missing.

        Raises:
            RankError: of `what`, with the rank.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or isinstance(error, DavaeError) or not _of_exchange(error):
                raise
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: RuntimeError) -> RankError:
        silent = self._silent()
        names = f"rank {', '.join(map(str, silent))} does not answer" if silent else "but all ranks still answer"
        return RankError(
            f"rank {self.rank} of {self.count}: {what} failed, {names}. It may have died, be stopped, or be slower "
            "than the timeout: look at its own messages. Run the same command again to go on from the last "
            f"checkpoint ({str(error).splitlines()[0]})"
        )

    def _silent(self) -> list[int]:
        """The ranks that do not say within `ROLL_CALL` seconds that their exchange failed, too."""
        store, silent = _stores.get(os.getpid()), [rank for rank in range(self.count) if rank != self.rank]
        assert store is not None, "make Ranks() before anything else makes a process group"

        def call() -> None:
            deadline = time.monotonic() + ROLL_CALL
            with suppress(RuntimeError):  # the store's host is gone, and nobody can answer
                store.set(f"davae here {self.rank}", "")
                while silent and time.monotonic() < deadline:
                    silent[:] = [rank for rank in silent if not store.check([f"davae here {rank}"])]
                    time.sleep(0.1)

        # In a thread, for a host that is stopped keeps one waiting for ever: rank 0, unless torchrun has the store.
        caller = Thread(target=call, daemon=True)
        caller.start()
        caller.join(2 * ROLL_CALL)
        return [0] if caller.is_alive() else silent

    def _tell(self, message: dict[str, Any]) -> None:
        content = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        with self.together("hearing from rank 0"):
            dist.broadcast(torch.tensor([len(content)]), 0)
            dist.broadcast(content, 0)

    def _hear(self) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        with self.together("hearing from rank 0"):
            dist.broadcast(length, 0)
            content = torch.empty(int(length.item()), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return bytes(content.tolist())


def meeting(store: dist.Store, rank: int, count: int, timeout: float) -> dist.Store:
    """A part of the store for the processes of one start, all of which are there when it is returned.

    torchrun may keep its store over restarts, and with it the addresses of the dead; how often it has started cannot
    tell starts apart, since each of its agents counts for itself. So rank 0 makes up a name, the others sign below it,
    and rank 0 confirms the signatures: who has found the name of an earlier start is not among them.

    Raises:
        RankError: not all came in `timeout` seconds; with those that did not.
    """
    deadline, me, pause = time.monotonic() + timeout, uuid.uuid4().hex, 0.01
    if rank == 0:
        store.set("davae start", me)
    while True:
        start = _read(store, "davae start")
        names = [f"davae start {start} {other}" for other in range(1, count)]
        if rank:
            store.set(names[rank - 1], me)
        elif store.check(names):
            store.set(f"davae start {start} all", " ".join([me, *(_read(store, name) for name in names)]))
        if me in _read(store, f"davae start {start} all").split():
            return dist.PrefixStore(f"davae start {start}", store)
        if time.monotonic() > deadline:
            absent = [other for other, name in enumerate(names, 1) if start and not store.check([name])] or [0]
            raise RankError(
                f"rank {rank} of {count}: rank {', '.join(map(str, absent))} did not come in {timeout:g} s: look at "
                "its own messages, and run the same command again"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _read(store: dist.Store, key: str) -> str:
    """What the store has of this key; "" without waiting for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _of_exchange(error: RuntimeError) -> bool:
    """Whether torch raised this about an exchange; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
