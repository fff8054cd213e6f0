"""The routes of a server: images in the shape of OpenAI's API, models, health and metrics. No route reads a file."""

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from davae.errors import DavaeError
from davae.serving.gate import BodyLimits, Gate, error_response
from davae.serving.jobs import (
    CancelledJobError,
    Done,
    ImageJob,
    ImageSettings,
    Job,
    JobQueue,
    Preview,
    Progress,
    QueueFullError,
    ServerEndsError,
)
from davae.serving.metrics import Metrics
from davae.serving.models import Model
from davae.serving.requests import ImageRequest, RequestError, UnknownModelError, describe_mistake
from davae.serving.settings import Address, Defaults, Limits
from davae.serving.worker import Worker

PING_SECONDS = 15
"""A stream is never silent for longer, so that nothing between server and client closes it."""
DEFAULT_QUALITY = 90
"""Of jpeg and webp."""
CLIENT_CLOSED = 499
"""The status of a cancelled request, as nginx has it: no client tries again by itself."""


@dataclass
class Desk:
    """What the routes share."""

    models: Mapping[str, Model]
    workers: list[Worker]
    jobs: JobQueue
    metrics: Metrics
    address: Address
    limits: Limits
    defaults: Defaults
    named: WeakValueDictionary[str, Job] = field(default_factory=WeakValueDictionary)
    """Jobs that may be cancelled, by name, for as long as somebody waits for them."""

    def submit(self, job: Job) -> None:
        """Let a job wait for a worker.

        Raises:
            RequestError: another one has its name.
            DavaeError: the queue is full, or the server ends.
        """
        if job.name in self.named:
            raise RequestError("X-Client-Request-Id", f"a request named {job.name} is under way: choose another name")
        self.jobs.put(job)
        self.named[job.name] = job

    def end_jobs(self) -> None:
        """End what runs or waits, and let no more in."""
        self.jobs.close()
        for worker in self.workers:
            worker.stop()


def make_app(desk: Desk) -> FastAPI:
    """The application, without what starts and ends it."""
    app = FastAPI(title="davae", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(BodyLimits, limits=desk.limits)
    app.add_middleware(Gate, address=desk.address, metrics=desk.metrics)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=desk.address.allowed_hosts, www_redirect=False)
    app.add_exception_handler(DavaeError, answer_error)
    app.add_exception_handler(RequestValidationError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    app.add_exception_handler(Exception, answer_error)

    @app.post("/v1/images/generations")
    async def generate(body: ImageRequest, request: Request) -> Response:
        """Images from a prompt, as JSON or as a stream of events."""
        model = body.choose_model(desk.models)
        settings = body.resolve(model, desk.limits, desk.defaults)
        names = {} if (name := read_name(request)) is None else {"name": name}
        job = ImageJob(settings, body.prompt, body.choose_seed(), body.count, **names)
        desk.submit(job)

        headers = {"X-Request-Id": job.name, "Cache-Control": "no-store"}
        if body.stream:
            stream = stream_events(job, body)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        return JSONResponse(await finish(job, body, request), headers=headers)

    @app.delete("/v1/images/generations/{name}", status_code=204, response_class=Response)
    async def cancel(name: str) -> None:
        """Call off a request, by the name in its header X-Request-Id or X-Client-Request-Id."""
        job = desk.named.get(name)
        if job is None or job.stopped:
            raise HTTPException(404, "no request of that name is under way")
        job.cancel()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The pipelines."""
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "davae"} for name in desk.models]
        return {"object": "list", "data": entries}

    @app.get("/healthz")
    async def health() -> Response:
        """Whether images can be made; the server answers at all only after its warm-up."""
        sound = all(worker.is_alive() for worker in desk.workers)
        return JSONResponse({"status": "ok" if sound else "a worker failed"}, 200 if sound else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(desk.metrics.to_text(), media_type=CONTENT_TYPE_LATEST)

    return app


def read_name(request: Request) -> str | None:
    """The name that the client gives its request, if it does."""
    name = request.headers.get("x-client-request-id")
    if name is not None and re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII) is None:
        raise RequestError("X-Client-Request-Id", "X-Client-Request-Id: allowed are 64 of A-Z a-z 0-9 . _ -")
    return name


async def finish(job: ImageJob, body: ImageRequest, request: Request) -> dict[str, Any]:
    """The answer to a request that is no stream; the job is cancelled if the client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.create_task(watch())
    try:
        async for event in job.events():
            last = event
    finally:
        watcher.cancel()

    assert isinstance(last, Done)
    data = []
    for image in last.images:
        data.append({"b64_json": await encode(image, body), "seed": job.seed})
    return {"created": int(time.time()), "data": data, **describe_images(job.settings, body)}


async def stream_events(job: ImageJob, body: ImageRequest) -> AsyncIterator[bytes]:
    """The events of a job as a client reads them. When it stops reading, the job is cancelled."""
    facts = {"created_at": int(time.time()), **describe_images(job.settings, body)}
    previews = 0
    try:
        while True:
            try:
                event = await asyncio.wait_for(job.next_event(), PING_SECONDS)
            except TimeoutError:
                yield b": waiting\n\n"
                continue

            match event:
                case Progress(step, steps) if body.progress:
                    yield format_event("progress", {"step": step, "steps": steps})
                case Preview(_, image) if previews < job.settings.previews:
                    data = {"b64_json": await encode(image, body), "partial_image_index": previews, **facts}
                    yield format_event("partial_image", data)
                    previews += 1
                case Done(images):
                    data = {"b64_json": await encode(images[0], body), "seed": job.seed, **facts}
                    yield format_event("completed", data)
                    return
    except DavaeError as error:  # the status is sent already: clients read it from the stream
        yield b"event: error\ndata: " + bytes(answer_davae_error(error).body) + b"\n\n"
    finally:
        job.cancel()


def describe_images(settings: ImageSettings, body: ImageRequest) -> dict[str, Any]:
    """What an answer says of its images."""
    return {
        "size": f"{settings.width}x{settings.height}",
        "output_format": body.output_format or "png",
        "quality": "auto",
        "background": "opaque",
    }


def format_event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    kind = f"image_generation.{name}"
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


async def encode(image: Image.Image, body: ImageRequest) -> str:
    """An image file in base64, made in a thread, since it takes a while."""

    def write() -> str:
        stream = io.BytesIO()
        kind = body.output_format or "png"
        quality = DEFAULT_QUALITY if body.output_compression is None else body.output_compression
        image.save(stream, format=kind, **({} if kind == "png" else {"quality": quality}))
        return base64.b64encode(stream.getvalue()).decode()

    return await asyncio.to_thread(write)


def answer_davae_error(error: DavaeError) -> Response:
    """The status and the words of an error of davae's."""
    match error:
        case UnknownModelError():
            return error_response(404, str(error), parameter="model", code="model_not_found")
        case RequestError():
            return error_response(400, str(error), parameter=error.parameter)
        case QueueFullError():
            return error_response(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        case CancelledJobError():
            return error_response(CLIENT_CLOSED, str(error), code="cancelled")
        case ServerEndsError():
            return error_response(503, str(error), code="server_ends")
        case _:
            return error_response(500, str(error))


async def answer_error(request: Request, error: Exception) -> Response:
    """Any error in the shape that OpenAI's clients read."""
    match error:
        case DavaeError():
            return answer_davae_error(error)
        case RequestValidationError():
            parameter, message = describe_mistake(error.errors()[0])
            return error_response(400, message, parameter=parameter)
        case HTTPException():
            return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case _:
            return error_response(500, "the server failed: its log says why")
