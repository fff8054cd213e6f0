"""Stage 2: the widened transformer learns the detail latents, whose part of the loss is faded in.

A flow model learns the velocity, other models learn the noise.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from davae.backbones import Backbone, backbone_of
from davae.data.buckets import Bucket
from davae.errors import SettingsError
from davae.method.flow import LossAndLogs, detail_weight, flow_loss, interpolate, sample_timesteps
from davae.method.noise_prediction import add_noise, noise_loss
from davae.method.widen import patch_side
from davae.run import faults
from davae.seeds import rand, randn
from davae.training.devices import attention_on
from davae.training.stage_two_recipe import FinetuneRecipe, flow_settings
from davae.training.state import TrainingState

Condition = dict[str, Tensor]
Prediction = tuple[Tensor, Tensor | None]
"""Velocity or noise, and the variance if the transformer predicts it; each [B, C + D, h, w]."""


@dataclass(frozen=True)
class Objective:
    """The velocity's error at times from a shifted logit-normal, or with `alphas` the noise's at evenly drawn steps."""

    backbone: Backbone
    base_channels: int
    shift: float = 1.0
    """Timestep shift of a flow model, the same in training and sampling."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of `flow_loss`: `data_objective`, `min_snr`, `cosine_weight`."""
    alphas: Tensor | None = None
    """Noise schedule of a model that predicts noise: the cumulative products of the pipeline's own scheduler [T]."""

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Sigmas in (0, 1), or timesteps from 0 to T - 1, both [B], one from each generator."""
        if self.alphas is None:
            return torch.cat([sample_timesteps(1, shift=self.shift, generator=own) for own in random])
        return torch.cat([torch.randint(len(self.alphas), (1,), generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, latents: Tensor, noise: Tensor, time: Tensor, condition: Condition
    ) -> Prediction:
        """Mix latents and noise as of `time`, and call the transformer."""
        if self.alphas is None:
            return self.backbone.velocity(transformer, interpolate(latents, noise, time), time, condition), None
        assert self.backbone.noise is not None
        return self.backbone.noise(transformer, add_noise(latents, noise, self.alphas, time), time, condition)

    def loss(
        self, prediction: Prediction, latents: Tensor, noise: Tensor, time: Tensor, *, detail_weight: float
    ) -> LossAndLogs:
        """See `flow_loss` and `noise_loss`."""
        weights: dict[str, Any] = {"base_channels": self.base_channels, "detail_weight": detail_weight}
        if self.alphas is None:
            return flow_loss(prediction[0], latents, noise, time, **weights, **self.settings)
        return noise_loss(*prediction, noise, self.alphas, time, **weights)


def choose_objective(
    pipeline: DiffusionPipeline, *, base_channels: int, positions: int, shift: float | None = None, **settings: Any
) -> Objective:
    """The objective of a pipeline's backbone on latents of `positions` = h x w; `settings` are options of `flow_loss`.

    Refuses options of flow models for a model that predicts noise, and a scheduler of the other kind.
    """
    backbone, scheduler = backbone_of(pipeline.transformer), pipeline.scheduler
    if backbone.noise is None:
        tokens = positions // patch_side(pipeline.transformer, backbone.ports) ** 2
        return Objective(backbone, base_channels, shift or backbone.shift(pipeline, tokens), settings)

    # Options of flow models make no sense for the noise's error.
    if foreign := [name for name, value in {"shift": shift, **settings}.items() if value]:
        raise SettingsError(
            f"{', '.join(foreign)}: a {type(pipeline.transformer).__name__} predicts noise, and these settings are for "
            "flow models. Leave them out"
        )

    # The noise schedule is the pipeline's own.
    alphas, kind = getattr(scheduler, "alphas_cumprod", None), scheduler.config.get("prediction_type")
    if alphas is None or kind != "epsilon":
        raise SettingsError(
            f"the scheduler is a {type(scheduler).__name__} with prediction_type={kind!r}; a model that predicts noise "
            'needs one with prediction_type="epsilon" and alphas_cumprod'
        )
    return Objective(backbone, base_channels, alphas=alphas)


def choose_objectives(
    pipeline: DiffusionPipeline, recipe: FinetuneRecipe, buckets: Iterable[Bucket]
) -> dict[int, Objective]:
    """The objective for each number of latent positions h x w, which a timestep shift may depend on."""
    factor, channels = pipeline.vae.downsample_factor, pipeline.vae.config.base_channels
    objectives = {}
    for bucket in buckets:
        positions = (bucket.height // factor) * (bucket.width // factor)
        objectives[positions] = choose_objective(
            pipeline, base_channels=channels, positions=positions, shift=recipe.shift, **flow_settings(recipe)
        )
    return objectives


class Batch(NamedTuple):
    """One rank's share of a batch."""

    names: list[str]
    """Of all pictures in the whole batch, for the log."""
    indices: list[int]
    latents: Tensor
    """Clean, base channels first [B, C + D, h, w]."""
    random: list[torch.Generator]
    """Each sample's own."""


ReadConditions = Callable[[Sequence[int]], dict[str, Tensor]]
"""Rows -> the transformer's keyword arguments beside latents and time, each [B, ...], on any device.

Row 0 is the empty caption or the null class, row 1 + i belongs to image i.
"""


def train_transformer(
    transformer: ModelMixin,
    recipe: FinetuneRecipe,
    state: TrainingState,
    load: Callable[[int], Batch],
    read_conditions: ReadConditions,
    objectives: Mapping[int, Objective],
    draw_pictures: Callable[[], None],
) -> None:
    """Take the steps that are left; the transformer is the state's."""
    transformer.train()

    for step in state.steps():
        if recipe.validation_every and step % recipe.validation_every == 0:
            draw_pictures()

        # The weight of the detail channels in the loss rises from 0 to 1 (Eq. 12).
        weight = detail_weight(step, recipe.detail_warmup_steps)

        for number in state.batches():
            # Clean latents of base and detail channels, with noise and a time for each sample.
            batch = load(number)
            latents, objective = batch.latents, objectives[batch.latents[0, 0].numel()]
            noise = randn(latents.shape, batch.random).to(state.device)
            time = objective.draw_times(batch.random).to(state.device)

            # Some samples lose their caption or class: guidance compares with those.
            is_told = rand(batch.random) >= recipe.caption_dropout
            told = read_conditions(torch.where(is_told, torch.tensor(batch.indices) + 1, 0).tolist())
            condition = {name: faults.at("text", values.to(state.device)) for name, values in told.items()}

            with attention_on(state.device):
                # The transformer sees noisy latents and predicts their velocity, noise - latents, or the noise.
                with state.autocast():
                    predicted, variance = objective.predict(transformer, latents, noise, time, condition)
                prediction = faults.at("forward", predicted), variance

                # The squared error, in which the detail channels have their weight (Eq. 13). The backward pass stays
                # in the attention's context: checkpointed blocks are computed again there.
                loss, logs = objective.loss(prediction, latents, noise, time, detail_weight=weight)
                state.update(loss, logs, samples=batch.names)

    if recipe.validation_every:
        draw_pictures()
