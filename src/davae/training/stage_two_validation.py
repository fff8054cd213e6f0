"""What a run of stage 2 shows while it trains: pictures of the same prompts and noise, by raw and by EMA weights."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from einops import rearrange

from davae.backbones import backbone_of
from davae.data.pictures import write_png
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.pipelines.sampling import sample
from davae.training.conditions import move_frozen
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.state import TrainingState
from davae.training.trackers import show_picture


class Validation:
    """Draws `folder`/pictures/STEP.png: a column for each prompt, raw weights above, EMA weights below.

    The prompts are the recipe's, or else the captions of the first four pictures.

    Args:
        recipe: says how often, from what and how.
        pipeline: the one in training.
        pictures: of the training.
        folder: of the run.

    Raises:
        SettingsError: validation of a pipeline that davae does not sample from by captions.
    """

    def __init__(self, recipe: FinetuneRecipe, pipeline: DiffusionPipeline, pictures: PictureSet, folder: Path) -> None:
        self._recipe, self._pipeline, self._folder = recipe, pipeline, folder
        self._prompts = list(recipe.validation_prompts or pictures.captions[:4])
        if recipe.validation_every and backbone_of(pipeline.transformer).classes:
            raise SettingsError(
                f"validation_every={recipe.validation_every}: pictures are drawn from captions, and a "
                f"{type(pipeline.transformer).__name__} has classes. Leave it out"
            )

    def is_due(self, step: int) -> bool:
        """Whether this step begins with pictures; step 0 does, if any."""
        return self._recipe.validation_every > 0 and step % self._recipe.validation_every == 0

    @torch.no_grad()
    def draw(self, state: TrainingState) -> None:
        """Write the pictures and show them to the trackers; training goes on as if there had been none."""
        pipeline, recipe, training = self._pipeline, self._recipe, self._pipeline.transformer.training
        pipeline.set_progress_bar_config(disable=True)
        places = {name: module.device for name, module in pipeline.components.items() if hasattr(module, "device")}
        move_frozen(pipeline, state.device)
        pipeline.transformer.eval()
        rows = []
        with torch.random.fork_rng():
            for weights in (state.weights.evaluated, state.ema_weights):
                with weights(), state.autocast():  # one for each: it keeps the weights that it has cast
                    made = sample(
                        pipeline,
                        self._prompts,
                        seed=recipe.seed,
                        steps=recipe.validation_steps,
                        guidance_scale=recipe.validation_guidance_scale,
                        size=recipe.size,
                        prompt_tokens=recipe.prompt_tokens,
                    )
                rows.append(made.cpu())
        pipeline.transformer.train(training)
        for name, place in places.items():
            if name != "transformer":
                pipeline.components[name].to(place)
        grid = rearrange(torch.stack(rows), "rows columns c h w -> c (rows h) (columns w)")
        path = self._folder / "pictures" / f"{state.step:08d}.png"
        state.ranks.on_first(lambda: write_png(path, grid))
        show_picture(state.trackers, "raw above, EMA below", grid, step=state.step)
