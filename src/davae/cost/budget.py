"""What a run would cost, from its recipe and the configs of its base: no weights are needed, nothing is trained.

Each figure says how it was come by: *counted* on the models themselves, on the meta device (`davae.cost.workload`);
*derived* from counted ones by plain arithmetic; or *assumed*, as the hardware is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import ModelMixin
from torch import nn

from davae import assets
from davae.backbones import Backbone, backbone_of, widen_transformer
from davae.backbones.sizes import checked_side
from davae.cost.geometry import META, Geometry, read_geometry, untrained_autoencoder
from davae.cost.workload import (
    Work,
    condition_of,
    counting,
    decode_flops,
    in_half,
    meta,
    stage_one_work,
    transformer_work,
)
from davae.errors import DavaeError, SettingsError
from davae.method.closed_form import BASE_CODES
from davae.method.discriminator import PatchDiscriminator
from davae.method.widen import measure_width, patch_side
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import INDEX
from davae.run.recipe import has_sections, load_recipe, read_toml
from davae.training.optimizers import STATE_BYTES
from davae.training.recipes import OptimisationRecipe
from davae.training.stage_one import choose_trained
from davae.training.stage_one_recipe import AutoencoderRecipe, check_choices, check_sides
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_transformer import choose_parameters

PEAK_TFLOPS = 989
"""An H100's dense bfloat16 products a second, in 10^12, as its data sheet says."""
UTILISATION = {"autoencoder": 0.25, "finetune": 0.40}
"""The part of it that training is taken to reach: convolutions rarely do better than a quarter."""
GRADIENT, EMA, WEIGHT = 4, 4, 4
"""Bytes for each trained parameter, or for each at all (the last): `davae.training.state` keeps them in float32."""
SAMPLING_STEPS, SAMPLING_EVALUATIONS = 28, 249
"""From captions: the stock pipeline's default. From classes: the reference's 250 points in time (METHOD section 6)."""


class Figure(NamedTuple):
    """One line of a budget."""

    name: str
    value: int | float
    unit: str
    how: Literal["counted", "derived", "assumed"]


def plan_of(recipe: AutoencoderRecipe | FinetuneRecipe, path: Path) -> str:
    """The recipe and its budget as comments behind it; or why there is none: that need not stop the reader."""
    try:
        geometry = read_geometry(recipe.base, path)
        budget = table(budget_of(recipe, geometry, path), geometry.source)
    except DavaeError as error:
        budget = "\n".join(f"# {line}" for line in f"No budget: {error}".splitlines())
    return f"{recipe.to_toml()}\n{budget}"


def budget_of(recipe: OptimisationRecipe, geometry: Geometry, path: Path) -> list[Figure]:
    """The figures of a run of either stage.

    Args:
        recipe: of stage 1 or of stage 2.
        geometry: of its base.
        path: the recipe's file. For stage 2 its section for stage 1 says which autoencoder is meant, if none is there.

    Raises:
        SettingsError: the recipe does not fit its base, or the base's backbone cannot be trained.
    """
    if isinstance(recipe, AutoencoderRecipe):
        return autoencoder_budget(recipe, geometry)
    assert isinstance(recipe, FinetuneRecipe), "a budget is of stage 1 or of stage 2"
    return finetune_budget(recipe, geometry, planned_autoencoder(recipe, geometry, path))


def table(figures: Iterable[Figure], source: str) -> str:
    """The figures as comment lines, so that a recipe with its budget behind it is still TOML."""
    rows = [f"# {f.name:<60}{_number(f.value):>18} {f.unit:<10} {f.how}" for f in figures]
    return "\n".join([f"# Budget, from the configs of {source}: no weights were read, nothing was trained.", *rows])


def _number(value: int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if value >= 0.1 else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------- stage 1


def autoencoder_budget(recipe: AutoencoderRecipe, geometry: Geometry) -> list[Figure]:
    """Stage 1; see `budget_of`."""
    check_choices(recipe)
    autoencoder = _made_by(recipe, geometry)
    check_sides(recipe, autoencoder.downsample_factor)
    choose_trained(autoencoder, recipe)
    discriminator = PatchDiscriminator(torch.Generator()).to(META) if recipe.loss.adversarial else None
    trained = parameters(autoencoder, discriminator, trained=True)
    everything = parameters(autoencoder, discriminator)
    figures = [*_parts(autoencoder, discriminator), Figure("trained in this stage", trained, "parameters", "counted")]
    figures += _grid(autoencoder, geometry.transformer, recipe.size)
    figures += _passes(autoencoder, recipe.size)
    work = stage_one_work(autoencoder, discriminator, geometry, recipe)
    figures.append(_tflop(f"one crop of {recipe.crop} px, forward and backward", work.flops, "counted"))
    return figures + _run(recipe, recipe.batch_size, work) + _memory(recipe, everything, trained, work)


# -------------------------------------------------------------------------------------------------------- stage 2


def planned_autoencoder(recipe: FinetuneRecipe, geometry: Geometry, path: Path) -> AutoencoderDA:
    """The autoencoder that stage 2 would use, without weights: as it was saved, or as the file's stage 1 would make it.

    Raises:
        SettingsError: it is not there, and the file has no section for stage 1.
    """
    folder = Path(recipe.autoencoder) if recipe.autoencoder else assets.upgrade()
    folder = folder / "vae" if (folder / INDEX).is_file() else folder  # of an adapter
    if (folder / "config.json").is_file():
        with META:
            return AutoencoderDA.from_config(AutoencoderDA.load_config(folder))
    if not has_sections(AutoencoderRecipe, read_toml(path)):
        raise SettingsError(f"there is no autoencoder in {folder} yet, and {path} has no section [autoencoder]")
    return _made_by(load_recipe(AutoencoderRecipe, path), geometry)


def _made_by(recipe: AutoencoderRecipe, geometry: Geometry) -> AutoencoderDA:
    return untrained_autoencoder(
        geometry.vae,
        detail_channels=recipe.detail_channels,
        resolution_factor=recipe.resolution_factor,
        linear_blocks=recipe.start == "closed form",
        all_new=recipe.latents == "full",
        base_in_detail=recipe.start == "closed form" and recipe.code in BASE_CODES,
        decoder=(recipe.decoder_block_out_channels, recipe.decoder_layers_per_block),
    )


def finetune_budget(recipe: FinetuneRecipe, geometry: Geometry, autoencoder: AutoencoderDA) -> list[Figure]:
    """Stage 2; see `budget_of`."""
    config, backbone = autoencoder.config, backbone_of(geometry.transformer)
    unit = autoencoder.downsample_factor * patch_side(geometry.transformer, backbone.ports)
    for side in recipe.sides:
        checked_side(side, unit=unit)
    with META:
        transformer = widen_transformer(
            geometry.transformer, base_channels=config.base_channels, detail_channels=config.detail_channels
        )
    figures = [
        Figure("base transformer", parameters(geometry.transformer), "parameters", "counted"),
        Figure("widened transformer", parameters(transformer), "parameters", "counted"),
    ]
    forward = transformer_work(transformer, autoencoder, recipe, backbone, trained=False)
    targets = () if recipe.trained == "ports" else recipe.lora_targets or backbone.lora_targets
    with META:
        choose_parameters(transformer, recipe.model_copy(update={"adapter": ""}), targets, "")
    work = transformer_work(transformer, autoencoder, recipe, backbone, trained=True)
    trained = parameters(transformer, trained=True)
    figures += [*_trained(transformer, backbone), *_parts(autoencoder, None)]
    figures += _grid(autoencoder, transformer, recipe.size)
    condition = condition_of(transformer, backbone, recipe.prompt_tokens)
    if not backbone.classes:
        tokens = condition["encoder_hidden_states"].shape[1]
        figures.append(Figure("text tokens beside them", tokens, "", "derived"))
    figures.append(_tflop("transformer, one picture, forward", forward.flops, "counted"))
    passes = _passes(autoencoder, recipe.size)
    evaluations = backbone.guided_rows * (SAMPLING_EVALUATIONS if backbone.classes else SAMPLING_STEPS)
    sampling = evaluations * forward.flops / 1e12 + passes[1].value
    name = f"sampling a picture: {evaluations} forwards, all guided, and decoding"
    figures += [*passes, Figure(name, sampling, "TFLOP", "derived")]
    figures.append(_tflop("transformer, one picture, forward and backward", work.flops, "counted"))
    figures += _run(recipe, recipe.batch_size, work)
    figures += _memory(recipe, parameters(transformer), trained, work)
    side = recipe.size // autoencoder.downsample_factor
    numbers = config.latent_channels * side**2 + sum(tensor.numel() for tensor in condition.values())
    name = "inputs that are encoded once and kept, on the host, for a picture"
    return [*figures, Figure(name, numbers * 4 / 2**20, "MiB", "derived")]


def _trained(transformer: ModelMixin, backbone: Backbone) -> list[Figure]:
    """What of the transformer is trained: LoRA, latent ports, and all together."""
    lora = {name: p.numel() for name, p in transformer.named_parameters() if ".lora_" in name}
    ports = [transformer.get_submodule(name) for name in (backbone.ports.input, backbone.ports.output)]
    figures = [
        Figure("LoRA", sum(".lora_A." in name for name in lora), "modules", "counted"),
        Figure("LoRA", sum(lora.values()), "parameters", "counted"),
    ]
    return [
        *(figures if lora else []),
        Figure("both latent ports", parameters(*ports), "parameters", "counted"),
        Figure("trained in this stage", parameters(transformer, trained=True), "parameters", "counted"),
    ]


# ----------------------------------------------------------------------------------------------------- both stages


def parameters(*modules: nn.Module | None, trained: bool = False) -> int:
    """How many parameters the modules have, or how many of them are trained."""
    found = [parameter for module in modules if module is not None for parameter in module.parameters()]
    return sum(parameter.numel() for parameter in found if parameter.requires_grad or not trained)


def _parts(autoencoder: AutoencoderDA, discriminator: nn.Module | None) -> list[Figure]:
    a = autoencoder
    parts = {
        "base encoder, frozen": (a.base_encoder, a.base_quant_conv),
        "detail encoder without its new block": (a.detail_encoder, a.detail_quant_conv),
        "new block of the detail encoder": (a.detail_downsample, a.detail_from_base),
        "new block of the joint decoder": (a.detail_upsample,),
        "joint decoder without its new block": (a.joint_decoder, a.joint_post_quant_conv),
        "discriminator": (discriminator,),
    }
    counts = {name: parameters(*modules) for name, modules in parts.items()}
    return [Figure(name, count, "parameters", "counted") for name, count in counts.items() if count]


def _grid(autoencoder: AutoencoderDA, transformer: ModelMixin, size: int) -> list[Figure]:
    ports = backbone_of(transformer).ports
    side = size // autoencoder.downsample_factor
    patch, channels = patch_side(transformer, ports), autoencoder.config.latent_channels
    width = measure_width(transformer, ports)
    return [
        Figure("latent channels, base and detail", channels, "", "derived"),
        Figure("side of the latents", side, "", "derived"),
        Figure(f"tokens, {side // patch} x {side // patch}", (side // patch) ** 2, "", "derived"),
        Figure(f"numbers in a token, {width} being the transformer's width", channels * patch**2, "", "derived"),
    ]


def _passes(autoencoder: AutoencoderDA, size: int) -> tuple[Figure, Figure]:
    """Encoding and decoding one picture."""
    in_half(autoencoder)
    side = size // autoencoder.downsample_factor
    with torch.no_grad(), counting(autoencoder) as encoding:
        autoencoder.encode(meta(1, 3, size, size))
    return (
        _tflop(f"encoding one picture of {size} px", encoding.flops, "counted"),
        _tflop("decoding it", decode_flops(autoencoder, side), "counted"),
    )


def _run(recipe: OptimisationRecipe, batch_size: int, work: Work) -> list[Figure]:
    """From one picture's work to the days of a whole run, measuring and encoding not included."""
    pictures = batch_size * recipe.gradient_accumulation
    step = pictures * work.flops
    utilisation = UTILISATION[recipe.section]
    days = recipe.steps * step / (PEAK_TFLOPS * 1e12 * utilisation) / 86_400
    return [
        Figure(f"pictures a step: {batch_size} x {recipe.gradient_accumulation}", pictures, "", "derived"),
        _tflop("one step of the optimiser", step, "derived"),
        Figure(f"all {recipe.steps:,} steps", recipe.steps * step / 1e18, "EFLOP", "derived"),
        Figure("one H100, dense bfloat16 products", PEAK_TFLOPS, "TFLOP/s", "assumed"),
        Figure("part of that which is reached", utilisation, "", "assumed"),
        Figure("so the run takes", days, "GPU-days", "derived"),
    ]


def _memory(recipe: OptimisationRecipe, weights: int, trained: int, work: Work) -> list[Figure]:
    """Of the device: state in float32; activations as autograd keeps them, the networks in bfloat16."""
    moments, batch_size = STATE_BYTES[recipe.optimizer], recipe.batch_size
    state = {
        "weights, 4 bytes each": WEIGHT * weights,
        "gradients, 4 bytes each that is trained": GRADIENT * trained,
        f"the optimiser's moments, {moments:.3g} bytes each": moments * trained,
        "EMA, 4 bytes each": EMA * trained,
    }
    activations = batch_size * work.kept_bytes
    figures = [Figure(name, bytes_ / 2**30, "GiB", "derived") for name, bytes_ in state.items()]
    return [
        *figures,
        Figure(f"activations kept for the backward pass, batch of {batch_size}", activations / 2**30, "GiB", "counted"),
        Figure("sum, without workspaces and fragments", (sum(state.values()) + activations) / 2**30, "GiB", "derived"),
    ]


def _tflop(name: str, flops: int, how: Literal["counted", "derived"]) -> Figure:
    return Figure(name, flops / 1e12, "TFLOP", how)
