"""Requests on their way from a client to a worker and back: a bounded queue, batches, events, cancelling."""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from davae.errors import DavaeError


class QueueFullError(DavaeError):
    """As many requests wait as may."""


class CancelledJobError(DavaeError):
    """The client called a job off, or is gone."""


class ServerEndsError(DavaeError):
    """The server is about to end, or its worker failed."""


class FailedJobError(DavaeError):
    """A worker could not do a job; the server's log says why."""


@dataclass(frozen=True)
class Progress:
    """A step is done."""

    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """Where the sampling is heading, after a step."""

    step: int
    image: Image


@dataclass(frozen=True)
class Done:
    """All images of a job, whole."""

    images: list[Image]
    seconds: float
    """Time in the worker; waiting is not in it."""


@dataclass(frozen=True)
class _Failure:
    error: DavaeError


Event = Progress | Preview | Done


class ImageSettings(NamedTuple):
    """What the images of one batch have in common."""

    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    previews: int = 0
    """Previews of each image."""


@dataclass(eq=False)
class Job:
    """A request for a worker. It is made in an event loop, and a worker's thread sends its events there."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex, kw_only=True)
    """By which it can be cancelled."""

    def __post_init__(self) -> None:
        self.made_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | _Failure] = asyncio.Queue()
        self._stopped = threading.Event()

    @property
    def batch_key(self) -> Hashable:
        """Jobs of equal keys may share a batch."""
        return self.name

    @property
    def rows(self) -> int:
        """Images in a batch."""
        return 1

    @property
    def stopped(self) -> bool:
        """Whether the job is over, so that work on it can end."""
        return self._stopped.is_set()

    def send(self, event: Event) -> None:
        """Tell the reader, from any thread; nothing follows the end."""
        if not self.stopped:
            self._put(event)
        if isinstance(event, Done):
            self._stopped.set()

    def fail(self, error: DavaeError) -> None:
        """End the job with an error, from any thread; its reader raises it."""
        if not self.stopped:
            self._stopped.set()
            self._put(_Failure(error))

    def cancel(self) -> None:
        """Call the job off: its worker stops at the next step, and what it made is thrown away."""
        self.fail(CancelledJobError("the request was cancelled"))

    async def events(self) -> AsyncIterator[Event]:
        """Events in order, the last one `Done`. Leaving early cancels the job.

        Raises:
            DavaeError: it was cancelled, or failed.
        """
        try:
            event = None
            while not isinstance(event, Done):
                event = await self.next_event()
                yield event
        finally:
            self.cancel()

    async def next_event(self) -> Event:
        """The next event; may be given up and called again."""
        event = await self._events.get()
        if isinstance(event, _Failure):
            raise event.error
        return event

    def _put(self, event: Event | _Failure) -> None:
        # A loop that is closed has no readers.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@dataclass(eq=False)
class ImageJob(Job):
    """Some images of one prompt; image i has the noise of (seed, i)."""

    settings: ImageSettings
    prompt: str
    seed: int
    count: int = 1

    @property
    def batch_key(self) -> Hashable:
        """Size, steps and so on."""
        return self.settings

    @property
    def rows(self) -> int:
        """One for each image."""
        return self.count


@dataclass(eq=False)
class ReconstructionJob(Job):
    """A picture through the autoencoder: base, detail and joint reconstruction."""

    picture: UInt8[Tensor, "3 height width"]
    strength: float = 1.0
    """Factor on the detail latents in the joint reconstruction."""


class JobQueue:
    """Jobs that wait, first come, first served. Readers' event loops put, workers' threads take."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._living())

    def put(self, job: Job) -> None:
        """Let a job wait.

        Raises:
            QueueFullError: too many do.
            ServerEndsError: the server ends.
        """
        with self._changed:
            self._jobs = self._living()
            if self._closed:
                raise ServerEndsError("the server is about to end")
            if len(self._jobs) >= self._limit:
                raise QueueFullError(f"{self._limit} requests wait already: try again later")
            self._jobs.append(job)
            self._changed.notify()

    def take(self, rows: int) -> list[Job]:
        """The oldest job and others of its batch key, as many as fill `rows`; waits for one; [] if the queue closed."""
        with self._changed:
            while True:
                self._jobs = self._living()
                if self._jobs or self._closed:
                    break
                self._changed.wait()
            if not self._jobs:
                return []

            # Later jobs may pass others, but only into the batch of the oldest.
            key = self._jobs[0].batch_key
            batch: list[Job] = []
            for job in self._jobs:
                used = sum(other.rows for other in batch)
                if job.batch_key == key and (not batch or used + job.rows <= rows):
                    batch.append(job)
            self._jobs = deque(job for job in self._jobs if job not in batch)
            return batch

    def close(self, reason: str = "the server is about to end") -> None:
        """End what waits, and let no more in; workers leave."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.fail(ServerEndsError(reason))
            self._jobs.clear()
            self._changed.notify_all()

    def _living(self) -> deque[Job]:
        """Without those that were called off: they hold no place."""
        return deque(job for job in self._jobs if not job.stopped)
