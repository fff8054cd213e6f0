"""The processes (ranks) of one run, as torchrun or `accelerate launch` starts them: their tasks and their exchanges.

The batch size of a recipe is the global one: rank r takes the r-th of `count` equal parts of each batch. Random numbers
depend on a sample's number in the run, so that any number of ranks draws the same.
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

# Seconds that a rank waits for another before it gives up. Rank 0 may work alone for no longer, either.
TIMEOUT = 1800.0
# Seconds that a rank whose exchange failed waits for the others to sign the roll.
ROLL_CALL = 3.0
# Most numbers of gradients in one exchange.
BUCKET = 1 << 26

# Fallback key-value stores for the roll call after a failure, keyed by PID because forks inherit this dict.
_stores: dict[int, dist.Store] = {}


class Ranks:
    """This process among the processes of its run, which it waits for (see `join_ranks`).

    The launcher's environment says how many there are, and whether FSDP2 shards the weights. With one process nothing
    here waits or exchanges.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        join_ranks(timeout)
        state = PartialState(cpu=dist.is_initialized() and not torch.cuda.is_available())
        self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

        self.sharded = self.count > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
        self.reshard_after_forward = parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes the record, metrics, pictures, checkpoints and results."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------ tasks

    def check_divides(self, name: str, number: int) -> None:
        """Refuse the setting `name` if the ranks cannot share its `number` equally."""
        if number % self.count:
            below = number // self.count * self.count
            near = f"{below} or {below + self.count}" if below else f"{self.count}"
            allowed = f"allowed are multiples of {self.count}, such as {near}"
            raise SettingsError(f"{name}={number} cannot be shared equally by {self.count} processes: {allowed}")

    def share(self, whole: Whole) -> Whole:
        """This rank's part of a whole batch, along its first axis."""
        assert len(whole) % self.count == 0, "check_divides comes first"
        length = len(whole) // self.count
        return whole[self.rank * length : (self.rank + 1) * length]

    def sample_numbers(self, batch: int, length: int) -> range:
        """The numbers in the run of this rank's `length` samples of a batch, whatever the ranks or the accumulation."""
        first = (batch * self.count + self.rank) * length
        return range(first, first + length)

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Let rank 0 do `work` while the others wait; every rank returns the result, which must be JSON's.

        A DavaeError of `work` is raised on every rank; any other error is a RankError on the others.
        """
        if self.count == 1:
            return work()

        # Rank 0 tells its result or its error to all.
        answer = ""
        if self.first:
            try:
                answer = json.dumps({"value": work()})
            except Exception as error:
                self._broadcast(json.dumps({"error": _public_class(error).__name__, "message": str(error)}))
                raise
        outcome = json.loads(self._broadcast(answer))
        if "error" in outcome:
            raise getattr(errors, outcome["error"])(f"on rank 0: {outcome['message']}")
        return outcome["value"]

    def first_then_all(self, work: Callable[[], Result]) -> Result:
        """Let rank 0 do `work`, which leaves files; then the others do it, too, and find the files."""
        results: list[Result] = []
        self.on_first(lambda: results.append(work()))
        return results[0] if results else work()

    def map_chunks(self, chunks: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`compute` of all chunks [n] of indices, each a tensor [..., n], in order; the ranks share the work.

        All ranks compute equally often, as sharded models need: a rank that has no chunk left does the last one again.
        """
        results: list[Tensor] = []
        for first in range(0, len(chunks), self.count):
            mine = compute(chunks[min(first + self.rank, len(chunks) - 1)])

            # The last chunk may be shorter: padded for the exchange, cut again after it.
            padded = torch.nn.functional.pad(mine, (0, len(chunks[0]) - mine.shape[-1]))
            gathered = self.gather(padded.unsqueeze(0))
            for result, chunk in zip(gathered, chunks[first : first + self.count], strict=False):
                results.append(result[..., : len(chunk)])
        return results

    # ------------------------------------------------------------------------------------------ exchanges

    def mean(self, values: Iterable[float]) -> list[float]:
        """The means of numbers over the ranks, in float64; not finite where a rank's number is not."""
        numbers = torch.tensor(list(values), dtype=torch.float64)
        self._reduce(numbers, "the mean of losses")
        return (numbers / self.count).tolist()

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        numbers = torch.tensor([number])
        self._reduce(numbers, "the end of a step", dist.ReduceOp.MAX)
        return int(numbers.item())

    def wait(self, what: str) -> None:
        """Wait until all ranks have done `what`."""
        self._reduce(torch.zeros(1), what)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks."""
        self._reduce(tensor, "a sum")
        return tensor

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype, such as gradients, by their means over the ranks; in few exchanges."""
        if self.count == 1:
            return

        # As many tensors at once as fit into one bucket.
        bucket: list[Tensor] = []
        numbers = 0
        for tensor in tensors:
            if bucket and numbers + tensor.numel() > BUCKET:
                self._average_bucket(bucket)
                bucket, numbers = [], 0
            bucket.append(tensor)
            numbers += tensor.numel()
        if bucket:
            self._average_bucket(bucket)

    def gather(self, part: Tensor) -> Tensor:
        """All ranks' tensors of one shape, joined along the first axis in the order of ranks; without gradient."""
        part = part.detach().contiguous()
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)]
        with self.together("gathering"):
            dist.all_gather(parts, part)
        return torch.cat(parts)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Turn torch's error about an exchange that failed into a RankError that names the missing rank."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or isinstance(error, DavaeError) or not _is_about_exchange(error):
                raise
            raise _exchange_error(what, self.rank, self.count, error) from error

    def _reduce(self, tensor: Tensor, what: str, operation: Any = dist.ReduceOp.SUM) -> None:
        if self.count > 1:
            with self.together(what):
                dist.all_reduce(tensor, op=operation)

    def _average_bucket(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat(list(map(torch.flatten, tensors)))
        self._reduce(flat, "the mean of gradients")
        flat /= self.count
        for tensor, part in zip(tensors, flat.split(list(map(torch.numel, tensors))), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def _broadcast(self, text: str) -> str:
        """The text of rank 0, on every rank."""
        texts = [text]
        with self.together("hearing from rank 0"):
            dist.broadcast_object_list(texts)
        return texts[0]


def join_ranks(timeout: float = TIMEOUT) -> None:
    """Wait for the other processes of this run and make their process group; a later call finds it made.

    The timeout, in seconds, holds for this and each later exchange. A launcher that asks for DeepSpeed or for FSDP's
    first version is a SettingsError, processes that do not come are a RankError.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    _check_launcher(several=several)
    if not several or dist.is_initialized():
        return

    # Find the others.
    limit = timedelta(seconds=timeout)
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=limit)))
        store = meet(store, rank, count, timeout)
    except RuntimeError as error:  # the class of torch's network errors
        raise RankError(f"the processes of this run could not connect in {limit}: {error}") from error
    _stores[os.getpid()] = store

    # Each rank has a GPU of its own; what stays on the CPU is exchanged by gloo.
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
        dist.all_reduce(torch.zeros(1))  # returns when every rank takes part
    except RuntimeError as error:
        raise _exchange_error("connecting", rank, count, error) from error


def meet(store: dist.Store, rank: int, count: int, timeout: float) -> dist.Store:
    """A part of the store for the processes of one start; all of them are there when it is returned.

    torchrun may keep its store, with the addresses of dead processes, over restarts, and each of its agents counts
    restarts for itself. So rank 0 invents a name, the others sign below it, and rank 0 confirms the signatures: a
    process that read the name of an earlier start is not among them, and reads again.
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
            signatures = [_read(store, name) for name in names]
            store.set(f"davae start {start} all", " ".join([me, *signatures]))

        if me in _read(store, f"davae start {start} all").split():
            return dist.PrefixStore(f"davae start {start}", store)

        if time.monotonic() > deadline:
            absent = [other for other, name in enumerate(names, 1) if start and not store.check([name])]
            silence = f"rank {', '.join(map(str, absent or [0]))} did not come in {timeout:g} s"
            raise RankError(f"rank {rank} of {count}: {silence}: look at its messages, and run the same command again")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _check_launcher(*, several: bool) -> None:
    """Refuse settings of `accelerate launch` that davae does not support."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise SettingsError(
            "davae does not train with DeepSpeed's engine: launch with recipes/launch/zero2.yaml, which shards the "
            "gradients and the optimiser's state by FSDP2, or with fsdp2.yaml, which shards the weights, too"
        )
    version, offload = os.environ.get("FSDP_VERSION", "1"), parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
    if several and parse_flag_from_env("ACCELERATE_USE_FSDP") and (version != "2" or offload):
        given = f"FSDP of version {version}{' with offload' if offload else ''}"
        raise SettingsError(f"{given}: allowed is version 2 without offload, as in recipes/launch/fsdp2.yaml")


def _public_class(error: Exception) -> type[DavaeError]:
    """The nearest class of an error in `davae.errors`, from which every rank can make it: RankError for all others."""
    for cls in type(error).__mro__:
        if getattr(errors, cls.__name__, None) is cls:
            return cls
    return RankError


def _exchange_error(what: str, rank: int, count: int, error: RuntimeError) -> RankError:
    silent = _silent_ranks(rank, count)
    names = f"rank {', '.join(map(str, silent))} does not answer" if silent else "but all ranks still answer"
    return RankError(
        f"rank {rank} of {count}: {what} failed, {names}. It may have died, be stopped, or be slower than the timeout: "
        "look at its own messages. Run the same command again to go on from the last checkpoint "
        f"({str(error).splitlines()[0]})"
    )


def _silent_ranks(rank: int, count: int) -> list[int]:
    """The ranks that do not sign the roll within `ROLL_CALL` seconds, as each does whose own exchange failed."""
    store, silent = _stores.get(os.getpid()), [other for other in range(count) if other != rank]
    assert store is not None, "make Ranks() before anything else makes a process group"

    def call() -> None:
        deadline = time.monotonic() + ROLL_CALL
        with suppress(RuntimeError):  # the host of the store is gone, and nobody can answer
            store.set(f"davae here {rank}", "")
            while silent and time.monotonic() < deadline:
                silent[:] = [other for other in silent if not store.check([f"davae here {other}"])]
                time.sleep(0.1)

    # In a thread: the store blocks for ever if its host is stopped. The host is rank 0, unless torchrun has the store.
    caller = Thread(target=call, daemon=True)
    caller.start()
    caller.join(2 * ROLL_CALL)
    return [0] if caller.is_alive() else silent


def _read(store: dist.Store, key: str) -> str:
    """The text of this key, or "" if it has none yet."""
    return store.get(key).decode() if store.check([key]) else ""


def _is_about_exchange(error: RuntimeError) -> bool:
    """Whether torch raised this about an exchange; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
