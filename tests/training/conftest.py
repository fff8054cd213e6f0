"""Runs of stage 2 on the tiny pair that several files look at."""

from pathlib import Path

import pytest

from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune

Run = tuple[Path, FinetuneRecipe]


@pytest.fixture(scope="session")
def long_recipe(base_folder: Path, autoencoder_folder: Path, picture_folder: Path) -> FinetuneRecipe:
    return FinetuneRecipe(
        base=str(base_folder),
        autoencoder=str(autoencoder_folder),
        pictures=str(picture_folder),
        size=64,
        lora_rank=2,
        lora_alpha=4.0,
        steps=61,
        batch_size=6,
        learning_rate=1e-2,
        warmup_steps=2,
        detail_warmup_steps=20,
        prompt_tokens=8,
        ema_decay=0.8,
        precision="float32",
        checkpoint_every=30,
    )


@pytest.fixture(scope="session")
def lora(long_recipe: FinetuneRecipe, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("lora")
    assert finetune(long_recipe, folder) == folder / "pipeline"
    return folder, long_recipe


@pytest.fixture(scope="session")
def full(long_recipe: FinetuneRecipe, tmp_path_factory) -> Run:
    folder, chosen = tmp_path_factory.mktemp("full"), long_recipe.model_copy(update={"trained": "full"})
    assert finetune(chosen, folder) == folder / "pipeline"
    return folder, chosen


@pytest.fixture(scope="session")
def layers(long_recipe: FinetuneRecipe, tmp_path_factory) -> Run:
    chosen = long_recipe.model_copy(update={"trained": "layers", "lora_targets": ("to_q", "to_v")})
    folder = tmp_path_factory.mktemp("layers")
    assert finetune(chosen, folder) == folder / "pipeline"
    return folder, chosen
