"""Train the small base pipeline's autoencoder at 128 px (the first of the pair's two commands).

    python recipes/small_pair/train_base_autoencoder.py RUN --out AUTOENCODER

First all of it, then, with the encoder frozen, the decoder alone with a perceptual loss and noise on its latents, so
that it forgives a transformer's small errors. `--start OLD` takes the encoder and decoder of OLD and does the second
phase only. RUN holds checkpoints and metrics; the same command resumes. About an hour on one CPU core.
"""

import copy
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from torch import Tensor, nn

from davae import assets
from davae.data.order import random_crops
from davae.data.sources import PictureSet, open_pictures
from davae.method.losses import gradient_l1, kl_loss_mean, reconstruction_l1
from davae.method.metrics import psnr
from davae.method.perceptual import LPIPS
from davae.seeds import generator
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState


class BaseAutoencoderRecipe(OptimisationRecipe):
    """Everything that decides the run."""

    channels: tuple[int, ...] = (16, 32, 64, 128)
    latent_channels: int = 16
    steps: int = 5500
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    precision: Literal["auto", "float32", "bf16"] = "bf16"
    decoder_steps: int = 2000
    decoder_learning_rate: float = 6e-4
    batch_size: int = 8
    crop: int = 64
    full_size_share: float = 0.3
    """Of the steps that see crops of the 256 px pictures; the others see the pictures at 128 px."""
    gradient_weight: float = 0.5
    kl_weight: float = 5e-5
    squared_weight: float = 2.0
    """Of the mean squared error, in the decoder's steps only."""
    lpips_weight: float = 0.1
    """In the decoder's steps only."""
    latent_noise: float = 0.3
    """In the decoder's steps only: each picture's latents get noise of deviation |N(0, 1)| times this, in units."""


def build_autoencoder(recipe: BaseAutoencoderRecipe) -> AutoencoderKL:
    """An f8 AutoencoderKL whose posterior starts narrow, log-variance -5."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(recipe.channels),
        up_block_types=("UpDecoderBlock2D",) * len(recipe.channels),
        block_out_channels=recipe.channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        force_upcast=False,
    )

    nn.init.zeros_(vae.encoder.conv_out.weight[recipe.latent_channels :])
    nn.init.constant_(vae.encoder.conv_out.bias[recipe.latent_channels :], -5.0)
    return vae.to(memory_format=torch.channels_last)


def reduce_to_half(pictures: PictureSet) -> Tensor:
    """All pictures at 128 px, uint8 [N, 3, 128, 128]."""
    small = []
    for indices in torch.arange(len(pictures)).split(64):
        batch = F.interpolate(pictures.batch(indices.tolist()), size=128, mode="bicubic", antialias=True)
        small.append(((batch.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(small)


@torch.no_grad()
def heldout_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB of uint8 pictures through the autoencoder, by the posterior's mode."""
    values = [
        psnr(vae(batch.float() / 127.5 - 1).sample.clamp(-1, 1), batch.float() / 127.5 - 1)
        for batch in pictures.split(16)
    ]
    return torch.cat(values).mean().item()


def train(recipe: BaseAutoencoderRecipe, vae: AutoencoderKL, folder: Path, *, decoder_only: bool) -> None:
    """One of the two phases; leaves the EMA's weights in `vae`."""
    train_set = open_pictures(assets.pictures(), size=256, split="train")
    heldout = reduce_to_half(open_pictures(assets.pictures(), size=256, split="heldout", limit=64))
    small = reduce_to_half(train_set)

    # The parameters and the schedule of this phase.
    vae.requires_grad_(True).encoder.requires_grad_(not decoder_only)
    lpips = LPIPS.alex()
    peak = recipe.decoder_learning_rate if decoder_only else recipe.learning_rate
    steps = recipe.decoder_steps if decoder_only else recipe.steps
    schedule = {"steps": steps, "learning_rate": peak, "final_learning_rate": 0.02 * peak}
    state = TrainingState(
        recipe.model_copy(update=schedule),
        folder,
        {"vae": vae},
        [parameter for parameter in vae.parameters() if parameter.requires_grad],
        label="base decoder" if decoder_only else "base autoencoder",
    )

    for step in state.steps():
        if step % 500 == 0:
            with state.ema_weights():
                state.log({"heldout_psnr": heldout_psnr(vae, heldout)})

        # A batch: crops of images at 256 px, or of images at 128 px.
        random = generator(recipe.seed, state.label, step)
        full = torch.rand((), generator=random).item() < recipe.full_size_share
        indices = torch.randint(len(small), (recipe.batch_size,), generator=random)
        batch = train_set.batch(indices.tolist()) if full else small[indices].float() / 127.5 - 1
        image = random_crops(batch, recipe.crop, seed=recipe.seed, step=step)
        if torch.rand((), generator=random).item() < 0.5:
            image = image.flip(3)
        image = image.to(memory_format=torch.channels_last)

        # Encode, add noise, decode.
        with state.autocast():
            posterior = vae.encode(image).latent_dist
            spread = posterior.std
            if decoder_only:
                level = torch.randn(len(image), 1, 1, 1, generator=random).abs() * recipe.latent_noise
                spread = (spread.square() + (level / vae.config.scaling_factor).square()).sqrt()
            noise = torch.randn(posterior.mean.shape, generator=random)
            made = vae.decode(posterior.mean + spread * noise).sample
            distance = lpips(made, image).mean() if decoder_only else image.new_zeros(())

        squared = (made.float() - image).square().mean() if decoder_only else image.new_zeros(())
        parts = {
            "l1": reconstruction_l1(made, image),
            "gradient": recipe.gradient_weight * gradient_l1(made, image),
            "kl": recipe.kl_weight * kl_loss_mean(posterior.mean, posterior.logvar),
            "lpips": recipe.lpips_weight * distance,
            "squared": recipe.squared_weight * squared,
        }
        state.update(torch.stack(list(parts.values())).sum(), parts)
    with state.ema_weights():
        averaged = copy.deepcopy(vae.state_dict())
    vae.load_state_dict(averaged)


@torch.no_grad()
def set_scalars(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder whose config brings its latents of the training pictures to mean 0 and deviation 1."""
    pictures = reduce_to_half(open_pictures(assets.pictures(), size=256, split="train", limit=800))
    latents = torch.cat([vae.encode(b.float() / 127.5 - 1).latent_dist.mode() for b in pictures.split(32)]).double()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return vae


def main(
    run: Path,
    out: Annotated[Path, typer.Option()],
    start: Annotated[
        Path | None, typer.Option(help="An autoencoder of this script whose decoder to train again.")
    ] = None,
) -> None:
    """Train both phases, or the second, then write the autoencoder in half precision."""
    recipe = BaseAutoencoderRecipe()
    if start:
        vae = AutoencoderKL.from_pretrained(start).to(memory_format=torch.channels_last)
    else:
        vae = build_autoencoder(recipe)
        train(recipe, vae, run / "all", decoder_only=False)
        vae = set_scalars(vae)
    train(recipe, vae, run / "decoder", decoder_only=True)
    vae.eval().half().save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
