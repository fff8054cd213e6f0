"""How much the demo does, and the recipes of its two stages."""

from dataclasses import dataclass
from pathlib import Path

from davae.demo.prompts import SAMPLING, SIZE
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_two_recipe import FinetuneRecipe

TRAINED_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
"""The image stream's own weights."""
AVATARS_PER_SEED = 1_000_000
"""Distance of the avatars of two seeds, and of the first seed from those that the shipped pair was trained on."""


@dataclass(frozen=True)
class Plan:
    """How much the demo does."""

    images: int
    """For training."""
    stage_one_steps: int
    """0: stage 2 trains on the shipped upgrade's autoencoder."""
    stage_two_steps: int
    heldout: int
    """Held-out images: all are generated from their captions, and reconstructed."""
    shown: int
    """Prompts in the figure."""
    repeats: int
    """Of each timing."""
    sampling_steps: int = SAMPLING["steps"]


PLANS = {
    "tiny": Plan(images=32, stage_one_steps=4, stage_two_steps=4, heldout=8, shown=2, repeats=2, sampling_steps=4),
    "short": Plan(images=1024, stage_one_steps=0, stage_two_steps=1200, heldout=64, shown=8, repeats=3),
    "both": Plan(images=1024, stage_one_steps=200, stage_two_steps=600, heldout=64, shown=8, repeats=3),
}


def stage_one_recipe(plan: Plan, seed: int, images: Path, base: Path) -> AutoencoderRecipe:
    """The demo's stage 1: the closed-form start, with detail latents for the base's residual, and a short training.

    Reconstruction falls at first and passes the start after some 500 steps; what 200 steps teach the decoder is to bear
    noise on the latents, without which generated images are mottled (experiments/LOG.md).
    """
    loss = LossWeights(gradient=0.5, lpips=0.15, kl=1e-5, alignment=0.02)

    return AutoencoderRecipe(
        base=str(base),
        pictures=str(images),
        code="residual",
        steps=plan.stage_one_steps,
        size=SIZE,
        crop=128,
        batch_size=4,
        learning_rate=6e-4,
        warmup_steps=plan.stage_one_steps // 4,
        detail_dropout=0.1,
        latent_noise=0.3,
        fit_pictures=64,
        calibration_pictures=256,
        evaluate_every=100,
        heldout_pictures=min(32, plan.heldout),
        checkpoint_every=50,
        ema_decay=0.99,
        seed=seed,
        loss=loss,
    )


def stage_two_recipe(plan: Plan, seed: int, images: Path, base: Path, autoencoder: Path) -> FinetuneRecipe:
    """The demo's stage 2: the weights of the image stream and both ports."""
    # The detail part of the loss is faded in over the first eighth.
    detail_warmup_steps = max(1, plan.stage_two_steps // 8)

    return FinetuneRecipe(
        base=str(base),
        pictures=str(images),
        autoencoder=str(autoencoder),
        trained="layers",
        lora_targets=TRAINED_LAYERS,
        steps=plan.stage_two_steps,
        size=SIZE,
        learning_rate=3e-3,
        final_learning_rate=5e-6,
        warmup_steps=min(20, plan.stage_two_steps),
        betas=(0.9, 0.99),
        detail_warmup_steps=detail_warmup_steps,
        batch_size=16,
        prompt_tokens=SAMPLING["prompt_tokens"],
        checkpoint_every=50,
        ema_decay=0.99,
        seed=seed,
    )
