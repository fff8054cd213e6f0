"""What davae knows of a class of transformers: one row of the table `davae.backbones.BACKBONES`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from davae.errors import SettingsError
from davae.method.flow import Latents, Sigma
from davae.method.noise_prediction import Timestep
from davae.method.widen import LatentPorts, patch_side
from davae.method.widen import Model as Model
from davae.models.base_autoencoders import downsample_factor

Pipeline = Any
"""A DiffusionPipeline of diffusers; see `davae.method.widen.Model`."""
Condition = dict[str, Tensor]
"""The keyword arguments of the transformer besides latents and time, each value [B, ...]."""
Size = int | tuple[int, int]
"""Side of a square in pixels, or width and height, in the order of "320x192" and of Pillow's sizes."""
UNBINNED = (
    "call it with use_resolution_binning=False and with height and width: its tables of sizes are the base's, by which "
    "it would make a small picture and enlarge it"
)
"""Advice for pipelines that have such tables."""


def refuse_use(*arguments: Any, **keywords: Any) -> NoReturn:
    """The default of the functions in a row: it says that the row has ports only."""
    raise SettingsError(
        "davae can widen and upgrade this transformer, but neither train it nor sample from it: its row of BACKBONES "
        "has ports only. docs/backbones.md says how to add the rest. The upgraded pipeline itself can be called"
    )


def compute_shift(pipeline: Pipeline, tokens: int) -> float:
    """The timestep shift s of sigma = s t / (1 + (s - 1) t) with which the stock pipeline samples that many tokens.

    A static shift is in the scheduler's config (`shift`, or `flow_shift` of the DPM solvers). A dynamic one is exp(mu),
    or mu where `time_shift_type` is "linear", and mu is a straight line through `base_shift` at `base_image_seq_len`
    tokens and `max_shift` at `max_image_seq_len`. An upgrade keeps the tokens, so it keeps s.
    """
    config = pipeline.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        shift = config.get("shift", config.get("flow_shift"))
        if shift is None:
            raise SettingsError(
                f"the scheduler, a {type(pipeline.scheduler).__name__}, has neither shift nor flow_shift: it is not "
                "for flow models. Give the pipeline its own scheduler, or the recipe a shift"
            )
        return float(shift)

    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - first) / (last - first)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


@dataclass(frozen=True)
class Backbone:
    """One class of transformers. Those that can be trained have `velocity`, or `noise` if they predict noise."""

    ports: LatentPorts
    """Where latents enter and leave."""

    # Training.
    condition: Callable[..., Condition] = refuse_use
    """(pipeline, prompts, max_sequence_length=...) -> condition; for classes, (pipeline, class numbers)."""
    velocity: Callable[[Any, Latents, Sigma, Condition], Latents] = refuse_use
    """(transformer, noisy latents, sigma, condition) -> velocity, noise - latents."""
    noise: Callable[[Any, Latents, Timestep, Condition], tuple[Latents, Latents | None]] | None = None
    """(transformer, noisy latents, timestep, condition) -> noise, and the variance in [-1, 1] if it is learned."""
    class_setting: str = ""
    """Setting of the transformer that counts its classes, which is also the number for no class; "" for captions."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get LoRA by default, as peft matches them."""
    shift: Callable[[Pipeline, int], float] = compute_shift
    """(pipeline, tokens) -> timestep shift of the stock pipeline; for flow models."""

    # Sampling.
    pipelines: tuple[str, ...] = ()
    """Class names of the stock pipelines that davae trains and samples from."""
    adjust_call: Callable[[dict[str, Any]], dict[str, Any]] = lambda call: call
    """Arguments of a stock call, as `call_arguments` names them -> as these pipelines want them; for captions."""
    guided_rows: int = 2
    """Rows of the transformer's batch in a guided step for one image; 1 where guidance is an input of the model."""

    # Sizes; see `picture_side`.
    one_size: bool = False
    """Positions fit one token grid."""
    pixel_multiple: int = 1
    """The stock pipeline wants sides that are multiples of so many pixels, whatever its VAE is."""
    learned_positions: bool = False
    """Its positions are parameters, where others keep them in a buffer."""
    longest_grid: Callable[[Mapping[str, Any]], int] | None = None
    """(config of the transformer) -> tokens along the longest side that its positions reach to; None for any."""

    # Texts, counted and cached.
    condition_shapes: Callable[[Any, int], dict[str, tuple[int, ...]]] | None = None
    """(transformer, text tokens) -> shape of each value of `condition`, for one caption or class and without the batch
    axis; None if davae does not know them, and then the cost of a step is not counted."""
    clip_tokens: int = 0
    """Text tokens beside those of the longest text encoder."""
    padded_text: bool = False
    """Each text encoder sees a fixed number of tokens, so their cost can be counted."""
    text_settings: tuple[str, ...] = ()
    """Attributes of the pipeline that change what its text encoders are given, besides components and code."""

    # Upgrading.
    carried: tuple[str, ...] = ()
    """Attributes of the pipeline that are in none of its configs; an upgrade hands them on."""
    advice: str = ""
    """How the stock pipeline must be called once it is upgraded; "" if as before."""
    refusal: str = ""
    """Why the stock pipeline cannot be upgraded, though its transformer can be widened; "" if it can."""

    @property
    def classes(self) -> bool:
        """Conditions are class numbers, not captions."""
        return bool(self.class_setting)

    def null_class(self, transformer: Any) -> int:
        """The class number that means no class."""
        return transformer.config[self.class_setting]

    def predict(self, transformer: Any, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
        """Call the transformer once: `velocity`, or `noise` at the step nearest below 1000 sigma."""
        if self.noise is None:
            return self.velocity(transformer, latents, sigma, condition)
        return self.noise(transformer, latents, (999 * sigma).long(), condition)[0]

    def call_arguments(
        self,
        prompts: Sequence[str],
        *,
        noise: Latents,
        height: int,
        width: int,
        guidance_scale: float,
        prompt_tokens: int,
    ) -> dict[str, Any]:
        """Arguments of the stock pipeline's call, for captions, sides in pixels and noise [B, C + D, h, w]."""
        call = {"prompt": list(prompts), "latents": noise, "height": height, "width": width}
        return self.adjust_call({**call, "guidance_scale": guidance_scale, "max_sequence_length": prompt_tokens})

    def picture_side(self, pipeline: Pipeline, size: int | None) -> int:
        """Side of an image in pixels: `size`, or the pipeline's default for None. Width and height are asked apart.

        Refuses a pipeline that davae neither trains nor samples from, and a size that it cannot make.
        """
        if not self.one_size:
            self._check_pipeline(pipeline)

        # The VAE's own factor, since some pipelines have another in their code. FLUX and its kin, whose transformers
        # have no sample size, count with 128.
        config, factor = pipeline.transformer.config, downsample_factor(pipeline.vae.config)
        default = config.get("sample_size", 128) * factor
        if self.one_size:
            if size not in (None, default):
                kind = type(pipeline.transformer).__name__
                raise SettingsError(f"size={size}: this {kind}'s positions fit one size, so allowed is {default}")
            return default

        # A side is a multiple of a token's, and ends where the positions do.
        token = factor * patch_side(pipeline.transformer, self.ports)
        largest = None if self.longest_grid is None else self.longest_grid(config) * token
        unit = math.lcm(token, self.pixel_multiple)
        return checked_side(default if size is None else size, unit=unit, largest=largest)

    def width_and_height(self, pipeline: Pipeline, size: Size | None) -> tuple[int, int]:
        """Width and height in pixels of a `size`; see `picture_side`."""
        width, height = size if isinstance(size, tuple) else (size, size)
        return self.picture_side(pipeline, width), self.picture_side(pipeline, height)

    def _check_pipeline(self, pipeline: Pipeline) -> None:
        if not self.pipelines:
            refuse_use()
        # By name, since an older diffusers lacks some of the classes; image-to-image has the same sizes.
        if not any(kind.__name__.replace("Img2Img", "") in self.pipelines for kind in type(pipeline).__mro__):
            raise SettingsError(
                f"a {type(pipeline).__name__} was given; allowed is {' or '.join(self.pipelines)}: davae upgrades "
                "other pipelines with this transformer, too, but neither trains them nor samples from them yet"
            )


def checked_side(side: int, *, unit: int, largest: int | None = None) -> int:
    """The side itself, in pixels, if it is a multiple of `unit`, that of one token, and at most `largest`."""
    if side < unit or side % unit or (largest is not None and side > largest):
        limit = "" if largest is None else f", up to {largest}"
        raise SettingsError(f"size={side}: allowed are multiples of {unit}, downsample factor x patch size{limit}")
    return side


def encode_texts(*names: str, **settings: Any) -> Callable[..., Condition]:
    """A `condition` that names the results of the pipeline's `encode_prompt`; "" for those that are not needed."""

    def condition(pipeline: Pipeline, prompts: Sequence[str], *, max_sequence_length: int) -> Condition:
        results = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length, **settings)
        return {name: tensor for name, tensor in zip(names, results, strict=False) if name}

    return condition


def guide_from_zero(call: dict[str, Any]) -> dict[str, Any]:
    """For pipelines whose guidance counts from 0; in davae, 1 or less means none."""
    return {**call, "guidance_scale": max(call["guidance_scale"] - 1, 0.0)}


def encode_classes(pipeline: Pipeline, labels: Sequence[int], *, class_setting: str) -> Condition:
    """Class numbers as a condition, `class_labels` [B] in int64; the null class stands for no class."""
    null = pipeline.transformer.config[class_setting]
    foreign = [label for label in labels if label not in range(null + 1)]
    if foreign:
        raise SettingsError(f"class {foreign[0]!r}: allowed are 0 to {null - 1}, and {null} for none")
    return {"class_labels": torch.tensor(list(labels), dtype=torch.long, device=pipeline.transformer.device)}


def split_variance(output: Tensor, channels: int) -> tuple[Latents, Latents | None]:
    """Noise, the first `channels`, and the variance on as many channels again; None if it is not learned."""
    noise, variance = output[:, :channels], output[:, channels:]
    return noise, (variance if variance.shape[1] else None)
