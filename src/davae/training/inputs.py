"""What stage 2 gives the transformer beside noise and time: latents and conditions, from a cache or encoded anew."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from davae.backbones import backbone_of
from davae.data.sources import PictureSet
from davae.run.ranks import Ranks
from davae.training.conditions import (
    ClassConditions,
    Conditions,
    OnlineConditions,
    cached_conditions,
    move_frozen,
)
from davae.training.latents import CachedLatents, OnlineLatents, cached_latents
from davae.training.stage_two_recipe import FinetuneRecipe


def cache_folder(recipe: FinetuneRecipe, folder: Path) -> Path:
    """Where the caches of a run in `folder` are."""
    return Path(recipe.cache) if recipe.cache else folder / "cache"


def training_inputs(
    recipe: FinetuneRecipe, pipeline: DiffusionPipeline, pictures: PictureSet, folder: Path, ranks: Ranks
) -> tuple[CachedLatents | OnlineLatents, Conditions]:
    """Latents and conditions of the pictures; if they are cached, what the cache lacks is made by all processes first.

    Args:
        recipe: of the run.
        pipeline: upgraded; its frozen parts encode on the ranks' device, and stay there only if every step needs them.
        pictures: with captions or classes, as the backbone wants.
        folder: of the run.
        ranks: of the run.
    """
    backbone, autoencoder = backbone_of(pipeline.transformer), pipeline.vae
    move_frozen(pipeline, ranks.device)
    noise, seed = recipe.detail_noise, recipe.seed
    if recipe.online:
        latents = OnlineLatents(autoencoder, pictures, flips=recipe.flips, detail_noise=noise, seed=seed, ranks=ranks)
        if backbone.classes:
            return latents, ClassConditions(pipeline, backbone, pictures)
        return latents, OnlineConditions(pipeline, backbone, pictures, recipe.prompt_tokens)
    caches = cache_folder(recipe, folder)
    kept = cached_latents(autoencoder, pictures, caches, detail_noise=noise, seed=seed, ranks=ranks)
    if backbone.classes:
        conditions: Conditions = ClassConditions(pipeline, backbone, pictures)
    else:
        conditions = cached_conditions(pipeline, backbone, pictures, caches, tokens=recipe.prompt_tokens, ranks=ranks)
    move_frozen(pipeline, torch.device("cpu"))
    return kept, conditions
