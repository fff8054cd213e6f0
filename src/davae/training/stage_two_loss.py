"""What stage 2 minimises: the error of a flow model's velocity, or of the noise that a diffusion model predicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from davae.backbones import Backbone, backbone_of
from davae.errors import SettingsError
from davae.method.flow import (
    cosine_loss,
    flow_matching_losses,
    interpolate,
    latents_prediction,
    min_snr_weight,
    sample_timesteps,
    velocity_target,
)
from davae.method.noise_prediction import add_noise, noise_losses, variance_loss
from davae.method.widen import patch_side
from davae.training.stage_two_recipe import FinetuneRecipe

Losses = tuple[Tensor, dict[str, Tensor | float]]
"""The loss of one batch, and its parts for the log."""


@dataclass(frozen=True)
class FlowObjective:
    """Of a flow model: `flow_loss` at times from a shifted logit-normal."""

    backbone: Backbone
    recipe: FinetuneRecipe
    base_channels: int
    shift: float
    """The timestep shift that sampling has, too."""

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Sigmas [B] in (0, 1), one from each generator."""
        return torch.cat([sample_timesteps(1, shift=self.shift, generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, clean: Tensor, noise: Tensor, time: Tensor, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity [B, C + D, h, w]."""
        return self.backbone.velocity(transformer, interpolate(clean, noise, time), time, condition), None

    def loss(
        self, prediction: tuple[Tensor, Tensor | None], clean: Tensor, noise: Tensor, time: Tensor, *, weight: float
    ) -> Losses:
        """See `flow_loss`; `weight` is that of the detail channels (Eq. 12)."""
        velocity, _ = prediction
        return flow_loss(velocity, clean, noise, time, self.recipe, base_channels=self.base_channels, weight=weight)


@dataclass(frozen=True)
class NoiseObjective:
    """Of a model that predicts noise, and its variance perhaps: the noise's error plus the variational bound's term."""

    backbone: Backbone
    base_channels: int
    alphas: Tensor
    """Cumulative products of the pipeline's own scheduler [T]."""

    def draw_times(self, random: Sequence[torch.Generator]) -> Tensor:
        """Steps [B], integers from 0 to T - 1, all as likely, one from each generator."""
        return torch.cat([torch.randint(len(self.alphas), (1,), generator=own) for own in random])

    def predict(
        self, transformer: ModelMixin, clean: Tensor, noise: Tensor, time: Tensor, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Noise, and variance or None, each [B, C + D, h, w]."""
        assert self.backbone.noise is not None
        return self.backbone.noise(transformer, add_noise(clean, noise, self.alphas, time), time, condition)

    def loss(
        self, prediction: tuple[Tensor, Tensor | None], clean: Tensor, noise: Tensor, time: Tensor, *, weight: float
    ) -> Losses:
        """Eq. 13 of the noise, and of the variance's bound; `weight` is that of the detail channels (Eq. 12)."""
        predicted, variance = prediction
        losses = noise_losses(predicted, noise, base_channels=self.base_channels, detail_weight=weight)
        logs: dict[str, Tensor | float] = {"base_loss": losses.base, "detail_loss": losses.detail}
        if variance is None:
            return losses.total, {**logs, "detail_weight": weight}
        bound = variance_loss(
            variance, predicted, noise, self.alphas, time, base_channels=self.base_channels, detail_weight=weight
        )
        return losses.total + bound, {**logs, "detail_weight": weight, "variance_loss": bound.detach()}


def objective_of(
    pipeline: DiffusionPipeline, recipe: FinetuneRecipe, *, base_channels: int, positions: int
) -> FlowObjective | NoiseObjective:
    """The objective of a pipeline's family, on latents of so many positions h x w.

    Raises:
        SettingsError: settings that only flow models have, for one that predicts noise; or a scheduler of the other
            kind.
    """
    backbone, scheduler = backbone_of(pipeline.transformer), pipeline.scheduler
    if backbone.noise is None:
        tokens = positions // patch_side(pipeline.transformer, backbone.ports) ** 2
        shift = recipe.shift or backbone.shift(scheduler, tokens)
        return FlowObjective(backbone, recipe, base_channels, shift)
    given = [name for name in ("shift", "min_snr", "cosine_weight") if getattr(recipe, name)]
    if given or recipe.objective != "velocity":
        given = given or [f"objective={recipe.objective!r}"]
        raise SettingsError(
            f"{', '.join(given)}: a {type(pipeline.transformer).__name__} predicts noise, and these are for flow "
            "models. Leave them out"
        )
    alphas = getattr(scheduler, "alphas_cumprod", None)
    kind = scheduler.config.get("prediction_type")
    if alphas is None or kind != "epsilon":
        raise SettingsError(
            f"the scheduler is a {type(scheduler).__name__} with prediction_type={kind!r}; allowed is one of a model "
            'that predicts noise: prediction_type="epsilon", with alphas_cumprod'
        )
    return NoiseObjective(backbone, base_channels, alphas)


def flow_loss(
    velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    recipe: FinetuneRecipe,
    *,
    base_channels: int,
    weight: float,
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Stage 2's loss of one batch, and its parts for the log.

    It is Eq. 13 of the recipe's objective, `weight` that of the detail channels (Eq. 12), plus cosine_weight times the
    cosine term. The logged base and detail loss are of the objective, too, so that Eq. 13 holds between them.
    """
    target = velocity_target(clean, noise)
    pair, factor = (velocity, target), None
    if recipe.objective == "data":
        pair = latents_prediction(interpolate(clean, noise, sigma), velocity, sigma), clean
        factor = None if recipe.min_snr is None else min_snr_weight(sigma, recipe.min_snr)
    losses = flow_matching_losses(*pair, base_channels=base_channels, detail_weight=weight, sample_weight=factor)
    logs: dict[str, Tensor | float] = {"base_loss": losses.base, "detail_loss": losses.detail, "detail_weight": weight}
    if not recipe.cosine_weight:
        return losses.total, logs
    cosine = cosine_loss(velocity, target)
    return losses.total + recipe.cosine_weight * cosine, {**logs, "cosine_loss": cosine.detach()}
