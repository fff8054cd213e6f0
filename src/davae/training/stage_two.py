"""Stage 2: teach the widened transformer the detail latents, their part of the loss faded in."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae import assets
from davae.backbones import backbone_of
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.method.flow import detail_weight
from davae.method.widen import start_ports
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import (
    INDEX,
    add_lora,
    check_base,
    digest_base,
    find_target_layers,
    load_adapter,
    read_index,
    save_adapter,
)
from davae.pipelines.loading import load_autoencoder, load_pipeline
from davae.pipelines.publishing import make_model_card, write_card
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import digest_encoding_half, upgrade
from davae.run import faults
from davae.run.ranks import TIMEOUT, Ranks
from davae.run.record import read_metrics
from davae.run.storage import check_replaceable, write_json
from davae.seeds import generator, rand, randn, sample_generators
from davae.training.conditions import check_classes
from davae.training.inputs import training_inputs
from davae.training.latents import expect_noise
from davae.training.recipes import attention_on
from davae.training.sharding import blocks_of
from davae.training.stage_two_loss import FlowObjective, NoiseObjective, choose_objective
from davae.training.stage_two_recipe import FinetuneRecipe as FinetuneRecipe
from davae.training.stage_two_validation import Validation
from davae.training.state import TrainingState
from davae.training.trackers import check_trackers

logger = logging.getLogger(__name__)


def finetune(
    recipe: FinetuneRecipe, folder: Path, *, report_to: Sequence[str] = (), rank_timeout: float = TIMEOUT
) -> Path:
    """Upgrade the base pipeline, fine-tune it and save it; run again, it goes on where it stopped.

    Args:
        recipe: all that decides the outcome.
        folder: of the run; every rank must see it.
        report_to: trackers that are shown its metrics, too (`davae.training.trackers.TRACKERS`).
        rank_timeout: seconds that a rank waits for another.

    Returns:
        The folder of a stock pipeline, LoRA fused, `folder`/pipeline; unless all was trained, there is
        `folder`/adapter beside it.

    Raises:
        SettingsError: a backbone that cannot be trained, a size that the upgraded pipeline cannot make, a batch that
            the ranks cannot share equally, or compiled blocks with FSDP2; or `folder`/pipeline is somebody's own.
        CheckpointError: `folder` holds a run of another recipe, or on other pictures.
        DavaeError: whatever settings, data, checkpoints and storage raise.
    """
    check_trackers(report_to)
    ranks = Ranks(rank_timeout)
    ranks.check_divides("batch_size", recipe.batch_size)
    if recipe.compile and ranks.sharded:
        raise SettingsError(
            "compile = true with FSDP2: nobody has tried it. Leave it out, or launch with recipes/launch/ddp.yaml"
        )
    with recipe.alone_in(folder, ranks):
        for name, index in (("pipeline", "model_index.json"), ("adapter", INDEX)):
            ranks.on_first(partial(check_replaceable, folder / name, holds=index))
        return _finetune(recipe, folder, ranks, report_to)


def _finetune(recipe: FinetuneRecipe, folder: Path, ranks: Ranks, report_to: Sequence[str]) -> Path:
    base = recipe.base or str(assets.base_pipeline())
    pipeline = upgraded_base(recipe)
    backbone, channels = backbone_of(pipeline.transformer), pipeline.vae.config.base_channels
    start, drawn = recipe.ports_start, generator(recipe.seed, "ports")
    start_ports(pipeline.transformer, backbone.ports, base_channels=channels, start=start, generator=drawn)
    pictures = training_pictures(recipe, pipeline.transformer, folder, ranks)
    base_sha256 = digest_base(pipeline.transformer)
    targets = () if recipe.trained == "ports" else recipe.lora_targets or backbone.lora_targets
    parameters = trained_parameters(pipeline.transformer, recipe, targets, base_sha256)
    if recipe.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    if recipe.compile:
        compile_blocks(pipeline.transformer, sizes=len(pictures.buckets))
    objectives = bucket_objectives(pipeline, recipe, pictures)
    models = {"transformer": pipeline.transformer}
    state = recipe.training_state(folder, models, parameters, label="stage 2", ranks=ranks, report_to=report_to)
    ranks.on_first(lambda: recipe.check_set(folder, pictures.keys))
    validation = Validation(recipe, pipeline, pictures, folder)  # which may refuse: before hours of encoding
    latents, conditions = training_inputs(recipe, pipeline, pictures, folder, ranks)
    pipeline.transformer.train()
    for step in state.steps():
        if validation.is_due(step):
            validation.draw(state)
        weight = detail_weight(step, recipe.detail_warmup_steps)
        for batch in state.batches():
            whole = pictures.step_indices(recipe.batch_size, seed=recipe.seed, step=batch)
            indices = ranks.share(whole)
            random = sample_generators(recipe.seed, "flow", ranks.sample_numbers(batch, len(indices)))
            clean = faults.at("encode", latents.batch(indices, step=batch).to(state.device))
            objective = objectives[clean[0, 0].numel()]
            noise = randn(clean.shape, random).to(state.device)
            time = objective.draw_times(random).to(state.device)
            kept = rand(random) >= recipe.caption_dropout
            rows = (torch.tensor(indices) + 1) * kept  # row 0 is the empty caption or the null class
            found = conditions.batch(rows.tolist())
            condition = {name: faults.at("text", values.to(state.device)) for name, values in found.items()}
            with attention_on(state.device):  # in the backward pass, too, for what is computed again there
                with state.autocast():
                    prediction = objective.predict(pipeline.transformer, clean, noise, time, condition)
                prediction = faults.at("forward", prediction[0]), prediction[1]
                loss, logs = objective.loss(prediction, clean, noise, time, detail_weight=weight)
                state.update(loss, logs, samples=[pictures.keys[index] for index in whole])
    if recipe.validation_every:
        validation.draw(state)
    with state.ema_weights():
        pipeline.register_modules(transformer=state.whole("transformer"))
        names = {"base": base, "base_sha256": base_sha256}
        ranks.on_first(lambda: save_upgrade(pipeline.to("cpu"), folder, recipe, targets, **names))
    ranks.on_first(lambda: leave_record(state, folder, recipe, base=base, pictures=len(pictures)))
    return folder / "pipeline"


def upgraded_base(recipe: FinetuneRecipe) -> DiffusionPipeline:
    """The base pipeline, upgraded by the recipe's autoencoder, its transformer warm-started.

    Raises:
        SettingsError: a size that it cannot make.
    """
    pipeline = load_pipeline(recipe.base or str(assets.base_pipeline()))
    autoencoder = load_autoencoder(Path(recipe.autoencoder or assets.upgrade()), base=pipeline.vae)
    if recipe.adapter and recipe.adapter != recipe.autoencoder:
        warn_of_other_latents(autoencoder, load_autoencoder(Path(recipe.adapter), base=pipeline.vae), recipe)
    expect_noise(autoencoder, recipe.detail_noise)
    pipeline = upgrade(pipeline, autoencoder)
    for side in recipe.sides:
        backbone_of(pipeline.transformer).picture_side(pipeline, side)
    return pipeline


def warn_of_other_latents(autoencoder: AutoencoderDA, adapters: AutoencoderDA, recipe: FinetuneRecipe) -> None:
    """Say so if the recipe's adapter was trained on other latents than those of the run, statistics aside."""
    ours, theirs = digest_encoding_half(autoencoder), digest_encoding_half(adapters)
    if differing := [name for name in ours if name != "latent statistics" and ours[name] != theirs.get(name)]:
        logger.warning(
            'adapter = "%s" was trained on the latents of another autoencoder than autoencoder = "%s", which differs '
            'in %s. To go on with its own, set autoencoder = "%s", too',
            recipe.adapter, recipe.autoencoder, ", ".join(differing), recipe.adapter,
        )  # fmt: skip


def compile_blocks(transformer: nn.Module, *, sizes: int) -> None:
    """Compile each block by itself, in place, when it is first called: blocks of a kind share one graph.

    With more than one of `sizes` graphs are of all of them. Names of parameters stay as they are.
    """
    for block in blocks_of(transformer):
        block.compile(dynamic=sizes > 1)


def bucket_objectives(
    pipeline: DiffusionPipeline, recipe: FinetuneRecipe, pictures: PictureSet
) -> dict[int, FlowObjective | NoiseObjective]:
    """The objective for latents of each number of positions h x w: a timestep shift may depend on it.

    Raises:
        SettingsError: as `choose_objective`.
    """
    factor, channels = pipeline.vae.downsample_factor, pipeline.vae.config.base_channels
    grids = {(bucket.height // factor) * (bucket.width // factor) for bucket in pictures.buckets}
    return {
        positions: choose_objective(
            pipeline,
            base_channels=channels,
            positions=positions,
            shift=recipe.shift,
            data_objective=recipe.objective == "data",
            min_snr=recipe.min_snr,
            cosine_weight=recipe.cosine_weight,
        )
        for positions in sorted(grids)
    }


def training_pictures(recipe: FinetuneRecipe, transformer: nn.Module, folder: Path, ranks: Ranks) -> PictureSet:
    """The pictures to train on, with captions or classes as the transformer's backbone wants; refusals are on record.

    Raises:
        SettingsError: a class that the transformer has not.
    """
    backbone = backbone_of(transformer)
    pictures = recipe.training_pictures(folder if ranks.first else None, classes=backbone.classes)
    if backbone.classes:
        check_classes(pictures, backbone.null_class(transformer))
    if pictures.class_names and ranks.first:
        write_json(folder / "classes.json", {name: number for number, name in enumerate(pictures.class_names)})
    return pictures


def trained_parameters(
    transformer: nn.Module, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> list[nn.Parameter]:
    """LoRA, its target layers' weights or neither, with both ports in full; or everything. No others have gradients.

    Raises:
        SettingsError: no targets for LoRA or for layers, or as `go_on_from`.
    """
    if recipe.trained in ("lora", "layers") and not targets:
        raise SettingsError(
            f'trained="{recipe.trained}": davae has no default targets for a {type(transformer).__name__}. Name some '
            'in lora_targets; without any, allowed are trained="full" and "ports"'
        )
    if recipe.trained == "lora":
        add_lora(transformer, recipe.lora_rank, recipe.lora_alpha, targets, seed=recipe.seed)
    if recipe.adapter:
        go_on_from(transformer, Path(recipe.adapter), recipe, targets, base_sha256)
    if recipe.trained == "full":
        transformer.requires_grad_(True)
    if recipe.trained in ("layers", "ports"):
        ports = backbone_of(transformer).ports
        transformer.requires_grad_(False)
        for name in (ports.input, ports.output):
            transformer.get_submodule(name).requires_grad_(True)
        for layer in find_target_layers(transformer, targets).values():
            layer.weight.requires_grad_(True)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def go_on_from(
    transformer: nn.Module, adapter: Path, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> None:
    """Load an adapter to train on from. Without LoRA, layers outside of `targets` become the base's, and it is said.

    Raises:
        CheckpointError: the adapter is damaged or another base's, or its LoRA is of other rank, alpha or targets.
        SettingsError: LoRA is to go on from an adapter whose layers were trained themselves.
    """
    check_base(base_sha256, adapter)
    index = read_index(adapter)
    if recipe.trained == "lora" and index.layers:
        raise SettingsError(
            f'adapter={adapter} has trained layers, no LoRA: allowed is trained="layers", "full" or "ports"'
        )
    bases = {}
    if recipe.trained in ("layers", "ports"):
        kept = find_target_layers(transformer, targets)
        changed = find_target_layers(transformer, index.changed)
        bases = {name: layer.weight.data for name, layer in changed.items() if name not in kept}
    load_adapter(transformer, adapter, fuse=recipe.trained != "lora")
    for name, weight in bases.items():
        transformer.get_submodule(name).weight = nn.Parameter(weight)
    if bases:
        logger.warning("not among lora_targets, so the base's again, in %d layers: %s", len(bases), ", ".join(bases))


def last_losses(state: TrainingState) -> dict[str, float | None]:
    """Of the last step, out of metrics.jsonl: a finished run that is started again makes no step."""
    path = state.record.metrics_path
    lines = read_metrics(path) if path.exists() else []
    return {name: value for line in lines[-1:] for name, value in line.items() if name.endswith("loss")}


def leave_record(state: TrainingState, folder: Path, recipe: FinetuneRecipe, *, base: str, pictures: int) -> None:
    """Write result.json, and the cards of what was made."""
    values, counts = last_losses(state), {"pictures": pictures, "batch_size": recipe.batch_size}
    recipe.finish(state, values, counts=counts)
    write_cards(folder, recipe, base=base, metrics=values, counts=counts)


def write_cards(
    folder: Path, recipe: FinetuneRecipe, *, base: str, metrics: dict[str, float | None], counts: dict[str, int]
) -> None:
    """A model card in the pipeline and, if there is one, in the adapter folder."""
    name = "base" if Path(base).is_dir() else base
    calls = {"pipeline": 'load_pipeline("this folder")', "adapter": f'load_pipeline("{name}", adapter="this folder")'}
    source = Path(recipe.pictures).name or "the set that davae ships (Fluent Emoji 3D, MIT)"
    facts: dict[str, Any] = {
        "data": f"{counts['pictures']:,} pictures of {source}",
        "metrics": metrics,
        "counts": counts,
    }
    for result, call in calls.items():
        if (folder / result).is_dir():
            usage = f"from davae import load_pipeline\n\npipe = {call}"
            write_card(folder / result, make_model_card(recipe, usage=usage, base=base, **facts))


def save_upgrade(
    pipeline: DiffusionPipeline,
    folder: Path,
    recipe: FinetuneRecipe,
    targets: Sequence[str],
    *,
    base: str,
    base_sha256: str,
) -> Path:
    """Write the stock pipeline and, unless everything was trained, the adapter folder beside it."""
    pipeline.transformer.eval()
    if recipe.trained != "full":
        name = Path(base).name if Path(base).is_dir() else base
        layers = targets if recipe.trained == "layers" else ()
        save_adapter(folder / "adapter", pipeline, base=name, base_sha256=base_sha256, layers=layers)
    if recipe.trained == "lora":
        pipeline.transformer.fuse_lora(safe_fusing=True)
        pipeline.transformer.unload_lora()
    save_pipeline(pipeline, folder / "pipeline")
    return folder / "pipeline"
