"""A server from its start to its end: load, warm up, listen, finish what runs."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import replace_parts
from davae.serving.api import Desk, make_app
from davae.serving.jobs import JobQueue
from davae.serving.metrics import Metrics
from davae.serving.models import Model
from davae.serving.settings import Address, Defaults, Limits
from davae.serving.worker import Worker

GRACE_SECONDS = 30
"""After SIGTERM or SIGINT, for requests that run or wait; a second signal ends them at once."""
ANSWER_SECONDS = 10
"""For telling the clients of requests that were ended."""
KEEP_ALIVE_SECONDS = 30
"""Longer than clients keep an idle connection (5 s in OpenAI's), or one would be closed as it is used again."""
SPARE_CONNECTIONS = 64
"""Beside one for each request that may wait; more connections are refused."""


@dataclass(frozen=True)
class Source:
    """The pipeline to serve."""

    place: str | Path
    adapter: Sequence[str | Path] = ()
    base: str | Path | None = None
    """A pipeline that is served, too, for comparison: by default that of an adapter."""
    name: str = ""
    dtype: torch.dtype = torch.float32

    def load(self, device: str, prompt_tokens: int) -> dict[str, Model]:
        """The models on a device, by name; the upgraded one first."""
        name = self.name or Path(self.place).absolute().name.partition("@")[0]
        pipeline = load_pipeline(self.place, adapter=self.adapter, dtype=self.dtype, device=device)
        place = self.base or (self.place if self.adapter else None)
        if place is None:
            return {name: Model(name, pipeline, prompt_tokens)}

        # An upgrade leaves the text encoders as they are, so an adapter's base shares them.
        shared = {}
        if self.base is None:
            others = {part: module for part, module in pipeline.components.items() if part.startswith("text_encoder")}
            shared = {part: module for part, module in others.items() if module is not None}
        base = load_pipeline(place, without=list(shared), dtype=self.dtype, device=device)
        base = replace_parts(base, vae=base.vae, **shared)

        decoder = base.vae if isinstance(pipeline.vae, AutoencoderDA) else None
        return {
            name: Model(name, pipeline, prompt_tokens, decoder),
            f"{name}-base": Model(f"{name}-base", base, prompt_tokens),
        }


class _Listener(uvicorn.Server):
    """uvicorn's server, which tells clients, and cleans up, where it does not wait for their requests, too."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk
        self._hurries = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests finish, the second ends them, a third one leaves without cleaning up."""
        if self.should_exit and not self._hurries:
            self._hurries = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """End what runs or waits when the grace is over."""
        ending = asyncio.create_task(self._end_jobs())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_jobs(self) -> None:
        over = time.monotonic() + GRACE_SECONDS
        while not self._hurries and time.monotonic() < over:
            await asyncio.sleep(0.1)
        self._desk.end_jobs()


@dataclass(frozen=True)
class Server:
    """A server that is not running yet."""

    source: Source
    devices: Sequence[str] = ("cpu",)
    """A worker for each; workers of one device share its weights."""
    address: Address = field(default_factory=Address)
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    ui: bool = False

    def run(self, announce: Callable[[str], object]) -> None:
        """Load, warm up and serve, until a signal ends it; `announce` is called with the address that answers.

        Raises:
            DavaeError: the address is taken, or the pipeline cannot be loaded or served.
        """
        bound = self.address.bind()  # before minutes of loading
        desk = self._open_desk()

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            for worker in desk.workers:
                worker.start()
            host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
            announce(f"http://{host}:{bound.getsockname()[1]}")
            # What is cleaned up here is cleaned up after a signal, too.
            with files:
                yield
                desk.end_jobs()
                for worker in desk.workers:
                    worker.join(GRACE_SECONDS)

        app, files = make_app(desk), ExitStack()
        app.router.lifespan_context = lifespan
        if self.ui:
            # Gradio keeps the images on the page as files; it reads this variable when the page is made.
            os.environ["GRADIO_TEMP_DIR"] = files.enter_context(TemporaryDirectory(prefix="davae-serve-"))
            from davae.serving.page import add_page

            add_page(app, desk)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            limit_concurrency=self.limits.queue + SPARE_CONNECTIONS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS + ANSWER_SECONDS,
        )
        with suppress(KeyboardInterrupt):  # Ctrl+C is how it ends; by now everything has ended
            _Listener(config, desk).run(sockets=[bound])

    def _open_desk(self) -> Desk:
        jobs, metrics = JobQueue(self.limits.queue), Metrics()
        workers: list[Worker] = []
        loaded: dict[str, dict[str, Model]] = {}
        for device in self.devices:
            if device in loaded:
                models = {name: model.copied() for name, model in loaded[device].items()}
            else:
                models = loaded[device] = self.source.load(device, self.defaults.prompt_tokens)
            workers.append(Worker(models, jobs, metrics, batch=self.limits.batch))
        for worker in workers:
            worker.warm_up()

        metrics.watch("davae_queue", "Requests that wait.", lambda: len(jobs))
        metrics.watch("davae_workers", "Workers that work.", lambda: sum(worker.is_alive() for worker in workers))
        return Desk(loaded[self.devices[0]], workers, jobs, metrics, self.address, self.limits, self.defaults)
