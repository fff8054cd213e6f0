"""Stage 1: the detail encoder and the joint decoder train beside a frozen base autoencoder."""

from collections.abc import Callable

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS
from davae.method.stage_one_loss import adversarial_ramp, stage_one_loss
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import decode_latents
from davae.run import faults
from davae.seeds import generator
from davae.training.companion import Companion
from davae.training.stage_one_recipe import AutoencoderRecipe, loss_settings
from davae.training.state import TrainingState

LoadCrops = Callable[[int], tuple[list[str], Tensor]]
"""Number of a batch -> the names of all images in it, and this rank's crops of them [B, 3, H, W] in [-1, 1]."""


def choose_trained(autoencoder: AutoencoderDA, recipe: AutoencoderRecipe) -> list[nn.Parameter]:
    """Training mode for what the recipe trains, whose parameters are returned; the rest is frozen."""
    autoencoder.train()
    frozen: list[nn.Module | None] = []
    if recipe.frozen_trunk or recipe.decoder_only:
        frozen += [autoencoder.detail_encoder, autoencoder.detail_quant_conv]
    if recipe.decoder_only:
        frozen += [autoencoder.detail_downsample, autoencoder.detail_from_base]

    # In evaluation mode a frozen module keeps the statistics of its norms, too.
    for module in frozen:
        if module is not None:
            module.requires_grad_(False).eval()
    return autoencoder.detail_parameters()


def make_discriminator(recipe: AutoencoderRecipe) -> Companion | None:
    """The PatchGAN and its optimiser, if the adversarial term has a weight."""
    if not recipe.loss.adversarial:
        return None
    own = {"optimizer": "AdamW", "learning_rate": recipe.loss.discriminator_learning_rate}
    model = PatchDiscriminator(generator(recipe.seed, "discriminator"))
    return Companion("discriminator", model, recipe.model_copy(update=own))


@torch.no_grad()
def base_reconstruction(autoencoder: AutoencoderDA, base_vae: ModelMixin, image: Tensor) -> Tensor:
    """The base autoencoder's reconstruction of images [B, 3, H, W] at full size: its mode decoded, within [-1, 1]."""
    latents = autoencoder.from_units(autoencoder.encode_pretrained(image))
    return decode_latents(base_vae, latents).clamp(-1, 1)


def train_networks(
    autoencoder: AutoencoderDA,
    recipe: AutoencoderRecipe,
    state: TrainingState,
    load: LoadCrops,
    evaluate: Callable[[], object],
    *,
    lpips: LPIPS,
    base_vae: ModelMixin | None,
    discriminator: Companion | None,
) -> None:
    """Take the steps that are left. With `base_vae` its reconstruction is the target instead of the image."""
    settings, weights = loss_settings(recipe), recipe.loss

    for step in state.steps():
        if step % recipe.evaluate_every == 0:
            with state.ema_weights():
                evaluate()

        # The discriminator plays from its first step on; from there its part of the loss rises to its weight.
        opponent = discriminator if step >= weights.adversarial_start else None
        ramp = adversarial_ramp(step, start=weights.adversarial_start, ramp_steps=weights.adversarial_ramp_steps)

        for number in state.batches():
            # Crops, and what their reconstructions are compared with.
            names, crops = load(number)
            image = faults.at("data", crops.to(state.device))
            target = image if base_vae is None else base_reconstruction(autoencoder, base_vae, image)

            # L_rec + lambda_align L_align (Sec. 3.1): encode, decode, compare; noise depends on a sample's number only.
            loss = stage_one_loss(
                autoencoder,
                faults.at("encode", image),
                lpips,
                settings,
                target=target,
                discriminator=None if opponent is None else opponent.model,
                ramp=ramp,
                seed=recipe.seed,
                samples=state.ranks.sample_numbers(number, len(image)),
                autocast=state.autocast(),
                gather=state.ranks.gather,
                average_=state.ranks.average_,
            )

            # The autoencoder and the discriminator each take a step of their own.
            state.update(faults.at("forward", loss.total), loss.logs, samples=names)
            if opponent is not None:
                opponent.update(loss.discriminator)
