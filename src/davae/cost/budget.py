"""The cost of a run, from its recipe and its base's configs. No weights are read, nothing is trained.

Each figure says where it comes from: *counted* on the models themselves, on the meta device (`davae.cost.workload`);
*derived* from counted ones by arithmetic; or *assumed*, like the hardware.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import ModelMixin
from torch import nn

from davae import assets
from davae.backbones import backbone_of, widen_transformer
from davae.backbones.backbone import checked_side
from davae.cost import workload
from davae.cost.geometry import META, Geometry, read_geometry
from davae.cost.timing import DENSE_PEAKS
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

# Dense bfloat16 products a second of an H100, in 10^12.
PEAK_TFLOPS = round(DENSE_PEAKS["H100"] / 1e12)
# The share of the peak that training is assumed to reach; convolutions rarely reach more than a quarter.
UTILISATION = {"autoencoder": 0.25, "finetune": 0.40}
# Of a weight, a gradient, an EMA weight: `davae.training.state` keeps them in float32.
BYTES = 4
# From captions, the stock pipeline's default; from classes, the intervals of the reference's 250 points in time.
SAMPLING_STEPS, SAMPLING_EVALUATIONS = 28, 249

GIB = 2**30

Models = tuple[nn.Module | None, ...]


class Figure(NamedTuple):
    """One line of a budget."""

    name: str
    value: int | float
    unit: str = ""
    how: Literal["counted", "derived", "assumed"] = "derived"

    def __str__(self) -> str:
        value = f"{self.value:.3g}"
        if isinstance(self.value, int):
            value = f"{self.value:,}"
        elif self.value >= 0.1:
            value = f"{self.value:,.3f}"
        return f"{self.name:<60}{value:>18} {self.unit:<10} {self.how}"


class Memory(NamedTuple):
    """Bytes of the device: what does not depend on the batch size, and the activations of the whole batch."""

    state: float
    activations: float

    @property
    def total(self) -> float:
        """Without workspaces and fragments."""
        return self.state + self.activations


def read_memory(figures: list[Figure]) -> Memory:
    """The memory in a budget: its lines in GiB are parts of the state, then the activations, then the sum of all."""
    *state, activations, _ = [figure.value * GIB for figure in figures if figure.unit == "GiB"]
    return Memory(sum(state), activations)


@dataclass(frozen=True)
class Plan:
    """A recipe with its budget, or with the reason why it has none."""

    recipe: AutoencoderRecipe | FinetuneRecipe
    source: str = ""
    figures: Sequence[Figure] = ()
    problem: str = ""

    @property
    def warnings(self) -> list[str]:
        """Settings that the run would warn of."""
        steps = self.recipe.steps
        return [f"Too late: {sentence} in the {steps} steps of this run" for sentence in self.recipe.late_settings()]

    def to_text(self) -> str:
        """The recipe, followed by its budget as comments, so that it is still TOML."""
        lines = [f"Budget, from the configs of {self.source}: no weights were read, nothing was trained."]
        lines += map(str, self.figures)
        if self.problem:
            lines = f"No budget: {self.problem}".splitlines()
        return "\n".join([self.recipe.to_toml(), *(f"# {line}" for line in [*self.warnings, *lines])])

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        facts: dict[str, Any] = {"recipe": self.recipe.model_dump(mode="json"), "warnings": self.warnings}
        budget = [figure._asdict() for figure in self.figures]
        return {**facts, "source": self.source, "budget": budget, "problem": self.problem}


def make_plan(recipe: AutoencoderRecipe | FinetuneRecipe, path: Path) -> Plan:
    """The plan of a recipe, which `path` holds."""
    try:
        geometry = read_geometry(recipe.base, path)
        if isinstance(recipe, AutoencoderRecipe):
            figures = estimate_stage_one(recipe, geometry)
        else:
            figures = estimate_stage_two(recipe, geometry, plan_autoencoder(recipe, geometry, path))
    except DavaeError as error:
        return Plan(recipe, problem=str(error))
    return Plan(recipe, geometry.source, figures)


# -------------------------------------------------------------------------------------------------------- stage 1


def estimate_stage_one(recipe: AutoencoderRecipe, geometry: Geometry) -> list[Figure]:
    """The figures of a run of stage 1, in the order of a reader's questions: size, tokens, passes, time, memory."""
    check_choices(recipe)
    autoencoder = make_autoencoder(recipe, geometry)
    check_sides(recipe, autoencoder.downsample_factor)
    choose_trained(autoencoder, recipe)
    discriminator = PatchDiscriminator(torch.Generator()).to(META) if recipe.loss.adversarial else None
    models = (autoencoder, discriminator)

    work = workload.count_stage_one(autoencoder, discriminator, geometry, recipe)
    return [
        *_count_autoencoder(autoencoder, discriminator),
        Figure("trained in this stage", workload.count_parameters(*models, trained=True), "parameters", "counted"),
        *_describe_tokens(autoencoder, geometry.transformer, recipe.size),
        *_count_passes(autoencoder, recipe.size),
        _tflop(f"one crop of {recipe.crop} px, forward and backward", work.flops),
        *_estimate_time(recipe, work),
        *_estimate_memory(recipe, models, work.kept_bytes),
    ]


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
    """The figures of a run of stage 2, in the order of a reader's questions."""
    config, backbone = autoencoder.config, backbone_of(geometry.transformer)
    transformer = _widen(recipe, geometry, autoencoder)
    side = recipe.size // autoencoder.downsample_factor
    figures = [
        Figure("base transformer", workload.count_parameters(geometry.transformer), "parameters", "counted"),
        Figure("widened transformer", workload.count_parameters(transformer), "parameters", "counted"),
    ]

    # Sampling runs the transformer without LoRA, so its forward pass is counted before LoRA is added.
    condition = workload.make_condition(transformer, recipe.prompt_tokens)
    forward = workload.count_transformer_flops(transformer, (config.latent_channels, side, side), condition)
    _choose_trained(transformer, recipe)
    figures += _count_trained(transformer)
    figures += _count_autoencoder(autoencoder, None)
    figures += _describe_tokens(autoencoder, transformer, recipe.size)
    if not backbone.classes:
        figures.append(Figure("text tokens beside them", condition["encoder_hidden_states"].shape[1]))

    # One image sampled, with guidance in all steps.
    encoding, decoding = _count_passes(autoencoder, recipe.size)
    evaluations = backbone.guided_rows * (SAMPLING_EVALUATIONS if backbone.classes else SAMPLING_STEPS)
    name = f"sampling a picture: {evaluations} forwards, all guided, and decoding"
    sampling = Figure(name, evaluations * forward / 1e12 + decoding.value, "TFLOP")
    figures += [_tflop("transformer, one picture, forward", forward), encoding, decoding, sampling]

    # A training step, and the whole run.
    work = workload.count_stage_two(transformer, autoencoder, recipe)
    figures.append(_tflop("transformer, one picture, forward and backward", work.flops))
    figures += _estimate_time(recipe, work)
    figures += _estimate_memory(recipe, (transformer,), work.kept_bytes)

    # Latents and conditions are kept in float32.
    numbers = config.latent_channels * side**2 + sum(tensor.numel() for tensor in condition.values())
    name = "inputs that are encoded once and kept, on the host, for a picture"
    return [*figures, Figure(name, numbers * BYTES / 2**20, "MiB")]


def estimate_stage_two_memory(recipe: FinetuneRecipe, geometry: Geometry, autoencoder: AutoencoderDA) -> Memory:
    """The memory in the figures of stage 2, without counting any FLOPs."""
    transformer = _widen(recipe, geometry, autoencoder)
    _choose_trained(transformer, recipe)
    kept_bytes = workload.count_stage_two_kept_bytes(transformer, autoencoder, recipe)
    return read_memory(_estimate_memory(recipe, (transformer,), kept_bytes))


def _widen(recipe: FinetuneRecipe, geometry: Geometry, autoencoder: AutoencoderDA) -> ModelMixin:
    """The widened transformer on the meta device; refuses sides that it cannot draw."""
    config = autoencoder.config
    unit = autoencoder.downsample_factor * patch_side(geometry.transformer, backbone_of(geometry.transformer).ports)
    for side in recipe.sides:
        checked_side(side, unit=unit)
    with META:
        return widen_transformer(
            geometry.transformer, base_channels=config.base_channels, detail_channels=config.detail_channels
        )


def _choose_trained(transformer: ModelMixin, recipe: FinetuneRecipe) -> None:
    """Freeze what a recipe does not train, and add its LoRA. An adapter to start from changes no count."""
    with META:
        fresh = recipe.model_copy(update={"adapter": ""})
        choose_parameters(transformer, fresh, choose_targets(transformer, recipe), "")


def _count_trained(transformer: ModelMixin) -> list[Figure]:
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
    names = backbone_of(transformer).ports
    ports = map(transformer.get_submodule, (names.input, names.output))
    return [
        *figures,
        Figure("both latent ports", workload.count_parameters(*ports), "parameters", "counted"),
        Figure("trained in this stage", workload.count_parameters(transformer, trained=True), "parameters", "counted"),
    ]


# ----------------------------------------------------------------------------------------------------- both stages


def _count_autoencoder(autoencoder: AutoencoderDA, discriminator: nn.Module | None) -> list[Figure]:
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
        if count := workload.count_parameters(*modules):
            figures.append(Figure(name, count, "parameters", "counted"))
    return figures


def _describe_tokens(autoencoder: AutoencoderDA, transformer: ModelMixin, size: int) -> list[Figure]:
    ports = backbone_of(transformer).ports
    patch, width = patch_side(transformer, ports), measure_width(transformer, ports)
    channels, side = autoencoder.config.latent_channels, size // autoencoder.downsample_factor
    return [
        Figure("latent channels, base and detail", channels),
        Figure("side of the latents", side),
        Figure(f"tokens, {side // patch} x {side // patch}", (side // patch) ** 2),
        Figure(f"numbers in a token, {width} being the transformer's width", channels * patch**2),
    ]


def _count_passes(autoencoder: AutoencoderDA, size: int) -> tuple[Figure, Figure]:
    """Encoding and decoding of one image, in bfloat16 as under autocast."""
    workload.to_half(autoencoder)
    with torch.no_grad(), workload.counting(autoencoder) as encoding:
        autoencoder.encode(workload.meta(1, 3, size, size))
    decoding = workload.count_decode_flops(autoencoder, size // autoencoder.downsample_factor)
    return _tflop(f"encoding one picture of {size} px", encoding.flops), _tflop("decoding it", decoding)


def _estimate_time(recipe: OptimisationRecipe, work: workload.Work) -> list[Figure]:
    """From one image's work to the days of a whole run; evaluation and encoding are not in it."""
    # All batches of a step, at the assumed share of the peak.
    images = recipe.batch_size * recipe.gradient_accumulation
    step, utilisation = images * work.flops, UTILISATION[recipe.section]
    days = recipe.steps * step / (PEAK_TFLOPS * 1e12 * utilisation) / 86_400
    return [
        Figure(f"pictures a step: {recipe.batch_size} x {recipe.gradient_accumulation}", images),
        Figure("one step of the optimiser", step / 1e12, "TFLOP"),
        Figure(f"all {recipe.steps:,} steps", recipe.steps * step / 1e18, "EFLOP"),
        Figure("one H100, dense bfloat16 products", PEAK_TFLOPS, "TFLOP/s", "assumed"),
        Figure("part of that which is reached", utilisation, "", "assumed"),
        Figure("so the run takes", days, "GPU-days"),
    ]


def _estimate_memory(recipe: OptimisationRecipe, models: Models, kept_bytes: int) -> list[Figure]:
    """Memory of the device: the state in float32, and the activations that autograd keeps of networks in bfloat16."""
    # Activations of one batch: accumulation holds one at a time.
    trained, moments = workload.count_parameters(*models, trained=True), STATE_BYTES[recipe.optimizer]
    state = {
        "weights, 4 bytes each": BYTES * workload.count_parameters(*models),
        "gradients, 4 bytes each that is trained": BYTES * trained,
        f"the optimiser's moments, {moments:.3g} bytes each": moments * trained,
        "EMA, 4 bytes each": BYTES * trained,
    }
    activations = recipe.batch_size * kept_bytes
    name = f"activations kept for the backward pass, batch of {recipe.batch_size}"
    return [
        *(Figure(name, size / GIB, "GiB") for name, size in state.items()),
        Figure(name, activations / GIB, "GiB", "counted"),
        Figure("sum, without workspaces and fragments", (sum(state.values()) + activations) / GIB, "GiB"),
    ]


def _tflop(name: str, flops: int) -> Figure:
    return Figure(name, flops / 1e12, "TFLOP", "counted")
