"""Stage 1: train the detail encoder and the joint decoder beside a frozen base autoencoder."""

import logging
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from davae import assets
from davae.autoencoder_da import AutoencoderDA
from davae.closed_form import BASE_CODES, Code, fit_closed_form
from davae.data.order import batch_indices, random_crops
from davae.data.png import to_bytes, write_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import NumericsError, SettingsError
from davae.losses import detail_alignment_loss, gradient_l1, kl_loss_mean, kl_loss_sum, reconstruction_l1
from davae.metrics import psnr, ssim
from davae.perceptual import LPIPS, MIN_SIDE
from davae.recipe import Recipe
from davae.seeds import generator
from davae.storage import replaced_whole, write_atomically
from davae.training.optimisation import OptimisationRecipe, Positive, Weight
from davae.training.state import TrainingState
from davae.upgrade import load_autoencoder, load_base_vae

logger = logging.getLogger(__name__)

KL_LOSSES = {"mean": kl_loss_mean, "sum": kl_loss_sum}


class LossWeights(Recipe):
    """Weights of stage 1's loss (METHOD section 4, Table S1)."""

    l1: Weight = 1.0
    gradient: Weight = 0.0
    """Of the L1 between finite differences; not in the paper."""
    lpips: Weight = 1.0
    kl: Weight = 1e-6
    kl_reduction: Literal["mean", "sum"] = "mean"
    """"mean" over elements without 1/2 (the ImageNet set-up), or "sum" with 1/2, averaged over the batch (SD3)."""
    alignment: Weight = 0.5


class AutoencoderRecipe(OptimisationRecipe):
    """Everything that decides a run of stage 1."""

    base: str = ""
    """Folder or Hub name of the base pipeline; "" is the shipped one."""
    pictures: str = ""
    """Folder of captioned pictures or shards; "" is the shipped set."""
    limit: Positive | None = None
    """At most so many of them, evenly spread."""
    size: Positive = 256
    """Side of the pictures in pixels: twice what the base was made for."""
    detail_channels: Positive = 16
    base_downsample: Literal["bicubic", "bicubic-antialias"] = "bicubic-antialias"
    start: Literal["closed form", "random"] = "closed form"
    """Of the two new blocks: least squares in the decoder's metric (METHOD section 10), or random as in the paper."""
    code: Code = "aligned"
    """Of the closed-form start: what the detail latents are at first, see `davae.closed_form.Code`."""
    fit_pictures: Positive = 128
    """How many pictures the closed-form start is fitted on."""
    crop: Positive = 128
    """Side of the training crops in pixels."""
    batch_size: Positive = 8
    latent_noise: Weight = 0.0
    """Noise on what the joint decoder reads, so that it forgives a transformer's small errors: of deviation |N(0, 1)|
    times this for each picture, in each latent channel's own deviations. Not in the paper; RAE, arXiv 2510.11690."""
    evaluate_every: Positive = 500
    calibration_pictures: Positive = 512
    """How many pictures the latent statistics are measured on at the end."""
    heldout_pictures: Positive = 32
    """How many held-out pictures the periodic numbers stand on."""
    loss: LossWeights = LossWeights()


def train_autoencoder(recipe: AutoencoderRecipe, folder: Path) -> Path:
    """Train, calibrate and save an AutoencoderDA; run again, it goes on where it stopped.

    Returns:
        The folder of the trained autoencoder, `folder`/autoencoder.

    Raises:
        SettingsError: sizes that do not fit each other or the base.
        CheckpointError: `folder` holds a run of another recipe.
        NumericsError: the detail latents came to nothing.
        DavaeError: whatever data, checkpoints and storage raise.
    """
    with recipe.alone_in(folder):
        return _train_autoencoder(recipe, folder)


def _train_autoencoder(recipe: AutoencoderRecipe, folder: Path) -> Path:
    source = Path(recipe.pictures) if recipe.pictures else assets.pictures()
    pictures = open_pictures(source, size=recipe.size, split="train", limit=recipe.limit)
    pictures = pictures.sound(folder / "refused.json")
    heldout = open_pictures(source, size=recipe.size, split="heldout", limit=recipe.heldout_pictures)
    heldout = heldout.sound(folder / "refused_heldout.json")
    autoencoder = start_autoencoder(recipe, pictures, folder / "start")
    lpips = LPIPS.alex()
    state = recipe.training_state(
        folder, {"autoencoder": autoencoder}, autoencoder.detail_parameters(), label="stage 1"
    )
    autoencoder.train()
    lpips.to(state.device)
    for step in state.steps():
        if step % recipe.evaluate_every == 0:
            with state.ema_weights():
                state.log(heldout_metrics(autoencoder, heldout, lpips))
                write_png(folder / "pictures" / f"{step:08d}.png", heldout_picture(autoencoder, heldout))
        indices = batch_indices(len(pictures), recipe.batch_size, seed=recipe.seed, step=step)
        image = random_crops(pictures.batch(indices), recipe.crop, seed=recipe.seed, step=step).to(state.device)
        state.update(*stage_one_loss(autoencoder, image, lpips, recipe, state))
    with state.ema_weights():
        autoencoder.eval()
        chosen = torch.randperm(len(pictures), generator=generator(recipe.seed, "calibration"))
        chunks = chosen[: recipe.calibration_pictures].split(16)
        try:
            autoencoder.calibrate(pictures.batch(chunk.tolist()) for chunk in chunks)
        except ValueError as error:  # that file knows no davae and its errors
            raise NumericsError(f"{error} A smaller weight of the KL loss keeps more in them.") from error
        values = heldout_metrics(autoencoder, heldout, lpips)
        state.log(values)
        write_png(folder / "pictures" / f"{state.step:08d}.png", heldout_picture(autoencoder, heldout))
        with replaced_whole(folder / "autoencoder") as partial:
            autoencoder.save_pretrained(partial)
    recipe.finish(
        state,
        {**values, "autoencoder": folder / "autoencoder"},
        counts={"pictures": len(pictures), "heldout_pictures": len(heldout)},
    )
    return folder / "autoencoder"


def stage_one_loss(
    autoencoder: AutoencoderDA, image: Tensor, lpips: LPIPS, recipe: AutoencoderRecipe, state: TrainingState
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_rec + lambda_align L_align of one batch [B, 3, H, W] in [-1, 1], and its parts for the log."""
    weights = recipe.loss
    posterior, latent = (generator(recipe.seed, name, state.step) for name in ("posterior", "latent noise"))
    with state.autocast():
        base = autoencoder.encode_base(image)
        mean, log_variance = autoencoder.encode_detail(image)
        noise = torch.randn(mean.shape, generator=posterior).to(mean)
        detail = mean + (0.5 * log_variance).exp() * noise
        reconstruction = autoencoder.reconstruct(*with_latent_noise(base, detail, recipe.latent_noise, latent))
        perceptual = lpips(reconstruction, image).mean() if weights.lpips else image.new_zeros(())
    parts = {
        "l1": reconstruction_l1(reconstruction, image),
        "gradient": gradient_l1(reconstruction, image),
        "lpips": perceptual,
        "kl": KL_LOSSES[weights.kl_reduction](mean, log_variance),
        "alignment": detail_alignment_loss(detail, base),
    }
    return torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum(), parts


def with_latent_noise(base: Tensor, detail: Tensor, scale: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both halves [B, C or D, h, w] with noise of |N(0, 1)| x `scale` of their channels' deviations over the batch."""
    if not scale:
        return base, detail
    level = scale * torch.randn(len(base), 1, 1, 1, generator=random).abs()
    noisy = []
    for half in (base, detail):
        noise = level * torch.randn(half.shape, generator=random)
        # A deviation that the detail encoder got gradients through could shrink away the noise.
        noisy.append(half + noise.to(half) * half.detach().float().std(dim=(0, 2, 3), keepdim=True).to(half))
    return noisy[0], noisy[1]


def start_autoencoder(recipe: AutoencoderRecipe, pictures: PictureSet, folder: Path) -> AutoencoderDA:
    """The AutoencoderDA that training starts from; made once and kept in `folder`, the recipe beside it."""
    if folder.is_dir():
        return load_autoencoder(folder)
    vae = load_base_vae(recipe.base or str(assets.base_pipeline()))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(recipe.seed, "start").initial_seed())  # for the random one
            autoencoder = AutoencoderDA.from_base(
                vae,
                detail_channels=recipe.detail_channels,
                base_downsample=recipe.base_downsample,
                linear_blocks=recipe.start == "closed form",
                base_in_detail=recipe.start == "closed form" and recipe.code in BASE_CODES,
            )
    except ValueError as error:  # that file knows no davae and its errors
        raise SettingsError(str(error)) from error
    for name, measured in (("size", True), ("crop", recipe.loss.lpips > 0)):
        side = getattr(recipe, name)
        if side % autoencoder.downsample_factor or side > recipe.size or (measured and side < MIN_SIDE):
            lower = f"from {MIN_SIDE}, which LPIPS needs, " if measured else ""
            raise SettingsError(
                f"{name}={side}: allowed are multiples of {autoencoder.downsample_factor}, the downsample factor, "
                f"{lower}up to size={recipe.size}"
            )
    if recipe.start == "closed form":
        chosen = torch.randperm(len(pictures), generator=generator(recipe.seed, "fit"))[: recipe.fit_pictures]
        facts = fit_closed_form(autoencoder, pictures.batch(chosen.tolist()), seed=recipe.seed, code=recipe.code)
        logger.info("closed-form start: %.4f of the residual is left out", facts["unexplained"][0])
    # Before the start, so that none is there without its recipe; after all refusals, so that none locks the folder.
    write_atomically(folder.with_name("recipe.toml"), recipe.to_toml().encode())
    with replaced_whole(folder) as partial:
        autoencoder.save_pretrained(partial)
    return autoencoder


@torch.no_grad()
def heldout_metrics(autoencoder: AutoencoderDA, pictures: PictureSet, lpips: LPIPS) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of reconstructions of whole held-out pictures, averaged over them."""
    rows = []
    for indices in torch.arange(len(pictures)).split(8):
        image = pictures.batch(indices.tolist()).to(autoencoder.device)
        reconstruction = autoencoder(image).sample.clamp(-1, 1)
        rows.append(torch.stack([metric(reconstruction, image) for metric in (psnr, ssim, lpips)]))
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return {f"heldout_{name}": value for name, value in zip(("psnr", "ssim", "lpips"), means, strict=True)}


@torch.no_grad()
def heldout_picture(autoencoder: AutoencoderDA, pictures: PictureSet) -> UInt8[Tensor, "3 h w"]:
    """The first eight held-out pictures side by side, their reconstructions below them."""
    image = pictures.batch(range(min(8, len(pictures)))).to(autoencoder.device)
    rows = torch.stack([image, autoencoder(image).sample.float()])
    return to_bytes(rearrange(rows, "rows columns c h w -> c (rows h) (columns w)"))
