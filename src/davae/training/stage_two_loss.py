"""Stage 2's objective for a pipeline: the velocity of a flow model, or the noise of a model that predicts noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from davae.backbones import Backbone, backbone_of
from davae.errors import SettingsError
from davae.method.flow import flow_loss, interpolate, sample_timesteps
from davae.method.noise_prediction import add_noise, noise_loss
from davae.method.widen import patch_side

Prediction = tuple[Tensor, Tensor | None]
"""Velocity or noise, and the variance if the transformer predicts it; each [B, C + D, h, w]."""
LossAndLogs = tuple[Tensor, dict[str, Tensor | float]]


@dataclass(frozen=True)
class FlowObjective:
    """The objective of a flow model: `davae.method.flow.flow_loss`, at times from a shifted logit-normal."""

    backbone: Backbone
    base_channels: int
    shift: float
    """The timestep shift, in training as in sampling."""
    data_objective: bool = False
    min_snr: float | None = None
    cosine_weight: float = 0.0

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Sigmas [B] in (0, 1), one from each generator."""
        return torch.cat([sample_timesteps(1, shift=self.shift, generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, latents: Tensor, noise: Tensor, time: Tensor, condition: dict[str, Tensor]
    ) -> Prediction:
        """The velocity at `time` on the straight path from latents to noise."""
        return self.backbone.velocity(transformer, interpolate(latents, noise, time), time, condition), None

    def loss(
        self, prediction: Prediction, latents: Tensor, noise: Tensor, time: Tensor, *, detail_weight: float
    ) -> LossAndLogs:
        """The loss of one batch and its parts for the log."""
        return flow_loss(
            prediction[0],
            latents,
            noise,
            time,
            base_channels=self.base_channels,
            detail_weight=detail_weight,
            data_objective=self.data_objective,
            min_snr=self.min_snr,
            cosine_weight=self.cosine_weight,
        )


@dataclass(frozen=True)
class NoiseObjective:
    """The objective of a model that predicts noise: `davae.method.noise_prediction.noise_loss`, at even times."""

    backbone: Backbone
    base_channels: int
    alphas: Tensor
    """Cumulative products of the pipeline's own scheduler [T]."""

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Timesteps [B], evenly from 0 to T - 1, one from each generator."""
        return torch.cat([torch.randint(len(self.alphas), (1,), generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, latents: Tensor, noise: Tensor, time: Tensor, condition: dict[str, Tensor]
    ) -> Prediction:
        """The noise in the latents at timestep `time`, and the variance if the transformer predicts it."""
        assert self.backbone.noise is not None
        return self.backbone.noise(transformer, add_noise(latents, noise, self.alphas, time), time, condition)

    def loss(
        self, prediction: Prediction, latents: Tensor, noise: Tensor, time: Tensor, *, detail_weight: float
    ) -> LossAndLogs:
        """The loss of one batch and its parts for the log."""
        return noise_loss(
            *prediction,
            noise,
            self.alphas,
            time,
            base_channels=self.base_channels,
            detail_weight=detail_weight,
        )


def choose_objective(
    pipeline: DiffusionPipeline,
    *,
    base_channels: int,
    positions: int,
    shift: float | None = None,
    data_objective: bool = False,
    min_snr: float | None = None,
    cosine_weight: float = 0.0,
) -> FlowObjective | NoiseObjective:
    """The objective of a pipeline's backbone on latents of `positions` = h x w.

    Args:
        pipeline: with its transformer and its scheduler.
        base_channels: C.
        positions: h x w, which a scheduler's timestep shift may depend on.
        shift: timestep shift of a flow model; the scheduler's own if None.
        data_objective: as in `davae.method.flow.flow_loss`.
        min_snr: as in `davae.method.flow.flow_loss`.
        cosine_weight: as in `davae.method.flow.flow_loss`.

    Raises:
        SettingsError: a setting of flow models for a model that predicts noise, or a scheduler of the other kind.
    """
    backbone, scheduler = backbone_of(pipeline.transformer), pipeline.scheduler
    if backbone.noise is None:
        tokens = positions // patch_side(pipeline.transformer, backbone.ports) ** 2
        shift = shift or backbone.shift(pipeline, tokens)
        return FlowObjective(backbone, base_channels, shift, data_objective, min_snr, cosine_weight)

    flow_settings = {
        "shift": shift,
        'objective = "data"': data_objective,
        "min_snr": min_snr,
        "cosine_weight": cosine_weight,
    }
    if foreign := [name for name, value in flow_settings.items() if value]:
        raise SettingsError(
            f"{', '.join(foreign)}: a {type(pipeline.transformer).__name__} predicts noise, and these are for flow "
            "models. Leave them out"
        )

    alphas = getattr(scheduler, "alphas_cumprod", None)
    kind = scheduler.config.get("prediction_type")
    if alphas is None or kind != "epsilon":
        raise SettingsError(
            f"the scheduler is a {type(scheduler).__name__} with prediction_type={kind!r}; a model that predicts noise "
            'needs one with prediction_type="epsilon" and alphas_cumprod'
        )
    return NoiseObjective(backbone, base_channels, alphas)
