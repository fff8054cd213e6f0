"""Pictures of a stage-2 run while it trains: the same prompts and noise, by raw and by EMA weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
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


def choose_prompts(recipe: FinetuneRecipe, transformer: ModelMixin, pictures: PictureSet) -> list[str]:
    """The recipe's validation prompts, or else the captions of the first four pictures; refuses class conditions."""
    if recipe.validation_every and backbone_of(transformer).classes:
        raise SettingsError(
            f"validation_every={recipe.validation_every}: pictures are drawn from captions, and a "
            f"{type(transformer).__name__} has classes. Leave it out"
        )
    return list(recipe.validation_prompts or pictures.captions[:4])


@torch.no_grad()
def draw_pictures(
    state: TrainingState, pipeline: DiffusionPipeline, recipe: FinetuneRecipe, prompts: Sequence[str], folder: Path
) -> None:
    """Write `folder`/pictures/STEP.png and show it to the trackers: raw weights above, EMA weights below.

    Training goes on as if no picture had been drawn: modes, devices and random state are restored.
    """
    # The frozen parts may rest on the CPU; they go back there.
    transformer = pipeline.transformer
    was_training = transformer.training
    places = {name: module.device for name, module in pipeline.components.items() if hasattr(module, "device")}
    pipeline.set_progress_bar_config(disable=True)
    move_frozen(pipeline, state.device)
    transformer.eval()

    rows = []
    with torch.random.fork_rng():
        for weights in (state.weights.evaluated, state.ema_weights):
            # Autocast keeps the weights that it has cast, so each set of weights needs a context of its own.
            with weights(), state.autocast():
                images = sample(
                    pipeline,
                    prompts,
                    seed=recipe.seed,
                    steps=recipe.validation_steps,
                    guidance_scale=recipe.validation_guidance_scale,
                    size=recipe.size,
                    prompt_tokens=recipe.prompt_tokens,
                )
            rows.append(images.cpu())

    transformer.train(was_training)
    for name, device in places.items():
        if name != "transformer":
            pipeline.components[name].to(device)

    # A column for each prompt.
    grid = rearrange(torch.stack(rows), "rows columns c h w -> c (rows h) (columns w)")
    path = folder / "pictures" / f"{state.step:08d}.png"
    state.ranks.on_first(lambda: write_png(path, grid))
    show_picture(state.trackers, "raw above, EMA below", grid, step=state.step)
