"""Stage 1 on the base autoencoders of other pipelines: from a base's folder to an autoencoder that is calibrated."""

from pathlib import Path

import pytest
import torch

import tiny_pipelines
from davae.models.base_autoencoders import decode_latents
from davae.pipelines.autoencoders import load_autoencoder
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder

BUILDERS = {
    "dc": lambda: tiny_pipelines.sana().vae,
    "qwen": lambda: tiny_pipelines.qwen_image().vae,
    "flux2": lambda: tiny_pipelines.flux2().vae,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_stage_1_starts_in_closed_form_and_lowers_its_loss(name: str, picture_folder: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        base = BUILDERS[name]()
    base.save_pretrained(tmp_path / "base")
    recipe = AutoencoderRecipe(
        base=str(tmp_path / "base"),
        pictures=str(picture_folder),
        size=64,
        crop=32,
        detail_channels=tiny_pipelines.CHANNELS,
        fit_pictures=6,
        loss=LossWeights(lpips=0.0),
        steps=2,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=0,
        ema_decay=0.0,
        precision="float32",
        evaluate_every=2,
        heldout_pictures=1,
        calibration_pictures=12,
        target="base reconstruction",
    )
    autoencoder = load_autoencoder(train_autoencoder(recipe, tmp_path / "run"))
    frozen = base.state_dict()
    for key, tensor in autoencoder.base_encoder.state_dict().items():
        assert torch.equal(tensor, frozen[f"encoder.{key}"])
    assert autoencoder.detail_std.min() > 0
    assert not torch.equal(autoencoder.detail_std, torch.ones_like(autoencoder.detail_std))
    trained = autoencoder.joint_decoder.state_dict()
    assert any(not torch.equal(tensor, frozen[f"decoder.{key}"]) for key, tensor in trained.items())
    assert decode_latents(base, torch.zeros(1, tiny_pipelines.CHANNELS, 4, 4)).shape == (1, 3, 16, 16)
