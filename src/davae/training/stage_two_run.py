"""A whole run of stage 2, from a base pipeline to a fine-tuned one; and its caches, made beforehand."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from davae import assets
from davae.backbones import backbone_of
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.method.widen import start_ports
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import digest_base
from davae.pipelines.adapter_index import INDEX
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import digest_encoding_half, upgrade
from davae.run.ranks import TIMEOUT, Ranks
from davae.run.storage import check_replaceable, write_json
from davae.seeds import generator
from davae.training.conditions import (
    ReadConditions,
    cache_conditions,
    check_classes,
    encode_captions_online,
    move_frozen,
    read_classes,
)
from davae.training.folders import check_same_pictures, claim_folder, open_training_pictures
from davae.training.latents import ReadLatents, cache_latents, encode_online, expect_noise
from davae.training.stage_two import Loader, choose_objectives, train_transformer
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_saving import finish_record, save_upgrade
from davae.training.stage_two_transformer import choose_parameters, choose_targets, compile_blocks
from davae.training.stage_two_validation import choose_prompts, draw_pictures
from davae.training.state import TrainingState
from davae.training.trackers import check_trackers

logger = logging.getLogger(__name__)


def finetune(
    recipe: FinetuneRecipe, folder: Path, *, report_to: Sequence[str] = (), rank_timeout: float = TIMEOUT
) -> Path:
    """Upgrade the base pipeline, fine-tune it and save it. Called again, a run resumes at its last checkpoint.

    Args:
        recipe: all settings that decide the outcome.
        folder: the run's folder, which every rank must see.
        report_to: trackers that get the metrics, too (`davae.training.trackers.TRACKERS`).
        rank_timeout: seconds that a rank waits for another.

    Returns:
        `folder`/pipeline, a stock pipeline with LoRA fused. Unless all parameters were trained, `folder`/adapter is
        beside it.

    Raises:
        SettingsError: a backbone that cannot be trained, a size that the upgraded pipeline cannot make, a batch that
            the ranks cannot share equally, compiled blocks with FSDP2, or a folder that is not the run's to replace.
        CheckpointError: `folder` holds a run with another recipe or other pictures.
        DavaeError: errors of settings, data, checkpoints and storage.
    """
    check_trackers(report_to)
    ranks = Ranks(rank_timeout)
    ranks.check_divides("batch_size", recipe.batch_size)
    if recipe.compile and ranks.sharded:
        raise SettingsError(
            "compile = true with FSDP2: untested together. Leave it out, or launch with recipes/launch/ddp.yaml"
        )

    # Nothing is replaced that another program made.
    with claim_folder(recipe, folder, ranks):
        for name, index in (("pipeline", "model_index.json"), ("adapter", INDEX)):
            ranks.on_first(partial(check_replaceable, folder / name, holds=index))
        return _finetune(recipe, folder, ranks, report_to)


def _finetune(recipe: FinetuneRecipe, folder: Path, ranks: Ranks, report_to: Sequence[str]) -> Path:
    # The upgraded base and its pictures.
    pipeline = load_upgraded_base(recipe)
    transformer = pipeline.transformer
    start_ports(
        transformer,
        backbone_of(transformer).ports,
        base_channels=pipeline.vae.config.base_channels,
        start=recipe.ports_start,
        generator=generator(recipe.seed, "ports"),
    )
    pictures = load_pictures(recipe, transformer, folder, ranks)

    # The trained parameters: both latent ports, and LoRA, layers or all others.
    base_sha256, targets = digest_base(transformer), choose_targets(transformer, recipe)
    parameters = choose_parameters(transformer, recipe, targets, base_sha256)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if recipe.compile:
        compile_blocks(transformer, sizes=len(pictures.buckets))

    # All refusals come before the hours of encoding.
    objectives = choose_objectives(pipeline, recipe, pictures.buckets)
    models = {"transformer": transformer}
    state = TrainingState(recipe, folder, models, parameters, label="stage 2", ranks=ranks, report_to=report_to)
    ranks.on_first(lambda: check_same_pictures(folder, pictures.keys))
    prompts = choose_prompts(recipe, transformer, pictures)

    # Encode what the caches lack, then train.
    read_latents, read_conditions = prepare_inputs(recipe, pipeline, pictures, folder, ranks)
    loader = Loader(
        names=pictures.keys,
        choose=lambda number: pictures.step_indices(recipe.batch_size, seed=recipe.seed, step=number),
        read_latents=read_latents,
        read_conditions=read_conditions,
        seed=recipe.seed,
        ranks=ranks,
    )
    draw = partial(draw_pictures, state, pipeline, recipe, prompts, folder)
    train_transformer(transformer, recipe, state, loader, objectives, draw)

    # The result has the EMA's weights.
    base = recipe.base or str(assets.base_pipeline())
    with state.ema_weights():
        pipeline.register_modules(transformer=state.whole("transformer"))
        names = {"base": base, "base_sha256": base_sha256}
        ranks.on_first(lambda: save_upgrade(pipeline.to("cpu"), folder, recipe, targets, **names))
    ranks.on_first(lambda: finish_record(state, folder, recipe, base=base, pictures=len(pictures)))
    return folder / "pipeline"


def build_caches(recipe: FinetuneRecipe, folder: Path, *, rank_timeout: float = TIMEOUT) -> Path:
    """Encode all that a run of the recipe in `folder` would encode first, and return the folder of the caches.

    Several processes share the work; each waits for the others no longer than `rank_timeout` seconds.

    Raises:
        SettingsError: the recipe encodes at every step.
        DavaeError: errors of settings, data and storage.
    """
    if recipe.online:
        raise SettingsError("online = true: this recipe encodes at every step and keeps nothing; leave it out")
    ranks = Ranks(rank_timeout)
    pipeline = load_upgraded_base(recipe)
    pictures = load_pictures(recipe, pipeline.transformer, folder, ranks)
    prepare_inputs(recipe, pipeline, pictures, folder, ranks)
    return find_cache_folder(recipe, folder)


def load_upgraded_base(recipe: FinetuneRecipe) -> DiffusionPipeline:
    """The base pipeline, upgraded with the recipe's autoencoder, if it can make all of the recipe's sizes."""
    pipeline = load_pipeline(recipe.base or str(assets.base_pipeline()))
    autoencoder = load_autoencoder(Path(recipe.autoencoder or assets.upgrade()), base=pipeline.vae)
    if recipe.adapter and recipe.adapter != recipe.autoencoder:
        warn_of_other_latents(autoencoder, load_autoencoder(Path(recipe.adapter), base=pipeline.vae), recipe)
    expect_noise(autoencoder, recipe.detail_noise)

    # A size that the pipeline cannot make is refused here.
    pipeline = upgrade(pipeline, autoencoder)
    for side in recipe.sides:
        backbone_of(pipeline.transformer).picture_side(pipeline, side)
    return pipeline


def warn_of_other_latents(autoencoder: AutoencoderDA, other: AutoencoderDA, recipe: FinetuneRecipe) -> None:
    """Warn if the recipe's adapter was trained on the latents of an `other` autoencoder, its statistics aside."""
    ours, theirs = digest_encoding_half(autoencoder), digest_encoding_half(other)
    ours.pop("latent statistics")
    differing = [name for name, digest in ours.items() if theirs.get(name) != digest]
    if differing:
        logger.warning(
            'adapter = "%s" was trained on the latents of another autoencoder than autoencoder = "%s", which differs '
            'in %s. To go on with its own, set autoencoder = "%s", too',
            recipe.adapter, recipe.autoencoder, ", ".join(differing), recipe.adapter,
        )  # fmt: skip


def load_pictures(recipe: FinetuneRecipe, transformer: ModelMixin, folder: Path, ranks: Ranks) -> PictureSet:
    """The training images with captions, or with classes and classes.json if the backbone has those."""
    backbone = backbone_of(transformer)
    pictures = open_training_pictures(recipe, folder if ranks.first else None, classes=backbone.classes)
    if backbone.classes:
        check_classes(pictures, backbone.null_class(transformer))
    if pictures.class_names and ranks.first:
        numbers = range(len(pictures.class_names))
        write_json(folder / "classes.json", dict(zip(pictures.class_names, numbers, strict=True)))
    return pictures


def find_cache_folder(recipe: FinetuneRecipe, folder: Path) -> Path:
    """The folder of the caches of a run in `folder`."""
    return Path(recipe.cache) if recipe.cache else folder / "cache"


def prepare_inputs(
    recipe: FinetuneRecipe, pipeline: DiffusionPipeline, pictures: PictureSet, folder: Path, ranks: Ranks
) -> tuple[ReadLatents, ReadConditions]:
    """Functions that read an upgraded pipeline's latents and conditions; all ranks first fill what the caches lack.

    The pipeline's frozen parts encode on the ranks' device, and stay there only if every step needs them.
    """
    backbone, autoencoder, tokens = backbone_of(pipeline.transformer), pipeline.vae, recipe.prompt_tokens
    noise, seed = recipe.detail_noise, recipe.seed
    move_frozen(pipeline, ranks.device)
    read_told = read_classes(pipeline, backbone, pictures) if backbone.classes else None

    # Every step encodes.
    if recipe.online:
        latents = encode_online(autoencoder, pictures, flips=recipe.flips, detail_noise=noise, seed=seed, ranks=ranks)
        return latents, read_told or encode_captions_online(pipeline, backbone, pictures, tokens)

    # All is encoded once, and then the frozen parts make room for training.
    caches = find_cache_folder(recipe, folder)
    latents = cache_latents(autoencoder, pictures, caches, detail_noise=noise, seed=seed, ranks=ranks)
    if read_told is None:
        read_told = cache_conditions(pipeline, backbone, pictures, caches, tokens=tokens, ranks=ranks)
    move_frozen(pipeline, torch.device("cpu"))
    return latents, read_told
