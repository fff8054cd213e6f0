"""What stage 1 starts from: a new AutoencoderDA of the base, or one that was trained before."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from rich.console import Console
from torch import nn

from davae import assets
from davae.data.order import random_crops
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.method.closed_form import BASE_CODES, fit_closed_form
from davae.method.slim_start import fit_slim_decoder, slimmed
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter_index import INDEX
from davae.pipelines.autoencoders import check_base_encoder, load_autoencoder, load_base_vae
from davae.run.storage import replaced_whole, write_atomically
from davae.seeds import generator
from davae.training.devices import lay_out
from davae.training.digests import digest_folder, digest_part
from davae.training.folders import has_begun, note_inputs
from davae.training.stage_one_recipe import AutoencoderRecipe, check_choices, check_sides

logger = logging.getLogger(__name__)

SLIM_FIT_PICTURES = 32
"""Crops that a slim decoder is fitted on; one layer's output for all of them is in memory at a time."""


def start_autoencoder(
    recipe: AutoencoderRecipe, pictures: PictureSet, folder: Path, inputs: Mapping[str, str] | None = None
) -> AutoencoderDA:
    """The AutoencoderDA that training starts from; made once and kept in `folder`, with recipe and inputs beside it."""
    if folder.is_dir():
        return load_autoencoder(folder)

    # All refusals come before the fits, which take minutes.
    check_choices(recipe)
    if recipe.autoencoder:
        autoencoder = load_previous(recipe)
    else:
        autoencoder = make_untrained(recipe, load_base_vae(name_base(recipe)))
    lay_out(autoencoder, torch.channels_last)
    check_sides(recipe, autoencoder.downsample_factor)

    if recipe.start == "closed form" and not recipe.autoencoder:
        chosen = pictures.draw(recipe.fit_pictures, generator(recipe.seed, "fit"))
        Console(stderr=True).print(f"fitting the closed-form start on {len(chosen)} images")
        facts = fit_closed_form(autoencoder, pictures.squares(chosen), seed=recipe.seed, code=recipe.code)
        logger.info("closed-form start: %.4f of the residual is left out", facts["unexplained"][0])
    autoencoder = add_slim_decoder(autoencoder, recipe, pictures)

    # Recipe and inputs come before the start, so that no start is there without them; and after all refusals, so that
    # a refused recipe can be mended in the same folder.
    note_inputs(folder.parent, inputs or {}, pictures)
    write_atomically(folder.with_name("recipe.toml"), recipe.to_toml().encode())
    save_autoencoder(autoencoder, folder)
    return autoencoder


def digest_start(recipe: AutoencoderRecipe, folder: Path) -> dict[str, str]:
    """Digests of the base and of the previous autoencoder.

    A run that has begun in `folder` has them in its start: what is not there any more is left out.
    """
    begun, base, previous = has_begun(folder), name_base(recipe), recipe.autoencoder
    digests = {} if previous else {"autoencoder": ""}
    if previous and (Path(previous).is_dir() or not begun):
        digests["autoencoder"] = digest_folder(Path(previous))
    if needs_base(recipe) and (Path(base).is_dir() or not begun or recipe.target == "base reconstruction"):
        digests["base"] = digest_part(load_base_vae(base))
    return digests


def needs_base(recipe: AutoencoderRecipe) -> bool:
    """Whether the run reads the base: one that goes on from an autoencoder may do without."""
    is_whole = recipe.autoencoder and not (Path(recipe.autoencoder) / INDEX).is_file()
    return bool(recipe.base) or recipe.target == "base reconstruction" or not is_whole


def name_base(recipe: AutoencoderRecipe) -> str:
    """Folder or Hub name of the base pipeline."""
    return recipe.base or str(assets.base_pipeline())


def make_untrained(recipe: AutoencoderRecipe, vae: ModelMixin) -> AutoencoderDA:
    """A new AutoencoderDA of the base autoencoder `vae`; refuses channels that do not fit the base's."""
    closed_form = recipe.start == "closed form"

    try:
        # The random start draws from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(recipe.seed, "start").initial_seed())
            return AutoencoderDA.from_base(
                vae,
                detail_channels=recipe.detail_channels,
                resolution_factor=recipe.resolution_factor,
                base_downsample=recipe.base_downsample,
                linear_blocks=closed_form,
                all_new=recipe.latents == "full",
                base_in_detail=closed_form and recipe.code in BASE_CODES,
            )
    except ValueError as error:  # the models know no errors of davae
        raise SettingsError(str(error)) from error


def load_previous(recipe: AutoencoderRecipe) -> AutoencoderDA:
    """The AutoencoderDA that the recipe names, to go on from; refuses one of other settings or of another base."""
    # The base is not read without need: it may not be there.
    vae = load_base_vae(name_base(recipe)) if needs_base(recipe) else None
    autoencoder = load_autoencoder(Path(recipe.autoencoder), base=vae)

    # The recipe must describe what is trained.
    for name in ("detail_channels", "resolution_factor", "base_downsample"):
        ours, theirs = getattr(recipe, name), autoencoder.config[name]
        if ours != theirs:
            raise SettingsError(f"{name}={ours!r}, but {recipe.autoencoder} has {theirs!r}: say so in the recipe, too")
    if vae is not None:
        check_base_encoder(autoencoder, vae)
    return autoencoder


def make_slim(autoencoder: AutoencoderDA, recipe: AutoencoderRecipe) -> AutoencoderDA:
    """A copy with the recipe's slim decoder, untrained; the autoencoder itself if nothing changes.

    Refuses widths or depths that the base's decoder does not allow, and an autoencoder with another slim decoder.
    """
    widths, depths = recipe.decoder_block_out_channels, recipe.decoder_layers_per_block
    config = autoencoder.config
    present = (tuple(config["decoder_block_out_channels"] or ()), tuple(config["decoder_layers_per_block"] or ()))
    if not (widths or depths) or (widths, depths) == present:
        return autoencoder
    try:
        return slimmed(autoencoder, widths, depths)
    except ValueError as error:  # the models know no errors of davae
        raise SettingsError(str(error)) from error


def add_slim_decoder(autoencoder: AutoencoderDA, recipe: AutoencoderRecipe, pictures: PictureSet) -> AutoencoderDA:
    """The same as `make_slim`, the slim decoder fitted to the full one."""
    slim = make_slim(autoencoder, recipe)
    if slim is autoencoder:
        return autoencoder

    # Each slim layer is fitted on crops of the training images.
    chosen = pictures.draw(SLIM_FIT_PICTURES, generator(recipe.seed, "slim fit"))
    crops = random_crops(pictures.squares(chosen), recipe.crop, seed=recipe.seed, samples=range(len(chosen)))
    error = fit_slim_decoder(slim, autoencoder, crops, seed=recipe.seed) ** 0.5
    logger.info("slim decoder: its pictures differ from the full one's by %.4f, root mean square of [-1, 1]", error)
    return slim


def save_autoencoder(autoencoder: nn.Module, folder: Path) -> None:
    """Write it into `folder`, whole or not at all."""
    assert isinstance(autoencoder, AutoencoderDA)
    with replaced_whole(folder) as partial:
        autoencoder.save_pretrained(partial)
