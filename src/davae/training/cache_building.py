"""Stage 2's caches, made before the run."""

from pathlib import Path

from davae.errors import SettingsError
from davae.run.ranks import TIMEOUT, Ranks
from davae.training.inputs import cache_folder, training_inputs
from davae.training.stage_two import training_pictures, upgraded_base
from davae.training.stage_two_recipe import FinetuneRecipe


def build_caches(recipe: FinetuneRecipe, folder: Path, *, rank_timeout: float = TIMEOUT) -> Path:
    """Make all that a run of the recipe in `folder` would encode first; returns the caches' folder.

    Started as several processes, each makes its part, and waits for the others no longer than `rank_timeout` seconds.

    Raises:
        SettingsError: the recipe encodes at every step.
        DavaeError: whatever settings, data and storage raise.
    """
    if recipe.online:
        raise SettingsError("online = true: this recipe encodes at every step and keeps nothing; leave it out")
    ranks = Ranks(rank_timeout)
    pipeline = upgraded_base(recipe)
    pictures = training_pictures(recipe, pipeline.transformer, folder, ranks)
    training_inputs(recipe, pipeline, pictures, folder, ranks)
    return cache_folder(recipe, folder)
