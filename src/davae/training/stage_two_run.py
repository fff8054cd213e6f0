"""A whole run of stage 2, from a base pipeline to a fine-tuned one; and its caches, made beforehand."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from einops import rearrange

from davae import assets
from davae.backbones import BACKBONES, backbone_of
from davae.data.pictures import write_png
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.method.widen import start_ports
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import digest_base, save_adapter
from davae.pipelines.adapter_index import INDEX, VAE_FOLDER
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.folders import check_reads_prompts
from davae.pipelines.loading import load_pipeline
from davae.pipelines.publishing import CardPicture, find_licence, make_model_card, write_card
from davae.pipelines.sampling import sample
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import digest_encoding_half, upgrade
from davae.run.ranks import TIMEOUT, Ranks
from davae.run.record import read_metrics
from davae.run.storage import check_replaceable, read_json
from davae.seeds import generator
from davae.training.digests import digest_folder, digest_part
from davae.training.folders import check_same_inputs, claim_folder, digest_pictures, note_inputs
from davae.training.stage_two import choose_objectives, train_transformer
from davae.training.stage_two_inputs import (
    expect_noise,
    find_cache_folder,
    load_batch,
    load_pictures,
    move_frozen,
    prepare_inputs,
)
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_transformer import choose_parameters, choose_targets, compile_blocks
from davae.training.state import TrainingState
from davae.training.trackers import Notify, check_trackers, show_picture

logger = logging.getLogger(__name__)


def finetune(
    recipe: FinetuneRecipe,
    folder: Path,
    *,
    report_to: Sequence[str] = (),
    rank_timeout: float = TIMEOUT,
    after_validation: Notify = lambda: None,
) -> Path:
    """Upgrade the base pipeline, fine-tune it and save it. Called again, a run resumes at its last checkpoint.

    Args:
        recipe: all settings that decide the outcome.
        folder: the run's folder, which every rank must see.
        report_to: trackers that get the metrics, too (`davae.training.trackers.TRACKERS`).
        rank_timeout: seconds that a rank waits for another.
        after_validation: called on every rank once the pictures of a validation are written.

    Returns:
        `folder`/pipeline, a stock pipeline with LoRA fused. Unless all parameters were trained, `folder`/adapter is
        beside it.

    Raises:
        SettingsError: a backbone that cannot be trained, a size that the upgraded pipeline cannot make, a batch that
            the ranks cannot share equally, compiled blocks with FSDP2, or a folder that is not the run's to replace.
        CheckpointError: `folder` holds a run with another recipe or other inputs, or the ranks see different ones.
        DavaeError: errors of settings, data, checkpoints and storage.
    """
    check_trackers(report_to)
    ranks = Ranks(rank_timeout)
    if recipe.compile and ranks.sharded:
        raise SettingsError(
            "compile = true with FSDP2: untested together. Leave it out, or launch with recipes/launch/ddp.yaml"
        )

    # Nothing is replaced that another program made.
    with claim_folder(recipe, folder, ranks):
        for name, index in (("pipeline", "model_index.json"), ("adapter", INDEX)):
            ranks.on_first(partial(check_replaceable, folder / name, holds=index))
        return _finetune(recipe, folder, ranks, report_to, after_validation)


def _finetune(
    recipe: FinetuneRecipe, folder: Path, ranks: Ranks, report_to: Sequence[str], after_validation: Notify
) -> Path:
    # The upgraded base and its pictures, which must be those of the first start.
    base = load_base(recipe)
    inputs = digest_base_parts(base)
    pipeline = upgrade_base(base, recipe)
    transformer = pipeline.transformer
    pictures = load_pictures(recipe, transformer, folder, ranks)
    inputs["autoencoder"] = digest_part(pipeline.vae)
    inputs["adapter"] = digest_folder(Path(recipe.adapter)) if recipe.adapter else ""
    inputs |= digest_pictures(pictures, captions=True)
    check_same_inputs(folder, inputs, pictures, ranks)

    # The trained parameters: both latent ports, and LoRA, layers or all others.
    ports, random = backbone_of(transformer).ports, generator(recipe.seed, "ports")
    channels = pipeline.vae.config.base_channels
    start_ports(transformer, ports, base_channels=channels, start=recipe.ports_start, generator=random)
    base_sha256, targets = digest_base(transformer), choose_targets(transformer, recipe)
    parameters = choose_parameters(transformer, recipe, targets, base_sha256)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if recipe.compile:
        compile_blocks(transformer, sizes=len(pictures.buckets))

    # All refusals come before the hours of encoding.
    objectives = choose_objectives(pipeline, recipe, pictures.buckets)
    models = {"transformer": transformer}
    state = TrainingState(recipe, folder, models, parameters, label="stage 2", report_to=report_to)
    ranks.on_first(lambda: note_inputs(folder, inputs, pictures))
    prompts = choose_prompts(recipe, transformer, pictures)

    # Encode what the caches lack, then train.
    read_latents, read_conditions = prepare_inputs(recipe, pipeline, pictures, folder, ranks)
    load = state.saving(partial(load_batch, recipe, pictures, read_latents, ranks))
    draw = partial(draw_pictures, state, pipeline, recipe, prompts, after_validation)
    train_transformer(transformer, recipe, state, load, read_conditions, objectives, draw)

    # The result has the EMA's weights.
    with state.ema_weights():
        pipeline.register_modules(transformer=state.weights.whole("transformer"))
        ranks.on_first(lambda: save_upgrade(pipeline.to("cpu"), folder, recipe, targets, base_sha256))
    ranks.on_first(lambda: finish_record(state, recipe, pictures=len(pictures)))
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


# --------------------------------------------------------------------------------------------------------------- start


def name_base(recipe: FinetuneRecipe) -> str:
    """Folder or Hub name of the base pipeline."""
    return recipe.base or str(assets.base_pipeline())


def load_base(recipe: FinetuneRecipe) -> DiffusionPipeline:
    """The base pipeline; one that cannot read prompts is refused before it is loaded."""
    check_reads_prompts(name_base(recipe))
    return load_pipeline(name_base(recipe))


def digest_base_parts(base: DiffusionPipeline) -> dict[str, str]:
    """Digests of all parts of the base pipeline but the autoencoder, which the recipe's replaces."""
    digests = {}
    for name, part in base.components.items():
        if name != "vae" and part is not None:
            digests[f"{name} of the base"] = digest_part(part)
    return digests


def load_upgraded_base(recipe: FinetuneRecipe) -> DiffusionPipeline:
    """The base pipeline, upgraded with the recipe's autoencoder, if it can make all of the recipe's sizes."""
    return upgrade_base(load_base(recipe), recipe)


def upgrade_base(pipeline: DiffusionPipeline, recipe: FinetuneRecipe) -> DiffusionPipeline:
    """The same of a base that is loaded already."""
    folder = Path(recipe.autoencoder or assets.upgrade())
    if isinstance(pipeline.vae, AutoencoderDA):
        check_made_for_upgrade(pipeline.vae, folder, recipe)
    autoencoder = load_autoencoder(folder, base=pipeline.vae)
    if recipe.adapter and recipe.adapter != recipe.autoencoder:
        warn_of_other_latents(autoencoder, load_autoencoder(Path(recipe.adapter), base=pipeline.vae), recipe)
    expect_noise(autoencoder, recipe.detail_noise)

    # A size that the pipeline cannot make is refused here.
    pipeline = upgrade(pipeline, autoencoder)
    for side in recipe.sides:
        backbone_of(pipeline.transformer).picture_side(pipeline, side)
    return pipeline


def check_made_for_upgrade(base: AutoencoderDA, folder: Path, recipe: FinetuneRecipe) -> None:
    """Refuse an upgraded base if the autoencoder in `folder` was made for the base of that, such as its own one."""
    config = folder / "config.json"
    if not config.is_file():
        config = folder / VAE_FOLDER / "config.json"
    if config.is_file() and read_json(config).get("base_channels") == base.config.base_channels:
        raise SettingsError(
            f'base = "{recipe.base}" is upgraded already, and the autoencoder was made for the base of that. To take '
            "more steps, start the run that made it again, in its own folder, with --set steps=N and N greater. To "
            'train with other settings, give that run\'s base, and its adapter as adapter (trained = "full" leaves '
            "none). To double once more, train an autoencoder on this base first"
        )


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


# ---------------------------------------------------------------------------------------------------------- validation


def choose_prompts(recipe: FinetuneRecipe, transformer: ModelMixin, pictures: PictureSet) -> list[str]:
    """The recipe's validation prompts, or else the captions of the first four pictures; refuses class conditions."""
    if recipe.validation_every and backbone_of(transformer).classes:
        raise SettingsError(
            f"validation_every={recipe.validation_every}: pictures are drawn from captions, and a "
            f"{type(transformer).__name__} has classes. Leave it out"
        )
    return list(recipe.validation_prompts or pictures.captions[:4])


@torch.no_grad()
def draw_pictures(
    state: TrainingState,
    pipeline: DiffusionPipeline,
    recipe: FinetuneRecipe,
    prompts: Sequence[str],
    after_validation: Notify,
) -> None:
    """Write pictures/STEP.png, show it to the trackers, and notify: raw weights above, EMA weights below.

    Training goes on as if no picture had been drawn: modes, devices and random state are restored.
    """
    transformer = pipeline.transformer
    was_training = transformer.training
    pipeline.set_progress_bar_config(disable=True)
    move_frozen(pipeline, state.device)
    transformer.eval()

    rows = []
    with torch.random.fork_rng():
        for weights in (state.weights.evaluated, state.ema_weights):
            # Autocast keeps the weights that it has cast, so each set of weights needs a context of its own.
            with weights(), state.autocast():
                images = sample(
                    pipeline,
                    prompts,
                    seed=recipe.seed,
                    steps=recipe.validation_steps,
                    guidance_scale=recipe.validation_guidance_scale,
                    size=recipe.size,
                    prompt_tokens=recipe.prompt_tokens,
                )
            rows.append(images.cpu())

    # Frozen parts whose results are cached make room for training again.
    transformer.train(was_training)
    if not recipe.online:
        move_frozen(pipeline, torch.device("cpu"))

    # A column for each prompt.
    grid = rearrange(torch.stack(rows), "rows columns c h w -> c (rows h) (columns w)")
    path = state.record.folder / "pictures" / f"{state.step:08d}.png"
    state.ranks.on_first(lambda: str(write_png(path, grid, origin=state.recipe.digest())))
    show_picture(state.trackers, "raw above, EMA below", grid, step=state.step)
    after_validation()


# ------------------------------------------------------------------------------------------------------------- results


def save_upgrade(
    pipeline: DiffusionPipeline, folder: Path, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> None:
    """Write the stock pipeline with LoRA fused and, unless everything was trained, the adapter beside it."""
    pipeline.transformer.eval()
    if recipe.trained != "full":
        base = name_base(recipe)
        base = Path(base).name if Path(base).is_dir() else base  # paths of this machine mean nothing to others
        layers = targets if recipe.trained == "layers" else ()
        save_adapter(folder / "adapter", pipeline, base=base, base_sha256=base_sha256, layers=layers)

    # A stock pipeline has no LoRA layers.
    if recipe.trained == "lora":
        pipeline.transformer.fuse_lora(safe_fusing=True)
        pipeline.transformer.unload_lora()
    save_pipeline(pipeline, folder / "pipeline")


def finish_record(state: TrainingState, recipe: FinetuneRecipe, *, pictures: int) -> None:
    """Write result.json with the losses of the last step, and the model cards."""
    # A finished run that is started again has them in its log, which may be damaged: those of other steps do not count.
    path, losses = state.record.metrics_path, {}
    for line in read_metrics(path) if path.is_file() else ():
        if line["step"] == state.step - 1:
            losses = {name: value for name, value in line.items() if name.endswith("loss")}
    if state.step and not losses:
        logger.warning("%s has no line of the last step, so result.json has no losses", path)

    counts = {"pictures": pictures, "batch_size": recipe.batch_size}
    state.finish(losses, counts=counts)
    write_cards(state.record.folder, recipe, base=name_base(recipe), metrics=losses, counts=counts)


def write_cards(
    folder: Path,
    recipe: FinetuneRecipe,
    *,
    base: str,
    metrics: dict[str, float | None],
    counts: dict[str, int],
    evaluation: str = "",
    picture: CardPicture | None = None,
) -> None:
    """Write a model card into the pipeline's folder and, if there is one, into the adapter's.

    Without `picture`, the last validation picture of the run is shown, if there is one.
    """
    name = "base" if Path(base).is_dir() else base
    calls = {"pipeline": '"this folder"', "adapter": f'"{name}", adapter="this folder"'}
    source = Path(recipe.pictures).name or "a set without a name"
    data = f"{counts['pictures']:,} pictures of {source}"
    if recipe.pictures_licence:
        data += f", licence {recipe.pictures_licence}"

    # `draw_pictures` writes a file for each validation.
    drawn = sorted((folder / "pictures").glob("*.png"))
    if picture is None and drawn:
        caption = (
            f"After {int(drawn[-1].stem):,} steps: the raw weights above, their average below, with the same noise"
        )
        picture = CardPicture(drawn[-1], caption)

    # Both cards show the same facts and their own line of Python.
    facts: dict[str, Any] = {"base": base, "licence": find_licence(base), "data": data}
    facts |= {"metrics": metrics, "counts": counts, "evaluation": evaluation, "picture": picture}
    for result, call in calls.items():
        if (folder / result).is_dir():
            card = make_model_card(recipe, usage=describe_usage(call, recipe, folder), **facts)
            write_card(folder / result, card, picture)


def describe_usage(call: str, recipe: FinetuneRecipe, folder: Path) -> str:
    """Python that loads a result with `call` and makes an image; by its backbone, from a prompt or a class."""
    _, transformer = read_json(folder / "pipeline" / "model_index.json")["transformer"]
    backbone = BACKBONES[transformer]
    prompt = json.dumps(recipe.validation_prompts[0] if recipe.validation_prompts else "a prompt", ensure_ascii=False)
    sides = f", height={recipe.size}, width={recipe.size}"
    arguments = "[0]" if backbone.classes else prompt + sides
    lines = [
        "import torch",
        "from davae import load_pipeline",
        "",
        f'pipe = load_pipeline({call}, dtype=torch.bfloat16, device="cuda")',
        *([f"# {backbone.advice}"] if backbone.advice else []),
        f"image = pipe({arguments}).images[0]",
    ]
    return "\n".join(lines)
