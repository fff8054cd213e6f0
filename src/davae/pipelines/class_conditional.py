"""The pipeline of LightningDiT, base or upgraded: diffusers has none for class-conditional flow models."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from davae.backbones import lightningdit
from davae.errors import SettingsError
from davae.models.lightningdit import LightningDiT2DModel
from davae.pipelines.sampling import to_vae_scale

OUTPUTS = ("pil", "np", "pt", "latent")


def make_time_grid(steps: int, shift: float) -> list[float]:
    """LightningDiT's times t' from 0 (noise) to 1 (data): `steps` + 1 of them, in float64.

    t' = s t / (1 + (s - 1) t) of evenly spaced t. A shift s below 1 makes more steps near the noise. The reference
    samples on a grid of 250 points with s = 0.3, so it evaluates the model 249 times.
    """
    if steps < 1 or not shift > 0:
        raise SettingsError(
            f"num_inference_steps={steps}, timestep_shift={shift}: allowed are 1 or more, and above 0; 1 shifts nothing"
        )
    return [shift * step / (steps - step + shift * step) for step in range(steps + 1)]


class ClassConditionalFlowPipeline(DiffusionPipeline):
    """Images of class numbers: a LightningDiT2DModel, an autoencoder and the stock Euler scheduler, with shift 1.

    `vae` is an AutoencoderKL, with per-channel `latents_mean` and `latents_std` in its config or without, or an
    AutoencoderDA. `davae.load_pipeline` loads what `save_pretrained` wrote; so does `from_pretrained` of this class.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self, transformer: LightningDiT2DModel, vae: ModelMixin, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.default_sample_size = transformer.config.sample_size
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 249,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.2, 1.0),
        timestep_shift: float = 0.3,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Make one image for each class number; the defaults are the reference's for ImageNet at 512 px.

        Args:
            class_labels: B numbers; the transformer's `num_classes` means no class.
            num_inference_steps: Euler steps, each one evaluation of the model.
            guidance_scale: g of null + g (class - null), on all channels; at 1 the null half is not computed.
            guidance_interval: first and last t' (0 = noise, 1 = data) with guidance.
            timestep_shift: s of t' = s t / (1 + (s - 1) t); see `make_time_grid`.
            height: as `width`, only the default is allowed, because the transformer's positions are fixed.
            width: see `height`.
            generator: of the noise.
            latents: the noise, [B, channels, h, w]; drawn if None.
            output_type: "pil", "np", "pt" (images in [0, 1]) or "latent" (in the transformer's units).
            return_dict: whether to wrap the result as diffusers does.
        """
        self._check(height, width, output_type)
        device = self._execution_device
        condition = lightningdit.BACKBONE.condition(self, class_labels)["class_labels"].to(device)
        times = make_time_grid(num_inference_steps, timestep_shift)

        if latents is None:
            config = self.transformer.config
            shape = (len(condition), config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        # 249 small steps add up in float32 at least, whatever the transformer computes in.
        latents = latents.to(device, torch.promote_types(latents.dtype, torch.float32))

        # Euler steps: the stock scheduler's sigma is 1 - t'.
        self.scheduler.set_timesteps(sigmas=[1 - time for time in times[:-1]], device=device)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=num_inference_steps) as progress:
            for time, timestep in zip(times[:-1], self.scheduler.timesteps, strict=True):
                is_guided = guidance_interval[0] <= time <= guidance_interval[1]
                velocity = self._velocity(latents, time, condition, guidance_scale if is_guided else 1.0)
                latents = self.scheduler.step(velocity.to(latents.dtype), timestep, latents, return_dict=False)[0]
                progress.update()

        # From the transformer's units to images.
        images = latents
        if output_type != "latent":
            images = self.vae.decode(to_vae_scale(self.vae, latents).to(self.vae.dtype), return_dict=False)[0]
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, latents: Tensor, time: float, labels: Tensor, guidance_scale: float) -> Tensor:
        """The velocity noise - data at LightningDiT's `time`; with guidance, both halves in one batch."""
        latents = latents.to(self.transformer.dtype)
        if guidance_scale != 1:
            latents = torch.cat([latents, latents])
            labels = torch.cat([labels, torch.full_like(labels, lightningdit.BACKBONE.null_class(self.transformer))])

        sigma = torch.full((len(labels),), 1 - time, device=latents.device)
        velocity = lightningdit.velocity(self.transformer, latents, sigma, {"class_labels": labels})
        velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
        if guidance_scale == 1:
            return velocity
        conditional, null = velocity.chunk(2)
        return null + guidance_scale * (conditional - null)

    def _check(self, height: int | None, width: int | None, output_type: str) -> None:
        for side in (height, width):
            lightningdit.BACKBONE.picture_side(self, side)
        if output_type not in OUTPUTS:
            raise SettingsError(f"output_type={output_type!r}: allowed are {', '.join(OUTPUTS)}")

        # A plain scheduler, which has the default of every setting and was not shifted since it was made.
        defaults = FlowMatchEulerDiscreteScheduler().config
        settings = {**self.scheduler.config, "shift": getattr(self.scheduler, "shift", None)}
        changed = {name: value for name, value in settings.items() if name[0] != "_" and value != defaults.get(name)}
        if changed or not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise SettingsError(
                f"the scheduler is a {type(self.scheduler).__name__} with {changed}: allowed is a plain "
                "FlowMatchEulerDiscreteScheduler(), because this pipeline sets the times itself, with timestep_shift"
            )
