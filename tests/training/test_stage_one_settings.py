"""What a recipe says about the loss, and who changes in whose step."""

from pathlib import Path

import torch
from torch import Tensor, nn

from davae.data.sources import open_pictures
from davae.method.perceptual import LPIPS
from davae.method.stage_one_loss import StageOneSettings, stage_one_loss
from davae.pipelines.autoencoders import load_autoencoder
from davae.training.stage_one import make_discriminator
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights, loss_settings
from davae.training.state import TrainingState

ADVERSARIAL = LossWeights(l1=0.7, gradient=0.3, lpips=0.2, alignment=0.4, kl=1e-3, adversarial=0.1)


def test_the_recipe_decides_all_settings_of_the_loss() -> None:
    changes = {"kl_reduction": "sum", "lpips_patch": 64, "lpips_stride": 16, "adaptive_alignment": True}
    loss = ADVERSARIAL.model_copy(update=changes)
    recipe = AutoencoderRecipe(loss=loss, latent_noise=0.3, detail_dropout=0.1, inverted_dropout=True)
    assert loss_settings(recipe) == StageOneSettings(
        weights={"l1": 0.7, "gradient": 0.3, "lpips": 0.2, "kl": 1e-3, "alignment": 0.4, "adversarial": 0.1},
        adaptive=frozenset({"alignment"}),
        kl_reduction="sum",
        lpips_patch=64,
        lpips_stride=16,
        latent_noise=0.3,
        detail_dropout=0.1,
        inverted_dropout=True,
    )


def test_a_recipes_defaults_are_the_losss_own() -> None:
    ours, theirs = loss_settings(AutoencoderRecipe()), StageOneSettings()
    assert {name: weight for name, weight in ours.weights.items() if weight} == theirs.weights
    assert StageOneSettings(**{**vars(ours), "weights": theirs.weights}) == theirs


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_both_players_change_in_their_own_step_only(
    autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(autoencoder_folder)
    image = open_pictures(picture_folder, size=64, split="train").batch([0, 1])
    recipe = AutoencoderRecipe(loss=ADVERSARIAL)
    opponent = make_discriminator(recipe)
    models, parameters = {"a": autoencoder}, autoencoder.detail_parameters()
    state = TrainingState(recipe, tmp_path, models, parameters, companion=opponent)
    loss = stage_one_loss(autoencoder, image, LPIPS.alex(), loss_settings(recipe), discriminator=opponent.model)

    trained = {name for name, p in autoencoder.named_parameters() if p.requires_grad}
    ours, theirs = copies(autoencoder), copies(opponent.model)
    state.update(loss.total, loss.logs)
    assert changed(autoencoder, ours) == trained
    assert changed(opponent.model, theirs) == set()
    assert all(p.grad is None for p in opponent.model.parameters())

    ours = copies(autoencoder)
    opponent.update(loss.discriminator)
    assert changed(autoencoder, ours) == set()
    assert changed(opponent.model, theirs) == set(theirs)
    assert all(p.grad is None for p in autoencoder.parameters())
