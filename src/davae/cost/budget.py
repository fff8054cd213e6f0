"""The cost of a run, from its recipe and its base's configs. No weights are read, nothing is trained.

Each figure says where it comes from: *counted* on the models themselves, on the meta device (`davae.cost.workload`);
*derived* from counted ones by arithmetic; or *assumed*, like the hardware.
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
from davae.cost.geometry import META, Geometry, read_geometry
from davae.cost.timing import DENSE_PEAKS
from davae.cost.workload import (
    Work,
    count_decode_flops,
    count_parameters,
    count_stage_one,
    count_stage_two,
    count_transformer_flops,
    counting,
    make_condition,
    meta,
    to_half,
)
from davae.errors import DavaeError, SettingsError
from davae.method.discriminator import PatchDiscriminator
from davae.method.widen import measure_width, patch_side
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter_index import INDEX
from davae.run.recipe import has_sections, load_recipe, read_toml
from davae.training.optimizers import STATE_BYTES
from davae.training.recipes import OptimisationRecipe
from davae.training.stage_one import choose_trained
from davae.training.stage_one_recipe import AutoencoderRecipe, check_choices, check_sides
from davae.training.stage_one_start import make_slim, make_untrained
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_transformer import choose_parameters, choose_targets

PEAK_TFLOPS = round(DENSE_PEAKS["H100"] / 1e12)
"""Dense bfloat16 products a second of an H100, in 10^12."""
UTILISATION = {"autoencoder": 0.25, "finetune": 0.40}
"""The share of the peak that training is assumed to reach; convolutions rarely reach more than a quarter."""
BYTES = 4
"""Of a weight, a gradient, an EMA weight: `davae.training.state` keeps them in float32."""
SAMPLING_STEPS, SAMPLING_EVALUATIONS = 28, 249
"""From captions, the stock pipeline's default; from classes, the intervals of the reference's 250 points in time."""

GIB = 2**30


class Figure(NamedTuple):
    """One line of a budget."""

    name: str
    value: int | float
    unit: str
    how: Literal["counted", "derived", "assumed"]


def describe_plan(recipe: AutoencoderRecipe | FinetuneRecipe, path: Path) -> str:
    """The recipe, followed by its budget as comments; or by the reason why it has none."""
    try:
        geometry = read_geometry(recipe.base, path)
        budget = format_budget(estimate_budget(recipe, geometry, path), geometry.source)
    except DavaeError as error:
        budget = "\n".join(f"# {line}" for line in f"No budget: {error}".splitlines())
    return f"{recipe.to_toml()}\n{budget}"


def estimate_budget(recipe: AutoencoderRecipe | FinetuneRecipe, geometry: Geometry, path: Path) -> list[Figure]:
    """The figures of a run of either stage; the file says what stage 1 makes, if stage 2's autoencoder is missing."""
    if isinstance(recipe, AutoencoderRecipe):
        return estimate_stage_one(recipe, geometry)
    return estimate_stage_two(recipe, geometry, plan_autoencoder(recipe, geometry, path))


def format_budget(figures: Iterable[Figure], source: str) -> str:
    """The figures as comment lines, so that a recipe followed by its budget is still TOML."""
    rows = [f"# {f.name:<60}{_format_number(f.value):>18} {f.unit:<10} {f.how}" for f in figures]
    return "\n".join([f"# Budget, from the configs of {source}: no weights were read, nothing was trained.", *rows])


def _format_number(value: int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if value >= 0.1 else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------- stage 1


def estimate_stage_one(recipe: AutoencoderRecipe, geometry: Geometry) -> list[Figure]:
    """Stage 1; see `estimate_budget`."""
    check_choices(recipe)
    autoencoder = make_autoencoder(recipe, geometry)
    check_sides(recipe, autoencoder.downsample_factor)
    choose_trained(autoencoder, recipe)
    discriminator = PatchDiscriminator(torch.Generator()).to(META) if recipe.loss.adversarial else None
    weights = count_parameters(autoencoder, discriminator)
    trained = count_parameters(autoencoder, discriminator, trained=True)

    # The figures come in the order of a reader's questions: size, tokens, passes, one step, time, memory.
    figures = _count_autoencoder(autoencoder, discriminator)
    figures.append(Figure("trained in this stage", trained, "parameters", "counted"))
    figures += _describe_tokens(autoencoder, geometry.transformer, recipe.size)
    figures += _count_passes(autoencoder, recipe.size)

    work = count_stage_one(autoencoder, discriminator, geometry, recipe)
    figures.append(_tflop(f"one crop of {recipe.crop} px, forward and backward", work.flops, "counted"))
    return figures + _estimate_time(recipe, work) + _estimate_memory(recipe, weights, trained, work)


def make_autoencoder(recipe: AutoencoderRecipe, geometry: Geometry) -> AutoencoderDA:
    """The autoencoder of a recipe of stage 1, on the meta device."""
    with META:
        return make_slim(make_untrained(recipe, geometry.vae), recipe)


# -------------------------------------------------------------------------------------------------------- stage 2


def plan_autoencoder(recipe: FinetuneRecipe, geometry: Geometry, path: Path) -> AutoencoderDA:
    """The autoencoder of a recipe of stage 2 on the meta device: the saved one, or the one of the file's stage 1."""
    folder = Path(recipe.autoencoder) if recipe.autoencoder else assets.upgrade()
    if (folder / INDEX).is_file():
        folder = folder / "vae"  # of an adapter
    if (folder / "config.json").is_file():
        with META:
            return AutoencoderDA.from_config(AutoencoderDA.load_config(folder))
    if not has_sections(AutoencoderRecipe, read_toml(path)):
        raise SettingsError(f"there is no autoencoder in {folder} yet, and {path} has no section [autoencoder]")
    return make_autoencoder(load_recipe(AutoencoderRecipe, path), geometry)


def estimate_stage_two(recipe: FinetuneRecipe, geometry: Geometry, autoencoder: AutoencoderDA) -> list[Figure]:
    """Stage 2; see `estimate_budget`."""
    config, backbone = autoencoder.config, backbone_of(geometry.transformer)
    unit = autoencoder.downsample_factor * patch_side(geometry.transformer, backbone.ports)
    for side in recipe.sides:
        checked_side(side, unit=unit)
    side = recipe.size // autoencoder.downsample_factor

    # Sampling runs the transformer without LoRA, so its forward pass is counted first.
    with META:
        transformer = widen_transformer(
            geometry.transformer, base_channels=config.base_channels, detail_channels=config.detail_channels
        )
    figures = [
        Figure("base transformer", count_parameters(geometry.transformer), "parameters", "counted"),
        Figure("widened transformer", count_parameters(transformer), "parameters", "counted"),
    ]
    condition = make_condition(transformer, backbone, recipe.prompt_tokens)
    forward = count_transformer_flops(
        transformer, backbone, channels=config.latent_channels, side=side, condition=condition
    )

    # An adapter to start from changes no count.
    with META:
        fresh = recipe.model_copy(update={"adapter": ""})
        choose_parameters(transformer, fresh, choose_targets(transformer, recipe), "")
    figures += _count_trained(transformer, backbone)
    figures += _count_autoencoder(autoencoder, None)
    figures += _describe_tokens(autoencoder, transformer, recipe.size)
    if not backbone.classes:
        tokens = condition["encoder_hidden_states"].shape[1]
        figures.append(Figure("text tokens beside them", tokens, "", "derived"))

    # Sampling, a training step, the whole run.
    figures.append(_tflop("transformer, one picture, forward", forward, "counted"))
    figures += _estimate_sampling(autoencoder, backbone, recipe.size, forward)
    work = count_stage_two(transformer, autoencoder, recipe, backbone)
    figures.append(_tflop("transformer, one picture, forward and backward", work.flops, "counted"))
    figures += _estimate_time(recipe, work)
    trained = count_parameters(transformer, trained=True)
    figures += _estimate_memory(recipe, count_parameters(transformer), trained, work)

    # Latents and conditions are kept in float32.
    numbers = config.latent_channels * side**2 + sum(tensor.numel() for tensor in condition.values())
    name = "inputs that are encoded once and kept, on the host, for a picture"
    return [*figures, Figure(name, numbers * BYTES / 2**20, "MiB", "derived")]


def _estimate_sampling(autoencoder: AutoencoderDA, backbone: Backbone, size: int, forward: int) -> list[Figure]:
    """Encoding, decoding, and sampling of one image with guidance in all steps."""
    encoding, decoding = _count_passes(autoencoder, size)
    evaluations = backbone.guided_rows * (SAMPLING_EVALUATIONS if backbone.classes else SAMPLING_STEPS)
    sampling = evaluations * forward / 1e12 + decoding.value
    name = f"sampling a picture: {evaluations} forwards, all guided, and decoding"
    return [encoding, decoding, Figure(name, sampling, "TFLOP", "derived")]


def _count_trained(transformer: ModelMixin, backbone: Backbone) -> list[Figure]:
    """The trained parameters of the transformer: LoRA if there is any, latent ports, all together."""
    modules = parameters = 0
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            modules += ".lora_A." in name
            parameters += parameter.numel()

    figures = []
    if modules:
        figures.append(Figure("LoRA", modules, "modules", "counted"))
        figures.append(Figure("LoRA", parameters, "parameters", "counted"))
    ports = map(transformer.get_submodule, (backbone.ports.input, backbone.ports.output))
    return [
        *figures,
        Figure("both latent ports", count_parameters(*ports), "parameters", "counted"),
        Figure("trained in this stage", count_parameters(transformer, trained=True), "parameters", "counted"),
    ]


# ----------------------------------------------------------------------------------------------------- both stages


def _count_autoencoder(autoencoder: AutoencoderDA, discriminator: nn.Module | None) -> list[Figure]:
    """The parameters of each part that there is."""
    a = autoencoder
    parts = {
        "base encoder, frozen": (a.base_encoder, a.base_quant_conv),
        "detail encoder without its new block": (a.detail_encoder, a.detail_quant_conv),
        "new block of the detail encoder": (a.detail_downsample, a.detail_from_base),
        "new block of the joint decoder": (a.detail_upsample,),
        "joint decoder without its new block": (a.joint_decoder, a.joint_post_quant_conv),
        "discriminator": (discriminator,),
    }
    figures = []
    for name, modules in parts.items():
        if count := count_parameters(*modules):
            figures.append(Figure(name, count, "parameters", "counted"))
    return figures


def _describe_tokens(autoencoder: AutoencoderDA, transformer: ModelMixin, size: int) -> list[Figure]:
    """The grid of latents and tokens of an image."""
    ports = backbone_of(transformer).ports
    patch, width = patch_side(transformer, ports), measure_width(transformer, ports)
    channels, side = autoencoder.config.latent_channels, size // autoencoder.downsample_factor
    return [
        Figure("latent channels, base and detail", channels, "", "derived"),
        Figure("side of the latents", side, "", "derived"),
        Figure(f"tokens, {side // patch} x {side // patch}", (side // patch) ** 2, "", "derived"),
        Figure(f"numbers in a token, {width} being the transformer's width", channels * patch**2, "", "derived"),
    ]


def _count_passes(autoencoder: AutoencoderDA, size: int) -> tuple[Figure, Figure]:
    """Encoding and decoding of one image."""
    # In bfloat16, as under autocast.
    to_half(autoencoder)
    with torch.no_grad(), counting(autoencoder) as encoding:
        autoencoder.encode(meta(1, 3, size, size))
    decoding = count_decode_flops(autoencoder, size // autoencoder.downsample_factor)
    return (
        _tflop(f"encoding one picture of {size} px", encoding.flops, "counted"),
        _tflop("decoding it", decoding, "counted"),
    )


def _estimate_time(recipe: OptimisationRecipe, work: Work) -> list[Figure]:
    """From one image's work to the days of a whole run; evaluation and encoding are not in it."""
    # All batches of a step, at the assumed share of the peak.
    images = recipe.batch_size * recipe.gradient_accumulation
    step, utilisation = images * work.flops, UTILISATION[recipe.section]
    days = recipe.steps * step / (PEAK_TFLOPS * 1e12 * utilisation) / 86_400
    return [
        Figure(f"pictures a step: {recipe.batch_size} x {recipe.gradient_accumulation}", images, "", "derived"),
        _tflop("one step of the optimiser", step, "derived"),
        Figure(f"all {recipe.steps:,} steps", recipe.steps * step / 1e18, "EFLOP", "derived"),
        Figure("one H100, dense bfloat16 products", PEAK_TFLOPS, "TFLOP/s", "assumed"),
        Figure("part of that which is reached", utilisation, "", "assumed"),
        Figure("so the run takes", days, "GPU-days", "derived"),
    ]


def _estimate_memory(recipe: OptimisationRecipe, weights: int, trained: int, work: Work) -> list[Figure]:
    """Memory of the device: the state in float32, and the activations that autograd keeps of networks in bfloat16."""
    # Activations of one batch: accumulation holds one at a time.
    moments, batch_size = STATE_BYTES[recipe.optimizer], recipe.batch_size
    state = {
        "weights, 4 bytes each": BYTES * weights,
        "gradients, 4 bytes each that is trained": BYTES * trained,
        f"the optimiser's moments, {moments:.3g} bytes each": moments * trained,
        "EMA, 4 bytes each": BYTES * trained,
    }
    activations = batch_size * work.kept_bytes
    total = sum(state.values()) + activations
    return [
        *(Figure(name, size / GIB, "GiB", "derived") for name, size in state.items()),
        Figure(f"activations kept for the backward pass, batch of {batch_size}", activations / GIB, "GiB", "counted"),
        Figure("sum, without workspaces and fragments", total / GIB, "GiB", "derived"),
    ]


def _tflop(name: str, flops: int, how: Literal["counted", "derived"]) -> Figure:
    return Figure(name, flops / 1e12, "TFLOP", how)
