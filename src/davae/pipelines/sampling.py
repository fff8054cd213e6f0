"""Images from prompts, from any pipeline that takes captions; noise that a base shares with its upgrade; previews."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from davae.backbones import backbone_of
from davae.backbones.backbone import Size
from davae.data.buckets import Bucket, fit
from davae.data.pictures import to_bytes
from davae.errors import SettingsError
from davae.models.base_autoencoders import base_facts, downsample_factor
from davae.seeds import generator

Callback = Callable[[DiffusionPipeline, int, Any, dict[str, Any]], dict[str, Any]]


def draw_shared_noise(
    pipeline: DiffusionPipeline, indices: Sequence[int], *, seed: int, height: int, width: int
) -> Tensor:
    """Draw starting noise [B, channels, height, width] for latents, keyed by (seed, index).

    The base half is the base pipeline's noise, also for an upgrade of an upgrade. So base and upgraded images of one
    index begin alike, and can be compared side by side.
    """
    # From the outermost autoencoder down to the base: each upgrade put its detail channels behind.
    detail_channels: list[int] = []
    config = pipeline.vae.config
    while isinstance(config.get("base_config"), dict) and config["base_channels"]:
        detail_channels.insert(0, config["detail_channels"])
        config = config["base_config"]

    channels = {"base noise": base_facts(config).latent_channels}
    for number, count in enumerate(detail_channels, 1):
        channels["detail noise" if number == 1 else f"detail noise {number}"] = count

    # Each part of each image has a generator of its own, so that none depends on another's size.
    images = []
    for index in indices:
        parts = []
        for purpose, count in channels.items():
            parts.append(torch.randn(count, height, width, generator=generator(seed, purpose, index)))
        images.append(torch.cat(parts))
    return torch.stack(images)


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = 28,
    guidance_scale: float = 4.0,
    size: Size | None = None,
    prompt_tokens: int = 256,
    first_index: int = 0,
    negative: str = "",
    image: UInt8[Tensor, "3 _ _"] | None = None,
    strength: float = 0.6,
) -> UInt8[Tensor, "b 3 height width"]:
    """Make one image for each prompt, all in one batch.

    The noise is keyed by `seed` and by each image's index, which counts from `first_index`. `guidance_scale` is an
    argument of the stock pipeline; in most, 1 turns classifier-free guidance off, and otherwise it is against the text
    `negative`. `size` is a side in pixels, or width and height; the pipeline's default square if None. The longest text
    encoder pads or cuts to `prompt_tokens`.

    With an `image`, `image_to_image` has made the pipeline. It starts from that image, cropped and scaled down, at the
    share `strength` of the steps; the smaller, the more of it stays.
    """
    backbone = backbone_of(pipeline.transformer)
    width, height = backbone.width_and_height(pipeline, size)
    factor = downsample_factor(pipeline.vae.config)  # some pipelines' own count differs from their VAE's
    indices = range(first_index, first_index + len(prompts))
    noise = draw_shared_noise(pipeline, indices, seed=seed, height=height // factor, width=width // factor)
    noise = noise.to(pipeline._execution_device, pipeline.transformer.dtype)

    arguments = backbone.call_arguments(
        prompts, noise=noise, height=height, width=width, guidance_scale=guidance_scale, prompt_tokens=prompt_tokens
    )
    if negative:
        _check_negative(pipeline, guidance_scale)
        arguments["negative_prompt"] = [negative] * len(prompts)
    if image is not None:
        # Image-to-image pipelines would take latents for noisy ones that begin at the first step.
        del arguments["latents"]
        start = fit(image, Bucket(height, width, width / height)) / 255
        arguments |= {"image": start.expand(len(prompts), *start.shape), "strength": strength}
        arguments["generator"] = [generator(seed, "image to image", index) for index in indices]

    images = pipeline(**arguments, num_inference_steps=steps, output_type="pt").images
    return to_bytes(images * 2 - 1)


def image_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The stock pipeline with the same parts that starts from an image, for `sample(image=...)`."""
    name = type(pipeline).__name__
    kind = getattr(diffusers, name.removesuffix("Pipeline") + "Img2ImgPipeline", None)
    if kind is None:
        raise SettingsError(
            f"diffusers has no image-to-image pipeline beside {name}: leave --image out, or take a pipeline of Stable "
            "Diffusion 3, FLUX.1, Chroma, Qwen-Image or Z-Image"
        )
    return kind(**pipeline.components)


def _check_negative(pipeline: DiffusionPipeline, guidance_scale: float) -> None:
    """Refuse a negative prompt that the pipeline would not use."""
    name = type(pipeline).__name__
    if backbone_of(pipeline.transformer).guided_rows == 1:
        raise SettingsError(f"{name}'s guidance is an input of its model, without a negative prompt: leave it out")
    if "negative_prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise SettingsError(f"{name} takes no negative prompt: leave it out")
    if guidance_scale <= 1:
        raise SettingsError(
            f"guidance_scale={guidance_scale:g} leaves a negative prompt unused: give a scale above 1, or leave it out"
        )


def to_vae_scale(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Latents of a transformer in its VAE's scale: / scaling_factor, then * std + mean if it has them, or + shift."""
    config = vae.config
    latents = latents / config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents + (config.shift_factor or 0.0)
    mean, std = (torch.tensor(list(values)).to(latents).view(1, -1, 1, 1) for values in (mean, std))
    return latents * std + mean


def preview_callback(decoder: ModelMixin, show: Callable[[int, list[Image]], object], *, every: int = 1) -> Callback:
    """Make a `callback_on_step_end` for an upgraded pipeline that shows where the sampling is heading.

    The first C channels of upgraded latents are the base's latents of the image at 1/s of its size. The base's decoder,
    or a tiny one for the same latents, makes an image of them for at most 1/s^2 of the work. The noisy latents x are
    first extrapolated to sigma = 0 with the velocity of the last step, which began at x':
    x - sigma (x - x') / (sigma - sigma').

    Args:
        decoder: the base pipeline's VAE, or an AutoencoderTiny for the same latents. For an upgrade of an upgrade, the
            first upgrade's AutoencoderDA or its base.
        show: called with the number of the step and the B images; not for step 0, which has none before it.
        every: show only steps whose number is a multiple of this, and the last.

    Raises:
        SettingsError: here, if `every` is below 1; when called, if the latents are packed or have too few channels, or
            the scheduler is not a FlowMatchEulerDiscreteScheduler, or one that draws noise or inverts its sigmas.
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
        foreign = [name for name in ("stochastic_sampling", "invert_sigmas") if scheduler.config.get(name)]
        if foreign:
            raise SettingsError(
                f"the scheduler has {foreign[0]}=True: its steps do not tell the velocity that a preview needs. Make "
                f"images without previews, or a scheduler with {foreign[0]}=False"
            )
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
