"""One file for the whole job: both stages' recipes, and what is made and measured with the result."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from davae.errors import SettingsError
from davae.run.recipe import SECTIONS, SHARED, Recipe, load_recipe, read_toml
from davae.training.recipes import NotNegative, Positive, Weight
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe

logger = logging.getLogger(__name__)

# Where the job's stages leave their results, below the job's folder: as the verbs of both stages do by default.
STAGE_ONE, STAGE_TWO = "autoencoder", "finetune"


class ResultsRecipe(Recipe):
    """What is made and measured with the upgraded pipeline; base, images, size and seed are the stages'."""

    section: ClassVar[str] = "results"

    base: str = ""
    pictures: str = ""
    limit: Positive | None = None
    size: Positive = 256
    seed: NotNegative = 0
    prompts: tuple[str, ...] = ()
    """Prompts of images that are made beside those from the captions of real images."""
    count: Annotated[int, Field(ge=4)] = 16
    """Images from captions, for the page and for KID."""
    steps: Positive = 28
    """Sampling steps."""
    guidance_scale: Weight = 4.0


@dataclass(frozen=True)
class JobRecipe:
    """The three parts of a job's file."""

    stage_one: AutoencoderRecipe
    stage_two: FinetuneRecipe
    results: ResultsRecipe

    @cached_property
    def digests(self) -> dict[str, str]:
        """A digest of each part, with its places, but without what may change at any time and where the job lies."""
        digests = {}
        for name, recipe in (("stage 1", self.stage_one), ("stage 2", self.stage_two), ("results", self.results)):
            own = {"autoencoder"} if recipe is self.stage_two else set()
            values = recipe.model_dump(mode="json", exclude={*recipe.free_to_change, *own})
            digests[name] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return digests


def load_job(path: Path, folder: Path, overrides: Mapping[str, Any] | None = None) -> JobRecipe:
    """The job in the TOML file `path`, for a run in `folder`, whose autoencoder is the one that stage 2 trains on.

    `overrides` name a section and a key of it, such as "finetune.steps", or a key that stands above the sections.
    """
    values = read_toml(path)
    missing = [name for name in SECTIONS[:2] if not isinstance(values.get(name), dict)]
    if missing:
        raise SettingsError(
            f"recipe {path} has no section [{missing[0]}], and davae run goes through both stages. Write one with "
            "davae init, or take one of davae recipes; for one stage alone, davae train-autoencoder or davae finetune"
        )

    # A key with a section's name in front belongs to it; those above the sections belong to all.
    changes: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in (overrides or {}).items():
        section, _, inner = key.partition(".")
        if section in changes and inner:
            changes[section][inner] = value
        elif key in SHARED:
            for own in changes.values():
                own[key] = value
        else:
            raise SettingsError(f"--set {key}: give [SECTION.]KEY, such as finetune.steps, or {', '.join(SHARED)}")

    stage_one = load_recipe(AutoencoderRecipe, path, changes["autoencoder"])
    stage_two = load_recipe(FinetuneRecipe, path, changes["finetune"])
    return JobRecipe(stage_one, _on_own_latents(stage_two, folder), _load_results(path, stage_two, changes["results"]))


def _on_own_latents(recipe: FinetuneRecipe, folder: Path) -> FinetuneRecipe:
    """The recipe of stage 2 with the autoencoder of this job."""
    own = str(folder / STAGE_ONE / "autoencoder")
    if recipe.autoencoder not in ("", own):
        logger.warning("stage 2 trains on this job's autoencoder, %s, not on %s", own, recipe.autoencoder)
    return recipe.model_copy(update={"autoencoder": own})


def _load_results(path: Path, stage_two: FinetuneRecipe, changes: Mapping[str, Any]) -> ResultsRecipe:
    """The section [results], or without one the images as stage 2 draws them."""
    if ResultsRecipe.section in read_toml(path):
        return load_recipe(ResultsRecipe, path, changes)
    shared = {name: getattr(stage_two, name) for name in SHARED}
    sampling = {"steps": stage_two.validation_steps, "guidance_scale": stage_two.validation_guidance_scale}
    values = {**shared, **sampling, "prompts": stage_two.validation_prompts, **changes}
    return ResultsRecipe.model_validate(values)
