"""Stage 2's objective for a pipeline: a flow model learns the velocity, other models learn the noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from davae.backbones import Backbone, backbone_of
from davae.errors import SettingsError
from davae.method.flow import flow_loss, interpolate, sample_timesteps
from davae.method.noise_prediction import add_noise, noise_loss
from davae.method.widen import patch_side

Condition = dict[str, Tensor]
Prediction = tuple[Tensor, Tensor | None]
"""Velocity or noise, and the variance if the transformer predicts it; each [B, C + D, h, w]."""
LossAndLogs = tuple[Tensor, dict[str, Tensor | float]]
"""The loss of one batch with its graph, and its parts for the log."""


@dataclass(frozen=True)
class FlowObjective:
    """Of a flow model: `davae.method.flow.flow_loss` at times from a shifted logit-normal."""

    backbone: Backbone
    base_channels: int
    shift: float
    """Timestep shift, the same in training and sampling."""
    settings: Mapping[str, Any]
    """Options of `flow_loss`: `data_objective`, `min_snr`, `cosine_weight`."""

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Sigmas [B] in (0, 1), one from each generator."""
        return torch.cat([sample_timesteps(1, shift=self.shift, generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, latents: Tensor, noise: Tensor, time: Tensor, condition: Condition
    ) -> Prediction:
        """The velocity at `time` on the straight path from latents to noise."""
        return self.backbone.velocity(transformer, interpolate(latents, noise, time), time, condition), None

    def loss(
        self, prediction: Prediction, latents: Tensor, noise: Tensor, time: Tensor, *, detail_weight: float
    ) -> LossAndLogs:
        """See `flow_loss`."""
        velocity, _ = prediction
        weights: dict[str, Any] = {"base_channels": self.base_channels, "detail_weight": detail_weight}
        return flow_loss(velocity, latents, noise, time, **weights, **self.settings)


@dataclass(frozen=True)
class NoiseObjective:
    """Of a model that predicts noise: `davae.method.noise_prediction.noise_loss` at evenly drawn timesteps."""

    backbone: Backbone
    base_channels: int
    alphas: Tensor
    """Cumulative products of the pipeline's own scheduler [T]."""

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Timesteps [B] from 0 to T - 1, one from each generator."""
        return torch.cat([torch.randint(len(self.alphas), (1,), generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, latents: Tensor, noise: Tensor, time: Tensor, condition: Condition
    ) -> Prediction:
        """The noise in the latents at timestep `time`, and the variance if the transformer predicts it."""
        assert self.backbone.noise is not None
        return self.backbone.noise(transformer, add_noise(latents, noise, self.alphas, time), time, condition)

    def loss(
        self, prediction: Prediction, _latents: Tensor, noise: Tensor, time: Tensor, *, detail_weight: float
    ) -> LossAndLogs:
        """See `noise_loss`."""
        weights: dict[str, Any] = {"base_channels": self.base_channels, "detail_weight": detail_weight}
        return noise_loss(*prediction, noise, self.alphas, time, **weights)


Objective = FlowObjective | NoiseObjective


def choose_objective(
    pipeline: DiffusionPipeline, *, base_channels: int, positions: int, shift: float | None = None, **settings: Any
) -> Objective:
    """The objective of a pipeline's backbone on latents of `positions` = h x w; `settings` are options of `flow_loss`.

    Refuses options of flow models for a model that predicts noise, and a scheduler of the other kind.
    """
    backbone, scheduler = backbone_of(pipeline.transformer), pipeline.scheduler
    if backbone.noise is None:
        tokens = positions // patch_side(pipeline.transformer, backbone.ports) ** 2
        return FlowObjective(backbone, base_channels, shift or backbone.shift(pipeline, tokens), settings)

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
    return NoiseObjective(backbone, base_channels, alphas)
