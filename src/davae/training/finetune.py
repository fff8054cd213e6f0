"""Stage 2: teach the widened transformer the detail latents, their part of the loss faded in."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from davae import assets
from davae.adapter import (
    add_lora,
    base_digest,
    check_base,
    load_adapter,
    read_index,
    save_adapter,
    target_layers,
    tensors_digest,
)
from davae.autoencoder_da import AutoencoderDA
from davae.backbones import Backbone, backbone_of
from davae.backbones.sd3 import picture_side
from davae.data.order import batch_indices
from davae.data.sources import PictureSet, open_pictures
from davae.errors import SettingsError
from davae.flow import detail_weight, flow_matching_losses, interpolate, sample_timesteps, velocity_target
from davae.record import read_metrics
from davae.seeds import generator
from davae.storage import write_atomically
from davae.training.optimisation import NotNegative, OptimisationRecipe, Positive, attention_on
from davae.training.state import TrainingState
from davae.upgrade import load_autoencoder, load_pipeline, save_pipeline, upgrade
from davae.widen import PortsStart, start_ports

logger = logging.getLogger(__name__)


class FinetuneRecipe(OptimisationRecipe):
    """Everything that decides a run of stage 2."""

    base: str = ""
    """Folder or Hub name of the base pipeline; "" is the shipped one."""
    autoencoder: str = ""
    """Folder of the trained AutoencoderDA; "" is the shipped upgrade's."""
    pictures: str = ""
    """Folder of captioned pictures or shards; "" is the shipped set."""
    limit: Positive | None = None
    """At most so many of them, evenly spread."""
    size: Positive = 256
    """Side of the pictures in pixels."""
    trained: Literal["lora", "layers", "full"] = "lora"
    """Both ports in full and LoRA on the targets; both ports and the targets' own weights; the whole transformer."""
    lora_rank: Positive = 32
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get LoRA, or are trained themselves; () is the family's default."""
    adapter: str = ""
    """An adapter folder of the same base to go on from; with LoRA, of the same rank, alpha, targets."""
    ports_start: PortsStart = "zero"
    """Of the ports' new half: "zero" is the method's warm start, the others are for comparison (`start_ports`)."""
    batch_size: Positive = 32
    detail_warmup_steps: NotNegative = 200
    """Steps over which the detail channels' weight rises from 0 to 1 (Eq. 12)."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Timestep shift in training; the scheduler's own if it is left out."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    prompt_tokens: Annotated[int, Field(gt=0, le=512)] = 256
    """Length of the longest text encoder's output (T5's, in SD3)."""


def finetune(recipe: FinetuneRecipe, folder: Path) -> Path:
    """Upgrade the base pipeline, fine-tune it and save it; run again, it goes on where it stopped.

    Returns:
        The folder of a stock pipeline, LoRA fused, `folder`/pipeline; unless all was trained, there is
        `folder`/adapter beside it.

    Raises:
        SettingsError: a family that cannot be trained, or a size that the upgraded pipeline cannot make.
        CheckpointError: `folder` holds a run of another recipe.
        DavaeError: whatever settings, data, checkpoints and storage raise.
    """
    with recipe.alone_in(folder):
        return _finetune(recipe, folder)


def _finetune(recipe: FinetuneRecipe, folder: Path) -> Path:
    base = recipe.base or str(assets.base_pipeline())
    autoencoder = load_autoencoder(Path(recipe.autoencoder) if recipe.autoencoder else assets.upgrade() / "vae")
    pipeline = upgrade(load_pipeline(base), autoencoder)
    backbone = backbone_of(pipeline.transformer)
    random, channels = generator(recipe.seed, "ports"), autoencoder.config.base_channels
    start_ports(
        pipeline.transformer, backbone.ports, base_channels=channels, start=recipe.ports_start, generator=random
    )
    picture_side(pipeline, recipe.size)
    source = Path(recipe.pictures) if recipe.pictures else assets.pictures()
    pictures = open_pictures(source, size=recipe.size, split="train", limit=recipe.limit)
    pictures = pictures.sound(folder / "refused.json")
    base_sha256 = base_digest(pipeline.transformer)
    targets = recipe.lora_targets or backbone.lora_targets
    parameters = trained_parameters(pipeline.transformer, recipe, targets, base_sha256)
    state = recipe.training_state(folder, {"transformer": pipeline.transformer}, parameters, label="stage 2")
    move_frozen(pipeline, state.device)
    latents = cached_latents(autoencoder, pictures, folder / "latents.safetensors")
    conditions = encode_captions(pipeline, backbone, ["", *pictures.captions], recipe.prompt_tokens)
    move_frozen(pipeline, torch.device("cpu"))
    pipeline.transformer.train()
    base_channels = autoencoder.config.base_channels
    shift = recipe.shift or pipeline.scheduler.config.shift
    for step in state.steps():
        indices = batch_indices(len(pictures), recipe.batch_size, seed=recipe.seed, step=step)
        random = generator(recipe.seed, "flow", step)
        clean = latents[indices].to(state.device)
        noise = torch.randn(clean.shape, generator=random).to(state.device)
        sigma = sample_timesteps(len(indices), shift=shift, generator=random).to(state.device)
        kept = torch.rand(len(indices), generator=random) >= recipe.caption_dropout
        captions = (torch.tensor(indices) + 1) * kept  # row 0 is the empty caption
        with state.autocast(), attention_on(state.device):
            velocity = backbone.velocity(
                pipeline.transformer,
                interpolate(clean, noise, sigma),
                sigma,
                {name: values[captions].to(state.device) for name, values in conditions.items()},
            )
        weight = detail_weight(step, recipe.detail_warmup_steps)
        target = velocity_target(clean, noise)
        losses = flow_matching_losses(velocity, target, base_channels=base_channels, detail_weight=weight)
        state.update(losses.total, {"base_loss": losses.base, "detail_loss": losses.detail, "detail_weight": weight})
    with state.ema_weights():
        saved = save_upgrade(pipeline.to("cpu"), folder, recipe, targets, base=base, base_sha256=base_sha256)
    recipe.finish(state, last_losses(state), counts={"pictures": len(pictures), "batch_size": recipe.batch_size})
    return saved


def trained_parameters(
    transformer: nn.Module, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> list[nn.Parameter]:
    """LoRA or its target layers' weights, with both ports in full; or everything. Nothing else keeps gradients."""
    if recipe.trained == "lora":
        add_lora(transformer, recipe.lora_rank, recipe.lora_alpha, targets, seed=recipe.seed)
    if recipe.adapter:
        go_on_from(transformer, Path(recipe.adapter), recipe, targets, base_sha256)
    if recipe.trained == "full":
        transformer.requires_grad_(True)
    if recipe.trained == "layers":
        ports = backbone_of(transformer).ports
        transformer.requires_grad_(False)
        for name in (ports.input, ports.output):
            transformer.get_submodule(name).requires_grad_(True)
        for layer in target_layers(transformer, targets).values():
            layer.weight.requires_grad_(True)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def go_on_from(
    transformer: nn.Module, adapter: Path, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> None:
    """Load an adapter to train on from. Of trained layers those outside of `targets` become the base's, and it is said.

    Raises:
        CheckpointError: the adapter is damaged or another base's, or its LoRA is of other rank, alpha or targets.
        SettingsError: LoRA is to go on from an adapter whose layers were trained themselves.
    """
    check_base(base_sha256, adapter)
    index = read_index(adapter)
    if recipe.trained == "lora" and index.layers:
        raise SettingsError(f'adapter={adapter} has trained layers, no LoRA: allowed is trained="layers" or "full"')
    bases = {}
    if recipe.trained == "layers":
        kept = target_layers(transformer, targets)
        changed = target_layers(transformer, index.changed)
        bases = {name: layer.weight.data for name, layer in changed.items() if name not in kept}
    load_adapter(transformer, adapter, fuse=recipe.trained != "lora")
    for name, weight in bases.items():
        transformer.get_submodule(name).weight = nn.Parameter(weight)
    if bases:
        logger.warning("not among lora_targets, so the base's again, in %d layers: %s", len(bases), ", ".join(bases))


def move_frozen(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move everything but the transformer."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != "transformer":
            component.to(device)


@torch.no_grad()
def cached_latents(autoencoder: AutoencoderDA, pictures: PictureSet, path: Path) -> Tensor:
    """Latents of all pictures in the transformer's units [N, C + D, h, w]: the posterior's mode, kept in `path`.

    They are used again only for the same pictures, size and autoencoder; another is a miss, and so is a damaged file.
    """
    parts = f"{pictures.digest} {pictures.size} {tensors_digest(autoencoder.state_dict())}"
    key = hashlib.sha256(parts.encode()).hexdigest()
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return file.get_tensor("latents")
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged (%s); the pictures are encoded again", path, error)
    autoencoder.eval()
    latents = []
    for indices in track(torch.arange(len(pictures)).split(16), "encoding pictures", console=Console(stderr=True)):
        image = pictures.batch(indices.tolist()).to(autoencoder.device)
        latents.append(autoencoder.to_units(autoencoder.encode(image).latent_dist.mode()))
    tensors = {"latents": torch.cat(latents).cpu().contiguous()}
    write_atomically(path, save(tensors, metadata={"key": key}))
    return tensors["latents"]


@torch.no_grad()
def encode_captions(
    pipeline: DiffusionPipeline, backbone: Backbone, captions: list[str], tokens: int
) -> dict[str, Tensor]:
    """The transformer's conditions for all captions, each value [N, ...], by the frozen text encoders."""
    batches = [
        backbone.condition(pipeline, captions[start : start + 64], max_sequence_length=tokens)
        for start in range(0, len(captions), 64)
    ]
    return {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}


def last_losses(state: TrainingState) -> dict[str, float | None]:
    """Of the last step, out of metrics.jsonl: a finished run that is started again makes no step."""
    path = state.record.metrics_path
    lines = read_metrics(path) if path.exists() else []
    return {name: value for line in lines[-1:] for name, value in line.items() if name.endswith("loss")}


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
