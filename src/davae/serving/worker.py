"""Threads that do the jobs: one for each device, each with pipelines whose schedulers are its own."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from davae.errors import DavaeError
from davae.serving.jobs import (
    CancelledJobError,
    Done,
    FailedJobError,
    ImageJob,
    Job,
    JobQueue,
    ReconstructionJob,
    ServerEndsError,
)
from davae.serving.metrics import Metrics
from davae.serving.models import Model

logger = logging.getLogger(__name__)


class Worker(threading.Thread):
    """Takes batches from the queue until it closes.

    A job that fails ends with an error. After a failure that has no name the worker makes its warm-up images again, and
    if that fails, too, it ends: the server is then no longer healthy.
    """

    def __init__(self, models: Mapping[str, Model], jobs: JobQueue, metrics: Metrics, *, batch: int) -> None:
        super().__init__(name="davae-worker", daemon=True)
        self._models, self._jobs, self._metrics, self._batch = models, jobs, metrics, batch
        self._running: Sequence[Job] = ()

    def warm_up(self) -> None:
        """Make each pipeline's first image, before the thread starts."""
        for model in self._models.values():
            model.warm_up()

    def run(self) -> None:
        """Do jobs."""
        while batch := self._jobs.take(self._batch):
            self._running = batch
            if not self._do(batch):
                self._jobs.close("the server's worker failed")
                return

    def stop(self) -> None:
        """Call off what runs; the queue must be closed."""
        for job in self._running:
            job.fail(ServerEndsError("the server is about to end"))

    def _do(self, batch: Sequence[Job]) -> bool:
        """Do a batch and tell its jobs; whether the worker can go on."""
        began = time.monotonic()
        try:
            results = self._compute(batch)
        except DavaeError as error:
            for job in batch:
                job.fail(error)
            if isinstance(error, CancelledJobError):
                self._metrics.stopped.inc()
            else:
                logger.warning("a batch failed: %s", error)
            return True
        except torch.OutOfMemoryError as error:
            logger.warning("out of memory: %s", error)
            torch.cuda.empty_cache()
            for job in batch:
                job.fail(FailedJobError("the device is out of memory: ask for a smaller size or fewer images"))
            return True
        except Exception:  # of torch or diffusers: the clients and the log are told, and the worker checks itself
            logger.exception("a batch failed")
            for job in batch:
                job.fail(FailedJobError("the image could not be made: the server's log says why"))
            return self._is_sound()

        seconds = time.monotonic() - began
        self._metrics.seconds.observe(seconds)
        for job, images in zip(batch, results, strict=True):
            self._metrics.images.inc(0 if job.stopped else len(images))
            job.send(Done(images, seconds))
        return True

    def _compute(self, batch: Sequence[Job]) -> list[list[Any]]:
        first = batch[0]
        if isinstance(first, ReconstructionJob):
            model = next(iter(self._models.values()))
            return [model.reconstruct(first.picture, first.strength)]

        jobs = cast(Sequence[ImageJob], batch)
        for job in jobs:
            self._metrics.waiting.observe(time.monotonic() - job.made_at)
        self._metrics.batch.observe(sum(job.rows for job in jobs))
        return self._models[jobs[0].settings.model].make_images(jobs)

    def _is_sound(self) -> bool:
        try:
            self.warm_up()
        except Exception:  # as above
            logger.exception("the worker ends: after a failure its warm-up fails, too")
            return False
        return True
