"""Pipelines as a server calls them: made ready, checked, with steps that report and can be stopped."""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from davae.backbones import backbone_of
from davae.backbones.backbone import Size
from davae.data.pictures import to_bytes, to_floats
from davae.errors import NumericsError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import downsample_factor
from davae.pipelines.sampling import draw_shared_noise, preview_callback
from davae.pipelines.upgrade import replace_parts
from davae.serving.jobs import CancelledJobError, ImageJob, ImageSettings, Preview, Progress

logger = logging.getLogger(__name__)

STEP_CALLBACK = "callback_on_step_end"

Picture = UInt8[Tensor, "3 height width"]


def serving_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of the same weights, but with its own scheduler and tokenizers: both can be called at the same time.

    A scheduler counts the steps of one call, and a tokenizer keeps the padding of the last.
    """
    own = {}
    for name, part in pipeline.components.items():
        if part is not None and not isinstance(part, nn.Module):
            own[name] = copy.deepcopy(part)
    copied = replace_parts(pipeline, vae=pipeline.vae, **own)
    copied.set_progress_bar_config(disable=True)
    return copied


@dataclass
class Model:
    """A pipeline for captions, for one thread."""

    name: str
    pipeline: DiffusionPipeline
    prompt_tokens: int = 256
    preview_decoder: ModelMixin | None = None
    """The base's VAE, for previews at a quarter of the work; the pipeline's own if None."""
    no_previews: str = ""
    """Why there are none; "" if there are. `warm_up` finds out."""

    def __post_init__(self) -> None:
        self.backbone = backbone_of(self.pipeline.transformer)
        if self.backbone.classes:
            raise SettingsError(f"{self.name} takes class numbers: the server is for pipelines that take prompts")
        self.side = self.backbone.picture_side(self.pipeline, None)
        self.pipeline.set_progress_bar_config(disable=True)
        if STEP_CALLBACK not in inspect.signature(self.pipeline.__call__).parameters:
            self.no_previews = f"a {type(self.pipeline).__name__} does not tell its steps"

    def copied(self) -> "Model":
        """The same weights for another thread."""
        return Model(self.name, serving_copy(self.pipeline), self.prompt_tokens, self.preview_decoder, self.no_previews)

    def check_size(self, size: Size | None) -> tuple[int, int]:
        """Width and height in pixels; refuses a size that the pipeline cannot make."""
        return self.backbone.width_and_height(self.pipeline, size)

    def warm_up(self) -> None:
        """Make an image in two steps, so that the first request waits for nothing; with a preview, if there are any."""
        settings = ImageSettings(self.name, self.side, self.side, 2, 4.0)
        if not self.no_previews:
            preview = preview_callback(self.preview_decoder or self.pipeline.vae, lambda step, images: None)
            try:
                self._call(["warm up"], self._noise([(0, 1)], settings), settings, preview)
                return
            except SettingsError as error:
                self.no_previews = str(error)
                logger.warning("no previews of %s: %s", self.name, error)
        self._call(["warm up"], self._noise([(0, 1)], settings), settings, None)

    def make_images(self, jobs: Sequence[ImageJob]) -> list[list[Image.Image]]:
        """The images of each job, in one batch.

        Raises:
            CancelledJobError: all jobs were called off meanwhile.
            NumericsError: the pipeline made numbers that are not finite.
        """
        settings = jobs[0].settings
        prompts = [job.prompt for job in jobs for _ in range(job.count)]
        noise = self._noise([(job.seed, job.count) for job in jobs], settings)
        images = to_pillow(self._call(prompts, noise, settings, self._follow(jobs)))

        parts = []
        for job in jobs:
            parts.append(images[: job.count])
            images = images[job.count :]
        return parts

    def _noise(self, draws: Sequence[tuple[int, int]], settings: ImageSettings) -> Tensor:
        """Starting noise of some (seed, count of images), as `davae generate` draws it."""
        factor = downsample_factor(self.pipeline.vae.config)
        height, width = settings.height // factor, settings.width // factor
        parts = []
        for seed, count in draws:
            parts.append(draw_shared_noise(self.pipeline, range(count), seed=seed, height=height, width=width))
        return torch.cat(parts).to(self.pipeline.device, self.pipeline.transformer.dtype)

    def _call(
        self, prompts: list[str], noise: Tensor, settings: ImageSettings, callback: Callable[..., Any] | None
    ) -> Float[Tensor, "b 3 height width"]:
        arguments = self.backbone.call_arguments(
            prompts,
            noise=noise,
            height=settings.height,
            width=settings.width,
            guidance_scale=settings.guidance_scale,
            prompt_tokens=self.prompt_tokens,
        )
        if callback is not None and STEP_CALLBACK in inspect.signature(self.pipeline.__call__).parameters:
            arguments[STEP_CALLBACK] = callback
        images = self.pipeline(**arguments, num_inference_steps=settings.steps, output_type="pt").images
        if not images.isfinite().all():
            raise NumericsError(f"{self.name} made numbers that are not finite: try --dtype float32 or bfloat16")
        return images * 2 - 1

    def _follow(self, jobs: Sequence[ImageJob]) -> Callable[..., Any]:
        """A callback that tells the jobs of each step, shows their previews, and stops if all are called off."""
        settings = jobs[0].settings
        owners = [job for job in jobs for _ in range(job.count)]
        every = math.ceil(settings.steps / (settings.previews + 1))

        def show(step: int, images: Sequence[Any]) -> None:
            if step % every == 0:  # the last step is shown by the image itself
                for job, image in zip(owners, images, strict=True):
                    job.send(Preview(step, image))

        preview = None
        if settings.previews:
            preview = preview_callback(self.preview_decoder or self.pipeline.vae, show, every=every)

        def callback(
            pipeline: DiffusionPipeline, step: int, timestep: Any, arguments: dict[str, Any]
        ) -> dict[str, Any]:
            if all(job.stopped for job in jobs):
                raise CancelledJobError("all requests of the batch were cancelled")
            for job in jobs:
                job.send(Progress(step + 1, settings.steps))
            return arguments if preview is None else preview(pipeline, step, timestep, arguments)

        return callback

    @torch.no_grad()
    def reconstruct(self, picture: Picture, strength: float) -> list[Image.Image]:
        """A picture through the autoencoder: what the base half keeps, what the detail adds, and both together.

        The detail is the difference that its latents make, twice enlarged around grey. `strength` scales them in the
        joint reconstruction, around the mean of each channel.
        """
        vae = self.pipeline.vae
        if not isinstance(vae, AutoencoderDA):
            raise SettingsError(f"the autoencoder of {self.name} is not upgraded: it has no detail latents")
        image = to_floats(picture[None]).to(vae.device, vae.dtype)
        latents = vae.encode(image).latent_dist.mode()
        base, detail = latents.split([vae.config.base_channels, vae.config.detail_channels], dim=1)

        # Where the transformer has 0, the mean of each detail channel, the stock pipelines' latents have the shift.
        shift = vae.config.shift_factor
        decoded = []
        for factor in (0.0, 1.0, strength):
            scaled = shift + factor * (detail - shift)
            decoded.append(vae.decode(torch.cat([base, scaled], dim=1)).sample.float())
        without, full, joint = decoded
        return to_pillow(torch.cat([without, 2 * (full - without), joint]))

    def fit(self, picture: Picture, side: int) -> Picture:
        """The picture, scaled down to at most `side` and to sides that the autoencoder takes."""
        factor = downsample_factor(self.pipeline.vae.config)
        height, width = picture.shape[-2:]
        scale = min(1.0, side / max(height, width))
        size = [max(factor, int(length * scale) // factor * factor) for length in (height, width)]
        resized = F.interpolate(to_floats(picture[None]), size=size, mode="bicubic", antialias=True)
        return to_bytes(resized)[0]


def to_pillow(images: Float[Tensor, "b 3 height width"]) -> list[Image.Image]:
    """The models' values, in [-1, 1], as images."""
    rows = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in rows]
