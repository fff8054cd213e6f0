"""Images while a pipeline samples: the base decoder shows the base half of the latents at 1/s of the size."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from PIL.Image import Image
from torch import Tensor

from davae.errors import SettingsError
from davae.pipelines.sampling import to_vae_scale

Callback = Callable[[DiffusionPipeline, int, Any, dict[str, Any]], dict[str, Any]]


def preview_callback(decoder: ModelMixin, show: Callable[[int, list[Image]], object], *, every: int = 1) -> Callback:
    """Make a `callback_on_step_end` for an upgraded pipeline that shows where the sampling is heading.

    The first C channels of upgraded latents are the base's latents of the image at 1/s of its size. So the base's
    decoder, or a tiny one for the same latents, makes an image of them for at most 1/s^2 of the work. The noisy latents
    x are first extrapolated to sigma = 0 with the velocity of the last step, which began at x':
    x - sigma (x - x') / (sigma - sigma'). After the last step, these are the latents themselves.

    Args:
        decoder: the base pipeline's VAE, or an AutoencoderTiny for the same latents. For an upgrade of an upgrade, the
            first upgrade's AutoencoderDA or its base.
        show: called with the number of the step and the B images. The first step has number 0 and is not shown,
            because there is none before it.
        every: show only steps whose number is a multiple of this, and the last.

    Raises:
        SettingsError: here, if `every` is below 1; when called, if the latents are packed or have too few channels, or
            the scheduler is not a FlowMatchEulerDiscreteScheduler.
    """
    if every < 1:
        raise SettingsError(f"every={every}: allowed are 1 or more")
    channels = decoder.config.latent_channels
    previous: Tensor | None = None

    @torch.no_grad()
    def callback(pipeline: DiffusionPipeline, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        nonlocal previous
        scheduler, latents = pipeline.scheduler, arguments["latents"]
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise SettingsError(f"previews are for a FlowMatchEulerDiscreteScheduler, not a {type(scheduler).__name__}")
        if latents.ndim != 4 or latents.shape[1] < channels:
            raise SettingsError(
                f"latents {list(latents.shape)}: previews need [B, {channels} or more, h, w], which packed ones are not"
            )

        base = latents[:, :channels].float()
        index = scheduler.step_index
        is_last = index == len(scheduler.sigmas) - 1
        if step > 0 and previous is not None and (is_last or step % every == 0):
            sigma, sigma_before = scheduler.sigmas[index].item(), scheduler.sigmas[index - 1].item()
            end = base - sigma * (base - previous) / (sigma - sigma_before)
            scaled = to_vae_scale(decoder, end).to(decoder.device, decoder.dtype)
            images = decoder.decode(scaled, return_dict=False)[0]
            show(step, pipeline.image_processor.postprocess(images, output_type="pil"))
        previous = base
        return arguments

    return callback
