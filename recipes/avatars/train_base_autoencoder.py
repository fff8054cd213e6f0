"""Train the base pipeline's autoencoder at 128 px (the second of the pair's commands, after draw.py).

    python recipes/avatars/train_base_autoencoder.py IMAGES RUN --out AUTOENCODER

IMAGES is draw.py's folder. The first phase trains encoder and decoder, and fixes the latents. AUTOENCODER is written
after it, so that the transformer's training can begin.

    python recipes/avatars/train_base_autoencoder.py IMAGES RUN --out AUTOENCODER --decoder

is the second phase: it trains the decoder alone, on noisy latents, so that it forgives a transformer's small errors.
RUN holds checkpoints and metrics.jsonl of both phases; either command goes on where it stopped.
"""

import copy
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from drawn_images import DrawnImages
from torch import Tensor, nn

from davae.data.order import random_crops
from davae.data.pictures import to_floats
from davae.method.losses import gradient_l1, kl_loss_mean, reconstruction_l1
from davae.method.metrics import psnr
from davae.method.perceptual import LPIPS
from davae.run.recipe import load_recipe
from davae.seeds import generator
from davae.training.devices import keep_stream_in_float32
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState


class BaseAutoencoderRecipe(OptimisationRecipe):
    """Everything that decides the run."""

    size: int = 128
    """Side of the base's images: half that of the drawn ones."""
    channels: tuple[int, ...] = (32, 64, 96, 128)
    latent_channels: int = 16
    images: int = 6144
    """Of the training set, from its beginning."""
    steps: int = 4500
    learning_rate: float = 1.5e-3
    decoder_steps: int = 3000
    decoder_learning_rate: float = 6e-4
    """Both learning rates fall to a fiftieth on a half cosine."""
    warmup_steps: int = 100
    weight_decay: float = 0.01
    precision: Literal["auto", "float32", "bf16"] = "bf16"
    batch_size: int = 8
    """Crops in a step; a step of whole images has as many pixels."""
    crop: int = 64
    whole_share: float = 0.3
    """Of the steps that see whole images at 128 px, with their borders."""
    full_size_share: float = 0.15
    """Of the steps that see crops of the 256 px images. All others see crops of the images at 128 px."""
    l1_weight: float = 1.0
    gradient_weight: float = 0.5
    squared_weight: float = 2.0
    lpips_weight: float = 0.1
    kl_weight: float = 5e-5
    color_weight: float = 1.0
    """Of the L1 between images averaged over 8 x 8 pixels."""
    chroma_weight: float = 0.0
    """Of the L1 between images less the mean of their channels: thin colored lines on black lose their color else."""
    head_weight: float = 10.0
    """In the first phase: of the squared error of the averaged image that a linear head reads off the latents. Without
    it, one axis of colour may be lost for good: a decoder that ignores it gives the encoder no reason to tell it."""
    permuted_share: float = 0.3
    """Of the steps whose images have their colour channels permuted, so that every colour comes with every shape."""
    latent_noise: float = 0.3
    """In the second phase: each image's latents get noise of deviation |N(0, 1)| times this, in units."""
    evaluate_every: int = 500
    checkpoint_every: int = 500


def untrained(recipe: BaseAutoencoderRecipe) -> AutoencoderKL:
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
        sample_size=recipe.size,
        force_upcast=False,
    )
    nn.init.zeros_(vae.encoder.conv_out.weight[recipe.latent_channels :])
    nn.init.constant_(vae.encoder.conv_out.bias[recipe.latent_channels :], -5.0)
    return vae


def training_batch(recipe: BaseAutoencoderRecipe, images: DrawnImages, small: Tensor, step: int, label: str) -> Tensor:
    """The images of one step: crops at 128 px, whole images at 128 px, or crops at 256 px."""
    random = generator(recipe.seed, label, step)
    kind = torch.rand((), generator=random).item()
    whole = kind < recipe.whole_share
    full_size = not whole and kind < recipe.whole_share + recipe.full_size_share

    count = recipe.batch_size
    if whole:
        count = max(1, round(recipe.batch_size * (recipe.crop / small.shape[-1]) ** 2))
    indices = torch.randint(len(small), (count,), generator=random)

    batch = images.batch(indices.tolist()) if full_size else to_floats(small[indices])
    if not whole:
        samples = range(step * recipe.batch_size, step * recipe.batch_size + count)
        batch = random_crops(batch, recipe.crop, seed=recipe.seed, samples=samples)
    if torch.rand((), generator=random).item() < 0.5:
        batch = batch.flip(3)
    if torch.rand((), generator=random).item() < recipe.permuted_share:
        batch = batch[:, torch.randperm(3, generator=random)]
    return batch.contiguous(memory_format=torch.channels_last)


def patch_means(image: Tensor) -> Tensor:
    """The image averaged over 8 x 8 pixels, the patch of one latent."""
    return F.avg_pool2d(image, 8)


def color_l1(made: Tensor, image: Tensor) -> Tensor:
    """The L1 between averaged images, [B]: how far the colours of areas are off."""
    return (patch_means(made) - patch_means(image)).abs().mean(dim=(1, 2, 3))


def chroma_l1(made: Tensor, image: Tensor) -> Tensor:
    """The L1 between images less the mean of their channels, [B]: how far the saturation of pixels is off."""
    difference = made - image
    return (difference - difference.mean(dim=1, keepdim=True)).abs().mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(vae: AutoencoderKL, pictures: Tensor, lpips: LPIPS) -> dict[str, float]:
    """Mean PSNR in dB, LPIPS and colour error of held-out uint8 images through the autoencoder, by the mode."""
    values = []
    for part in pictures.split(16):
        image = to_floats(part)
        made = vae(image).sample.clamp(-1, 1)
        values.append(torch.stack([psnr(made, image), lpips(made, image).flatten(), color_l1(made, image)]))
    quality, distance, color = torch.cat(values, dim=1).mean(dim=1).tolist()
    return {"held_out_psnr": quality, "held_out_lpips": distance, "held_out_color": color}


def train(recipe: BaseAutoencoderRecipe, vae: AutoencoderKL, images: Path, folder: Path, *, decoder_only: bool) -> None:
    """One of the two phases; leaves the EMA's weights in `vae`."""
    training = DrawnImages(images, limit=recipe.images)
    small = training.half_size()
    held_out = DrawnImages(images, held_out=True, limit=128).half_size()
    lpips = LPIPS.alex()

    keep_stream_in_float32(vae)
    vae.to(memory_format=torch.channels_last).requires_grad_(True)
    vae.encoder.requires_grad_(not decoder_only)
    torch.manual_seed(recipe.seed)
    head = nn.Conv2d(recipe.latent_channels, 3, 1)
    steps = recipe.decoder_steps if decoder_only else recipe.steps
    peak = recipe.decoder_learning_rate if decoder_only else recipe.learning_rate
    trained = [vae] if decoder_only else [vae, head]
    schedule = {"steps": steps, "learning_rate": peak, "final_learning_rate": 0.02 * peak}
    state = TrainingState(
        recipe.model_copy(update=schedule),
        folder,
        {"vae": vae} if decoder_only else {"vae": vae, "head": head},
        [parameter for module in trained for parameter in module.parameters() if parameter.requires_grad],
        label="base decoder" if decoder_only else "base autoencoder",
    )

    for step in state.steps():
        if step % recipe.evaluate_every == 0:
            with state.ema_weights():
                state.log(evaluate(vae, held_out, lpips))

        image = training_batch(recipe, training, small, step, state.label)

        # Encode, and draw latents from the posterior; in the second phase from a wider one.
        with state.autocast():
            posterior = vae.encode(image).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        random = generator(recipe.seed, "latent noise", step)
        variance = logvar.exp()
        if decoder_only:
            level = torch.randn(len(image), 1, 1, 1, generator=random).abs() * recipe.latent_noise
            variance = variance + (level / vae.config.scaling_factor).square()
        latents = mean + variance.sqrt() * torch.randn(mean.shape, generator=random)

        # Decode, and compare.
        with state.autocast():
            made = vae.decode(latents).sample
            distance = lpips(made, image).mean()
        made = made.float()
        parts = {
            "l1": recipe.l1_weight * reconstruction_l1(made, image),
            "gradient": recipe.gradient_weight * gradient_l1(made, image),
            "squared": recipe.squared_weight * (made - image).square().mean(),
            "lpips": recipe.lpips_weight * distance,
            "color": recipe.color_weight * color_l1(made, image).mean(),
            "chroma": recipe.chroma_weight * chroma_l1(made, image).mean(),
            "kl": recipe.kl_weight * kl_loss_mean(mean, logvar),
        }
        if not decoder_only:
            parts["head"] = recipe.head_weight * F.mse_loss(head(mean), patch_means(image))
        state.update(torch.stack(list(parts.values())).sum(), parts)

    with state.ema_weights():
        averaged = copy.deepcopy(vae.state_dict())
    vae.load_state_dict(averaged)
    state.log(evaluate(vae, held_out, lpips))


@torch.no_grad()
def set_scalars(vae: AutoencoderKL, images: DrawnImages) -> None:
    """Write the shift and scale into the config that bring latents of training images to mean 0 and deviation 1."""
    latents = [vae.encode(to_floats(part)).latent_dist.mode() for part in images.half_size().split(32)]
    numbers = torch.cat(latents).double()
    shift, scale = numbers.mean().item(), 1 / numbers.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))


def main(
    images: Annotated[Path, typer.Argument(help="The folder that draw.py wrote.")],
    run: Annotated[Path, typer.Argument(help="The folder for checkpoints and metrics.")],
    out: Annotated[Path, typer.Option(help="The folder for the autoencoder.")],
    decoder: Annotated[bool, typer.Option("--decoder", help="Train the decoder of OUT alone.")] = False,
    start: Annotated[Path | None, typer.Option(help="An autoencoder to start the first phase from.")] = None,
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="Settings other than the defaults.")] = None,
) -> None:
    """Train one phase, then write the autoencoder."""
    recipe = load_recipe(BaseAutoencoderRecipe, recipe_file) if recipe_file else BaseAutoencoderRecipe()
    if decoder:
        vae = AutoencoderKL.from_pretrained(out / "all")
        train(recipe, vae, images, run / "decoder", decoder_only=True)
        vae.eval().save_pretrained(out / "decoder")
        return

    vae = AutoencoderKL.from_pretrained(start) if start else untrained(recipe)
    train(recipe, vae, images, run / "all", decoder_only=False)
    set_scalars(vae, DrawnImages(images, limit=min(1024, recipe.images)))
    assert math.isfinite(vae.config.scaling_factor)
    vae.eval().save_pretrained(out / "all")


if __name__ == "__main__":
    typer.run(main)
