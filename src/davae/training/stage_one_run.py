"""A whole run of stage 1, from a base autoencoder to a trained AutoencoderDA with latent statistics."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from davae.data.loading import Ahead
from davae.data.order import random_crops
from davae.data.pictures import to_bytes, write_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import NumericsError
from davae.method.metrics import METRICS, compare_images
from davae.method.perceptual import LPIPS
from davae.method.stage_one_loss import compared_weights
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_base_vae
from davae.run import faults
from davae.run.progress import track
from davae.run.ranks import TIMEOUT, Ranks
from davae.run.storage import check_replaceable
from davae.seeds import generator
from davae.training.devices import fastest_layout, keep_stream_in_float32, lay_out
from davae.training.digests import digest_part
from davae.training.folders import check_same_inputs, claim_folder, digest_pictures, note_inputs, open_training_pictures
from davae.training.stage_one import choose_trained, make_discriminator, train_networks
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_start import digest_start, name_base, save_autoencoder, start_autoencoder
from davae.training.state import TrainingState
from davae.training.trackers import Notify, check_trackers


def train_autoencoder(
    recipe: AutoencoderRecipe,
    folder: Path,
    *,
    report_to: Sequence[str] = (),
    rank_timeout: float = TIMEOUT,
    after_validation: Notify = lambda: None,
) -> Path:
    """Train, calibrate and save an AutoencoderDA. Called again, a run resumes at its last checkpoint.

    Args:
        recipe: all settings that decide the outcome.
        folder: the run's folder, which every rank must see.
        report_to: trackers that get the metrics, too (`davae.training.trackers.TRACKERS`).
        rank_timeout: seconds that a rank waits for another.
        after_validation: called on every rank once the metrics and the picture of a validation are written.

    Returns:
        The folder of the trained autoencoder, `folder`/autoencoder.

    Raises:
        SettingsError: sizes that do not fit each other, the base or the number of ranks, or a folder that is not the
            run's to replace.
        CheckpointError: `folder` holds a run with another recipe or other inputs, or the ranks see different ones.
        NumericsError: the detail latents came to nothing.
        DavaeError: errors of data, checkpoints and storage.
    """
    check_trackers(report_to)
    ranks = Ranks(rank_timeout)
    with claim_folder(recipe, folder, ranks):
        ranks.on_first(lambda: check_replaceable(folder / "autoencoder", holds="config.json"))
        return _train_autoencoder(recipe, folder, ranks, report_to, after_validation)


def _train_autoencoder(
    recipe: AutoencoderRecipe, folder: Path, ranks: Ranks, report_to: Sequence[str], after_validation: Notify
) -> Path:
    # The images to train on, and those held out; rank 0 lists the refused ones.
    pictures = open_training_pictures(recipe, folder if ranks.first else None, captions=False, begun=folder)
    report = folder / "refused_heldout.json" if ranks.first else None
    heldout = open_heldout(recipe, keys_alone=pictures.split == 1).sound(report)

    # The networks: the autoencoder, its discriminator, and the frozen ones that judge.
    alex = LPIPS.alex()
    lpips = LPIPS.vgg(recipe.loss.lpips_weights) if recipe.loss.lpips_weights else alex
    inputs = digest_start(recipe, folder) | digest_pictures(pictures, captions=False)
    inputs["held-out pictures"] = digest_pictures(heldout, captions=False)["order of the pictures"]
    inputs["LPIPS weights"] = digest_part(lpips) if recipe.loss.lpips_weights else ""
    check_same_inputs(folder, inputs, pictures, ranks)
    autoencoder = ranks.first_then_all(lambda: start_autoencoder(recipe, pictures, folder / "start", inputs))
    lay_out(keep_stream_in_float32(autoencoder), fastest_layout(ranks.device))
    base_vae = load_base_vae(name_base(recipe)) if recipe.target == "base reconstruction" else None
    discriminator = make_discriminator(recipe)
    for network in (alex, lpips, base_vae):
        if network is not None:
            network.to(ranks.device)

    # The state resumes at the newest checkpoint, if there is one.
    models, parameters = {"autoencoder": autoencoder}, choose_trained(autoencoder, recipe)
    whole = compared_weights(autoencoder).values()
    state = TrainingState(
        recipe, folder, models, parameters, label="stage 1", companion=discriminator, report_to=report_to, whole=whole
    )
    ranks.on_first(lambda: note_inputs(folder, inputs, pictures))

    # Train, while a thread makes the next batches.
    evaluate = partial(evaluate_heldout, state, autoencoder, heldout, alex, after_validation)
    others: dict[str, Any] = {"lpips": lpips, "base_vae": base_vae, "discriminator": discriminator}
    with Ahead(partial(load_crops, recipe, pictures, ranks)) as load:
        train_networks(autoencoder, recipe, state, state.saving(load), evaluate, **others)

    # The result has the EMA's weights, and latent statistics measured with them.
    with state.ema_weights():
        autoencoder.eval()
        if not (recipe.decoder_only and recipe.autoencoder):
            calibrate(autoencoder, pictures, recipe)
        values = evaluate()
        trained = state.weights.whole("autoencoder")
        ranks.on_first(lambda: save_autoencoder(trained, folder / "autoencoder"))

    # The record: the last metrics, and how many images they stand on.
    counts = {"pictures": len(pictures)}
    if pictures.stand_ins:
        counts["replaced_pictures"] = len(pictures.stand_ins)
    if discriminator is not None:
        counts["skipped_discriminator_steps"] = discriminator.guard.skipped
    counts["heldout_pictures"] = len(heldout)
    ranks.on_first(lambda: state.finish({**values, "autoencoder": folder / "autoencoder"}, counts=counts))
    return folder / "autoencoder"


def open_heldout(recipe: AutoencoderRecipe, *, keys_alone: bool) -> PictureSet:
    """The held-out images, squares of the shortest side of a bucket."""
    size, limit = recipe.heldout_size, recipe.heldout_pictures
    return open_pictures(recipe.source, size=size, split="heldout", limit=limit, captions=False, keys_alone=keys_alone)


def load_crops(recipe: AutoencoderRecipe, pictures: PictureSet, ranks: Ranks, number: int) -> tuple[list[str], Tensor]:
    """The names of all images in batch `number`, and this rank's crops of them."""
    # Seed and batch number choose the images; a sample's number in the run chooses its crop.
    indices = pictures.step_indices(recipe.batch_size, seed=recipe.seed, step=number)
    images = pictures.batch_or_next(ranks.share(indices))
    samples = ranks.sample_numbers(number, len(images))
    names = [pictures.keys[index] for index in indices]
    return names, random_crops(images, recipe.crop, seed=recipe.seed, samples=samples)


def calibrate(autoencoder: AutoencoderDA, pictures: PictureSet, recipe: AutoencoderRecipe) -> None:
    """Measure the latent statistics on a part of the training images; a NumericsError if the latents are nothing."""
    chosen = pictures.draw(recipe.calibration_pictures, generator(recipe.seed, "calibration"))
    chunks = list(pictures.batches(chosen, 16))
    counted = track(chunks, "measuring the latents", unit="batches", visible=Ranks().first)
    try:
        autoencoder.calibrate(pictures.batch(chunk) for chunk in counted)
    except ValueError as error:  # the models know no errors of davae
        raise NumericsError(f"{error} A smaller weight of the KL loss keeps more in them.") from error


@torch.no_grad()
def evaluate_heldout(
    state: TrainingState, autoencoder: AutoencoderDA, heldout: PictureSet, lpips: LPIPS, after_validation: Notify
) -> dict[str, float]:
    """Log the metrics, draw pictures/STEP.png, notify, and return the metrics."""
    faults.at("eval")
    values = heldout_metrics(autoencoder, heldout, lpips, state.ranks)
    state.log(values)

    # All ranks draw, as sharded models need; rank 0 writes.
    path, picture = state.record.folder / "pictures" / f"{state.step:08d}.png", heldout_picture(autoencoder, heldout)
    state.ranks.on_first(lambda: str(write_png(path, picture, origin=state.recipe.digest())))
    after_validation()
    return values


@torch.no_grad()
def heldout_metrics(autoencoder: AutoencoderDA, heldout: PictureSet, lpips: LPIPS, ranks: Ranks) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of reconstructions of whole held-out images, averaged over them; the ranks share them."""

    def measure(indices: Tensor) -> Tensor:
        image = heldout.batch(indices.tolist()).to(autoencoder.device)
        return compare_images(autoencoder(image).sample.clamp(-1, 1), image, lpips)

    rows = ranks.map_chunks(torch.arange(len(heldout)).split(8), measure)
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return {f"heldout_{name}": value for name, value in zip(METRICS, means, strict=True)}


def heldout_picture(autoencoder: AutoencoderDA, heldout: PictureSet) -> UInt8[Tensor, "3 h w"]:
    """The first eight held-out images side by side, their reconstructions below them."""
    image = heldout.batch(range(min(8, len(heldout)))).to(autoencoder.device)
    rows = torch.stack([image, autoencoder(image).sample.float()])
    return to_bytes(rearrange(rows, "rows columns c h w -> c (rows h) (columns w)"))
