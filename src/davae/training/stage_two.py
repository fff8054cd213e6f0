"""Stage 2: the widened transformer learns the detail latents, whose part of the loss is faded in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from davae.data.buckets import Bucket
from davae.method.flow import detail_weight
from davae.run import faults
from davae.seeds import rand, randn
from davae.training.devices import attention_on
from davae.training.stage_two_loss import Objective, choose_objective
from davae.training.stage_two_recipe import FinetuneRecipe, flow_settings
from davae.training.state import TrainingState


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
