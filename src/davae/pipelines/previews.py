"""Pictures while a pipeline samples: the base half of the latents, decoded by the base's decoder at 1/s of the size."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from PIL.Image import Image
from torch import Tensor

from davae.errors import SettingsError

Callback = Callable[[DiffusionPipeline, int, Any, dict[str, Any]], dict[str, Any]]


def preview_callback(decoder: ModelMixin, show: Callable[[int, list[Image]], object], *, every: int = 1) -> Callback:
    """A `callback_on_step_end` for an upgraded pipeline that shows where the sampling is heading.

    The first C channels of upgraded latents are the base's latents of the picture at 1/s of its size, so the base's
    decoder, or a tiny one for the same latents, makes a picture of them for 1/s^2 of the work or less. What is
    decoded is not the noisy latents but their end if the velocity stayed what it was in the last step:
    x - sigma (x - x') / (sigma - sigma'), with x' and sigma' from the step before. After the last step that is the
    latents themselves.

    Args:
        decoder: the base pipeline's VAE, or an AutoencoderTiny for the same latents. Of an upgrade of an upgrade the
            first one's AutoencoderDA does, and the VAE below that.
        show: called with the number of the step, from 1 (the second: the first has none before it), and the B pictures.
        every: only after each step whose number is a multiple of this, and after the last.

    Raises:
        SettingsError: here, if `every` is below 1; when called, if the latents are packed or have too few channels, or
            the scheduler is not a FlowMatchEulerDiscreteScheduler.
    """
    if every < 1:
        raise SettingsError(f"every={every}: allowed are 1 or more")
    before: list[Tensor] = []

    @torch.no_grad()
    def callback(pipeline: DiffusionPipeline, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        scheduler, latents, channels = pipeline.scheduler, given["latents"], decoder.config.latent_channels
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise SettingsError(f"previews are for a FlowMatchEulerDiscreteScheduler, not a {type(scheduler).__name__}")
        if latents.ndim != 4 or latents.shape[1] < channels:
            raise SettingsError(
                f"latents {list(latents.shape)}: previews need [B, {channels} or more, h, w], which packed ones are not"
            )
        if step == 0:
            before.clear()
        base = latents[:, :channels].float()
        last = scheduler.step_index == len(scheduler.sigmas) - 1
        if before and (last or step % every == 0):
            sigma, earlier = (scheduler.sigmas[scheduler.step_index - back].item() for back in (0, 1))
            end = base - sigma * (base - before[0]) / (sigma - earlier)
            pictures = decoder.decode(_outside(decoder, end).to(decoder.device, decoder.dtype), return_dict=False)[0]
            show(step, pipeline.image_processor.postprocess(pictures, output_type="pil"))
        before[:] = [base]
        return given

    return callback


def _outside(decoder: ModelMixin, latents: Tensor) -> Tensor:
    """From the transformer's units to the decoder's own scale, by its own two scalars, and its statistics if any."""
    config = decoder.config
    latents = latents / config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents + (config.shift_factor or 0.0)
    return latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
