"""Stage 1: train the detail encoder and the joint decoder beside a frozen base autoencoder."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from davae import assets
from davae.data.loading import Ahead
from davae.data.order import random_crops
from davae.data.pictures import write_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import NumericsError, SettingsError
from davae.method.closed_form import BASE_CODES, fit_closed_form
from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS
from davae.method.slim_start import fit_slim_decoder
from davae.method.stage_one_loss import StageOneDraws, adversarial_ramp, compared_weights, stage_one_loss
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import decode_latents
from davae.models.slim_decoder import slimmed
from davae.pipelines.adapter import INDEX
from davae.pipelines.loading import load_autoencoder, load_base_vae
from davae.pipelines.upgrade import check_base_encoder
from davae.run import faults
from davae.run.ranks import TIMEOUT, Ranks
from davae.run.storage import check_replaceable, replaced_whole, write_atomically
from davae.seeds import generator
from davae.training.companion import Companion
from davae.training.devices import fastest_layout, lay_out
from davae.training.folders import check_same_pictures, claim_folder, open_training_pictures
from davae.training.stage_one_recipe import AutoencoderRecipe, check_choices, check_sides, loss_settings
from davae.training.stage_one_recipe import LossWeights as LossWeights  # imported from here with the recipe
from davae.training.stage_one_validation import heldout_metrics, heldout_picture
from davae.training.state import TrainingState
from davae.training.trackers import check_trackers

logger = logging.getLogger(__name__)

SLIM_FIT_PICTURES = 32
"""Crops that a slim decoder's start is fitted on: one layer of both decoders is in memory for all of them."""


def train_autoencoder(
    recipe: AutoencoderRecipe, folder: Path, *, report_to: Sequence[str] = (), rank_timeout: float = TIMEOUT
) -> Path:
    """Train, calibrate and save an AutoencoderDA; run again, it goes on where it stopped.

    Args:
        recipe: all that decides the outcome.
        folder: of the run; every rank must see it.
        report_to: trackers that are shown its metrics, too (`davae.training.trackers.TRACKERS`).
        rank_timeout: seconds that a rank waits for another.

    Returns:
        The folder of the trained autoencoder, `folder`/autoencoder.

    Raises:
        SettingsError: sizes that do not fit each other, the base or the number of ranks; or `folder`/autoencoder is
            somebody's own.
        CheckpointError: `folder` holds a run of another recipe, or on other pictures.
        NumericsError: the detail latents came to nothing.
        DavaeError: whatever data, checkpoints and storage raise.
    """
    check_trackers(report_to)
    ranks = Ranks(rank_timeout)
    ranks.check_divides("batch_size", recipe.batch_size)
    with claim_folder(recipe, folder, ranks):
        ranks.on_first(lambda: check_replaceable(folder / "autoencoder", holds="config.json"))
        return _train_autoencoder(recipe, folder, ranks, report_to)


def _train_autoencoder(recipe: AutoencoderRecipe, folder: Path, ranks: Ranks, report_to: Sequence[str]) -> Path:
    pictures = open_training_pictures(recipe, folder if ranks.first else None, captions=False)
    heldout = open_pictures(
        recipe.source, size=recipe.heldout_size, split="heldout", limit=recipe.heldout_pictures, captions=False
    )
    heldout = heldout.sound(folder / "refused_heldout.json" if ranks.first else None)
    alex = LPIPS.alex()
    lpips = LPIPS.vgg(recipe.loss.lpips_weights) if recipe.loss.lpips_weights else alex
    autoencoder = ranks.first_then_all(lambda: start_autoencoder(recipe, pictures, folder / "start"))
    autoencoder = lay_out(autoencoder, fastest_layout(ranks.device))
    base_vae = load_base_vae(base_of(recipe)) if recipe.target == "base reconstruction" else None
    discriminator = discriminator_of(recipe)
    trained = set_trained(autoencoder, recipe)
    models, whole = {"autoencoder": autoencoder}, compared_weights(autoencoder).values()
    state = TrainingState(
        recipe,
        folder,
        models,
        trained,
        label="stage 1",
        ranks=ranks,
        companion=discriminator,
        report_to=report_to,
        whole=whole,
    )
    ranks.on_first(lambda: check_same_pictures(folder, pictures.keys))
    for network in (alex, lpips, base_vae):
        if network is not None:
            network.to(state.device)

    def evaluate() -> dict[str, float]:
        faults.at("eval")
        values = heldout_metrics(autoencoder, heldout, alex, ranks)
        state.log(values)
        shown, picture = folder / "pictures" / f"{state.step:08d}.png", heldout_picture(autoencoder, heldout)
        ranks.on_first(lambda: write_png(shown, picture))
        return values

    def make_crops(batch: int) -> tuple[list[int], Tensor]:
        indices = pictures.step_indices(recipe.batch_size, seed=recipe.seed, step=batch)
        images = pictures.batch(ranks.share(indices))
        samples = ranks.sample_numbers(batch, len(images))
        return indices, random_crops(images, recipe.crop, seed=recipe.seed, samples=samples)

    settings, loss_weights = loss_settings(recipe), recipe.loss
    with Ahead(make_crops) as load:
        for step in state.steps():
            if step % recipe.evaluate_every == 0:
                with state.ema_weights():
                    evaluate()

            # The discriminator plays from its first step on, and its weight in the loss rises from there.
            opponent = discriminator if step >= loss_weights.adversarial_start else None
            start, ramp_steps = loss_weights.adversarial_start, loss_weights.adversarial_ramp_steps
            ramp = adversarial_ramp(step, start=start, ramp_steps=ramp_steps)

            for batch in state.batches():
                indices, crops = load(batch)
                image = faults.at("data", crops.to(state.device))
                target = image if base_vae is None else base_reconstruction(autoencoder, base_vae, image)

                # The losses of Table S1, the detail alignment of Eq. 3-4, and the discriminator's own.
                loss = stage_one_loss(
                    autoencoder,
                    faults.at("encode", image),
                    lpips,
                    settings,
                    target=target,
                    discriminator=None if opponent is None else opponent.model,
                    ramp=ramp,
                    draws=StageOneDraws.keyed(recipe.seed, ranks.sample_numbers(batch, len(image))),
                    autocast=state.autocast(),
                    gather=ranks.gather,
                    average_=ranks.average_,
                )
                total = faults.at("forward", loss.total)

                # Each of the two takes its own step; neither reaches the other's weights.
                state.update(total, loss.logs, samples=[pictures.keys[index] for index in indices])
                if opponent is not None:
                    opponent.update(loss.discriminator)

    with state.ema_weights():
        autoencoder.eval()
        if not (recipe.decoder_only and recipe.autoencoder):
            calibrate(autoencoder, pictures, recipe)
        values = evaluate()
        made = state.whole("autoencoder")
        ranks.on_first(lambda: save_whole(made, folder / "autoencoder"))
    skipped = {} if discriminator is None else {"skipped_discriminator_steps": discriminator.guard.skipped}
    found, counts = {**values, "autoencoder": folder / "autoencoder"}, {"pictures": len(pictures), **skipped}
    ranks.on_first(lambda: state.finish(found, counts={**counts, "heldout_pictures": len(heldout)}))
    return folder / "autoencoder"


def save_whole(autoencoder: nn.Module, folder: Path) -> None:
    """Write it into `folder`, whole or not at all."""
    assert isinstance(autoencoder, AutoencoderDA)
    with replaced_whole(folder) as partial:
        autoencoder.save_pretrained(partial)


def set_trained(autoencoder: AutoencoderDA, recipe: AutoencoderRecipe) -> list[nn.Parameter]:
    """Training mode for what the recipe trains, whose parameters are returned; the rest frozen, in evaluation mode."""
    autoencoder.train()
    trunk = [autoencoder.detail_encoder, autoencoder.detail_quant_conv]
    last = [autoencoder.detail_downsample, autoencoder.detail_from_base]
    for module in trunk * (recipe.frozen_trunk or recipe.decoder_only) + last * recipe.decoder_only:
        if module is not None:
            module.requires_grad_(False).eval()
    return autoencoder.detail_parameters()


def discriminator_of(recipe: AutoencoderRecipe) -> Companion | None:
    """The PatchGAN and its optimiser, if its loss has a weight."""
    if not recipe.loss.adversarial:
        return None
    return Companion(
        "discriminator",
        PatchDiscriminator(generator(recipe.seed, "discriminator")),
        learning_rate=recipe.loss.discriminator_learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        gradient_accumulation=recipe.gradient_accumulation,
    )


@torch.no_grad()
def base_reconstruction(autoencoder: AutoencoderDA, base_vae: ModelMixin, image: Tensor) -> Tensor:
    """What the base autoencoder makes of pictures [B, 3, H, W] at full size: its mode decoded, within [-1, 1]."""
    latents = autoencoder.from_units(autoencoder.encode_pretrained(image))
    return decode_latents(base_vae, latents).clamp(-1, 1)


def calibrate(autoencoder: AutoencoderDA, pictures: PictureSet, recipe: AutoencoderRecipe) -> None:
    """Measure the latent statistics on a part of the training pictures.

    Raises:
        NumericsError: the detail latents came to nothing.
    """
    chosen = torch.randperm(len(pictures), generator=generator(recipe.seed, "calibration"))
    chunks = pictures.batches(chosen[: recipe.calibration_pictures].tolist(), 16)
    try:
        autoencoder.calibrate(pictures.batch(chunk) for chunk in chunks)
    except ValueError as error:  # that file knows no davae and its errors
        raise NumericsError(f"{error} A smaller weight of the KL loss keeps more in them.") from error


def base_of(recipe: AutoencoderRecipe) -> str:
    """Folder or Hub name of the base pipeline."""
    return recipe.base or str(assets.base_pipeline())


def start_autoencoder(recipe: AutoencoderRecipe, pictures: PictureSet, folder: Path) -> AutoencoderDA:
    """The AutoencoderDA that training starts from; made once and kept in `folder`, the recipe beside it."""
    if folder.is_dir():
        return load_autoencoder(folder)
    check_choices(recipe)
    autoencoder = going_on(recipe) if recipe.autoencoder else untrained(recipe)
    lay_out(autoencoder, torch.channels_last)
    check_sides(recipe, autoencoder.downsample_factor)
    if recipe.start == "closed form" and not recipe.autoencoder:
        chosen = torch.randperm(len(pictures), generator=generator(recipe.seed, "fit"))[: recipe.fit_pictures]
        facts = fit_closed_form(autoencoder, pictures.squares(chosen.tolist()), seed=recipe.seed, code=recipe.code)
        logger.info("closed-form start: %.4f of the residual is left out", facts["unexplained"][0])
    autoencoder = with_slim_decoder(autoencoder, recipe, pictures)
    # Before the start, so that none is there without its recipe; after all refusals, so that none locks the folder.
    write_atomically(folder.with_name("recipe.toml"), recipe.to_toml().encode())
    save_whole(autoencoder, folder)
    return autoencoder


def untrained(recipe: AutoencoderRecipe) -> AutoencoderDA:
    """A new AutoencoderDA of the base.

    Raises:
        SettingsError: its channels do not fit the base's.
    """
    vae = load_base_vae(base_of(recipe))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(recipe.seed, "start").initial_seed())  # for the random one
            return AutoencoderDA.from_base(
                vae,
                detail_channels=recipe.detail_channels,
                resolution_factor=recipe.resolution_factor,
                base_downsample=recipe.base_downsample,
                linear_blocks=recipe.start == "closed form",
                all_new=recipe.latents == "full",
                base_in_detail=recipe.start == "closed form" and recipe.code in BASE_CODES,
            )
    except ValueError as error:  # that file knows no davae and its errors
        raise SettingsError(str(error)) from error


def with_slim_decoder(autoencoder: AutoencoderDA, recipe: AutoencoderRecipe, pictures: PictureSet) -> AutoencoderDA:
    """The same with the recipe's slim decoder, fitted to the full one; itself if it has that, or the recipe none.

    Raises:
        SettingsError: widths or depths that the base's decoder does not allow, or another slim decoder is there.
    """
    settings = ("decoder_block_out_channels", "decoder_layers_per_block")
    given = [tuple(getattr(recipe, name)) for name in settings]
    if not any(given) or given == [tuple(autoencoder.config[name] or ()) for name in settings]:
        return autoencoder
    try:
        slim = slimmed(autoencoder, *given)
    except ValueError as error:  # that file knows no davae and its errors
        raise SettingsError(str(error)) from error
    chosen = torch.randperm(len(pictures), generator=generator(recipe.seed, "slim fit"))[:SLIM_FIT_PICTURES]
    crops = random_crops(pictures.squares(chosen.tolist()), recipe.crop, seed=recipe.seed, samples=range(len(chosen)))
    squared = fit_slim_decoder(slim, autoencoder, crops, seed=recipe.seed)
    logger.info(
        "slim decoder: its pictures differ from the full one's by %.4f, root mean square of [-1, 1]", squared**0.5
    )
    return slim


def going_on(recipe: AutoencoderRecipe) -> AutoencoderDA:
    """The AutoencoderDA that the recipe names.

    Raises:
        CheckpointError: it cannot be loaded.
        SettingsError: it is not what the recipe says, or not of the recipe's base.
    """
    needed = recipe.base or recipe.target == "base reconstruction" or (Path(recipe.autoencoder) / INDEX).is_file()
    vae = load_base_vae(base_of(recipe)) if needed else None
    autoencoder = load_autoencoder(Path(recipe.autoencoder), base=vae)
    for name in ("detail_channels", "resolution_factor", "base_downsample"):
        ours, theirs = getattr(recipe, name), autoencoder.config[name]
        if ours != theirs:
            raise SettingsError(f"{name}={ours!r}, but {recipe.autoencoder} has {theirs!r}: say so in the recipe, too")
    if vae is not None:
        check_base_encoder(autoencoder, vae)
    return autoencoder
