"""The page of a server: prompts to images, base and upgrade side by side, and pictures through the autoencoder."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import gradio as gr
from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError

from davae.data.pictures import read_picture
from davae.errors import DavaeError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.serving.api import Desk
from davae.serving.jobs import Done, ImageJob, Job, Preview, Progress, ReconstructionJob
from davae.serving.requests import ImageRequest, describe_mistake

PATH = "/ui"
PREVIEWS = 3
CACHE_SECONDS = 600
"""Files of images on the page are deleted after this."""
SHOWN_SIDE = 360
CSS = """
.status textarea, .status input { font-variant-numeric: tabular-nums }
.shown img { width: 100%; height: 100%; object-fit: contain }
"""


@dataclass
class Pane:
    """What the page shows of one model."""

    name: str
    job: ImageJob
    status: str = "waiting"
    image: Image.Image | None = None
    done: bool = False
    began: float = field(default_factory=time.monotonic)

    def update(self, event: Any) -> None:
        """Take in an event of the job."""
        match event:
            case Progress(step, steps):
                self.status = f"step {step} of {steps}"
            case Preview(_, image):
                self.image = image
            case Done(images, seconds):
                self.image, self.done = images[0], True
                self.status = f"{self.image.width}x{self.image.height} px, {seconds:.1f} s, seed {self.job.seed}"
            case DavaeError():
                self.image, self.status = None, str(event)


class Sessions:
    """The jobs of each open page, so that its button and its end can cancel them."""

    def __init__(self) -> None:
        self._jobs: dict[str, WeakSet[Job]] = {}

    def add(self, request: gr.Request, job: Job) -> None:
        """Remember a job for as long as somebody waits for it."""
        self._jobs.setdefault(str(request.session_hash), WeakSet()).add(job)

    def cancel(self, request: gr.Request) -> None:
        """Call off all jobs of a page."""
        for job in list(self._jobs.get(str(request.session_hash), ())):
            job.cancel()

    def end(self, request: gr.Request) -> None:
        """The page is closed."""
        self.cancel(request)
        self._jobs.pop(str(request.session_hash), None)


def add_page(app: FastAPI, desk: Desk) -> None:
    """Put the page at `PATH` of the application."""
    gr.mount_gradio_app(
        app,
        make_page(desk),
        PATH,
        max_file_size=desk.limits.upload_bytes,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        enable_monitoring=False,
        mcp_server=False,
    )


def make_page(desk: Desk) -> gr.Blocks:
    """The page: a tab for prompts and, for an upgraded pipeline, one for pictures."""
    sessions = Sessions()
    upgraded = isinstance(next(iter(desk.models.values())).pipeline.vae, AutoencoderDA)
    with gr.Blocks(
        title="davae", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS), fill_width=True
    ) as page:
        with gr.Tab("Generate"):
            _add_generation(desk, sessions)
        if upgraded:
            with gr.Tab("Reconstruct"):
                _add_reconstruction(desk, sessions)
        page.unload(sessions.end)
    page.queue(api_open=False, default_concurrency_limit=None)
    return page


def _add_generation(desk: Desk, sessions: Sessions) -> None:
    side = next(iter(desk.models.values())).side
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", max_length=desk.limits.prompt, scale=4, elem_id="prompt")
        size = gr.Textbox(label="Size", value=f"{side}x{side}", min_width=120, elem_id="size")
        steps = gr.Number(label="Steps", value=desk.defaults.steps, precision=0, min_width=80, elem_id="steps")
        guidance = gr.Number(label="Guidance", value=desk.defaults.guidance_scale, min_width=80)
        seed = gr.Textbox(label="Seed", placeholder="any", min_width=120, elem_id="seed")
    with gr.Row():
        start = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Cancel", elem_id="cancel")

    # The base first, as it comes first in a comparison.
    names = list(desk.models)[::-1]
    images, texts = [], []
    with gr.Row():
        for name in names:
            with gr.Column():
                images.append(_add_image(name))
                texts.append(gr.Textbox(label="Status", interactive=False, elem_classes="status"))
    outputs: list[Any] = [*images, *texts]
    if len(names) > 1:
        slider = gr.ImageSlider(label="Base (left) and upgrade (right)", format="png", interactive=False)
        outputs.append(slider)

    async def generate(
        text: str, shape: str, count: float, scale: float, number: str, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        body = {"prompt": text, "size": shape.strip() or None, "steps": int(count), "guidance_scale": float(scale)}
        try:
            body["seed"] = _read_seed(number)
            panes = _submit(desk, sessions, request, body)
        except (DavaeError, ValidationError) as error:
            yield _lay_out([None] * len(names), [_say(error)] * len(names))
            return

        shown: list[Any] = [None] * len(outputs)
        yield [None] * len(outputs)
        async for _ in _follow(panes):
            by_name = {pane.name: pane for pane in panes}
            values = _lay_out([by_name[name].image for name in names], [by_name[name].status for name in names])
            # Images that are there already are not written and sent again.
            yield [gr.skip() if new is old else new for new, old in zip(values, shown, strict=True)]
            shown = values

    inputs = [prompt, size, steps, guidance, seed]
    gr.on([start.click, prompt.submit], generate, inputs, outputs, show_progress="hidden", trigger_mode="once")
    stop.click(sessions.cancel, None, None, queue=False)


def _add_image(label: str) -> gr.Image:
    """A place for an image."""
    settings: dict[str, Any] = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
    return gr.Image(label=label, height=SHOWN_SIDE, elem_classes="shown", **settings)


def _read_seed(text: str) -> int | None:
    """A number, or None for any."""
    text = text.strip()
    if text and not (text.isascii() and text.isdecimal() and len(text) <= 16):
        raise SettingsError(f"seed {text[:40]!r}: allowed are whole numbers from 0, or none for any")
    return int(text) if text else None


def _submit(desk: Desk, sessions: Sessions, request: gr.Request, body: dict[str, Any]) -> list[Pane]:
    """A job for each model, of the same seed; the base's images are as much smaller as its pipeline's are."""
    panes: list[Pane] = []
    first = next(iter(desk.models.values()))
    for name, model in desk.models.items():
        previews = 0 if model.no_previews else PREVIEWS
        made = ImageRequest(**body, model=name, stream=True, partial_images=previews)
        settings = made.resolve(first, desk.limits, desk.defaults)
        width, height = (length * model.side // first.side for length in (settings.width, settings.height))
        model.check_size((width, height))

        body = {**body, "seed": made.choose_seed()}
        settings = settings._replace(model=name, width=width, height=height, previews=previews)
        panes.append(Pane(name, ImageJob(settings, made.prompt, body["seed"])))

    for pane in panes:
        try:
            desk.submit(pane.job)
        except DavaeError:
            for other in panes:
                other.job.cancel()
            raise
        sessions.add(request, pane.job)
    return panes


async def _follow(panes: list[Pane]) -> AsyncIterator[None]:
    """Take in the events of all jobs until they end; leaving early cancels them."""
    changed = asyncio.Event()

    async def read(pane: Pane) -> None:
        try:
            async for event in pane.job.events():
                pane.update(event)
                changed.set()
        except DavaeError as error:
            pane.update(error)
        changed.set()

    readers = [asyncio.create_task(read(pane)) for pane in panes]
    try:
        while not all(reader.done() for reader in readers):
            yield
            await changed.wait()
            changed.clear()
        yield
    finally:
        for pane in panes:
            pane.job.cancel()


def _lay_out(images: list[Image.Image | None], texts: list[str]) -> list[Any]:
    """Values of the page's parts: images, texts, and the two images over each other once both are there."""
    if len(images) == 1:
        return [*images, *texts]
    base, upgrade = images
    pair = None
    if base is not None and upgrade is not None and texts[0][:1].isdigit() and texts[1][:1].isdigit():
        pair = (base.resize(upgrade.size, Image.Resampling.BICUBIC), upgrade)
    return [*images, *texts, pair]


def _add_reconstruction(desk: Desk, sessions: Sessions) -> None:
    labels = ["Picture", "Base half only", "What the detail adds (x2)", "Both"]
    file = gr.File(label="Drop a picture here", type="binary", height=140, elem_id="picture")
    strength = gr.Slider(0, 2, value=1, step=0.1, label="Strength of the detail", elem_id="strength")
    status = gr.Textbox(label="Status", interactive=False, elem_classes="status")
    with gr.Row():
        images = [_add_image(label) for label in labels]
    model = next(iter(desk.models.values()))

    async def reconstruct(data: bytes | None, factor: float, request: gr.Request) -> list[Any]:
        if data is None:
            return [*[None] * len(images), "no picture yet"]

        # The file is a stranger's: it is decoded as those of training sets are, with the same limits.
        try:
            picture = await asyncio.to_thread(read_picture, data, "the picture")
            fitted = await asyncio.to_thread(model.fit, picture, desk.limits.side or model.side)
            job = ReconstructionJob(fitted, float(factor))
            sessions.add(request, job)
            desk.submit(job)
            async for event in job.events():
                last = event
        except DavaeError as error:
            return [*[None] * len(images), _say(error)]

        assert isinstance(last, Done)
        original = Image.fromarray(fitted.permute(1, 2, 0).numpy())
        text = f"{original.width}x{original.height} px, {last.seconds:.1f} s, strength {factor:g}"
        return [original, *last.images, text]

    for event in (file.upload, file.clear, strength.change):
        event(reconstruct, [file, strength], [*images, status], show_progress="hidden", trigger_mode="always_last")


def _say(error: DavaeError | ValidationError) -> str:
    """A refusal in one sentence."""
    return describe_mistake(error.errors()[0])[1] if isinstance(error, ValidationError) else str(error)
