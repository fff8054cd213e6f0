"""The transformer of a stage-2 run: which parameters are trained, from which adapter they start, compiled blocks."""

import logging
from collections.abc import Sequence
from pathlib import Path

from diffusers import ModelMixin
from torch import nn

from davae.backbones import backbone_of
from davae.errors import SettingsError
from davae.pipelines.adapter import add_lora, check_base, find_target_layers, load_adapter
from davae.pipelines.adapter_index import read_index
from davae.training.sharding import blocks_of
from davae.training.stage_two_recipe import FinetuneRecipe

logger = logging.getLogger(__name__)


def choose_targets(transformer: ModelMixin, recipe: FinetuneRecipe) -> tuple[str, ...]:
    """Ends of the names of the layers that get LoRA or are trained themselves; none with the ports alone."""
    if recipe.trained == "ports":
        return ()
    return recipe.lora_targets or backbone_of(transformer).lora_targets


def choose_parameters(
    transformer: ModelMixin, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> list[nn.Parameter]:
    """Both ports with LoRA, with the target layers or alone; or all parameters. No others require gradients."""
    if recipe.trained in ("lora", "layers") and not targets:
        raise SettingsError(
            f'trained="{recipe.trained}": davae has no default targets for a {type(transformer).__name__}. Name some '
            'in lora_targets; without any, allowed are trained="full" and "ports"'
        )

    # LoRA layers come first, so that an adapter's tensors have a place.
    if recipe.trained == "lora":
        add_lora(transformer, recipe.lora_rank, recipe.lora_alpha, targets, seed=recipe.seed)
    if recipe.adapter:
        start_from_adapter(transformer, Path(recipe.adapter), recipe, targets, base_sha256)

    # With LoRA, `add_lora` has chosen already.
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


def start_from_adapter(
    transformer: ModelMixin, adapter: Path, recipe: FinetuneRecipe, targets: Sequence[str], base_sha256: str
) -> None:
    """Load an adapter to train it further; with a warning, its layers outside of `targets` get the base's weights."""
    check_base(base_sha256, adapter)
    index = read_index(adapter)
    if recipe.trained == "lora" and index.layers:
        raise SettingsError(
            f'adapter={adapter} has trained layers, no LoRA: allowed is trained="layers", "full" or "ports"'
        )

    # The base's weights of the layers that the adapter changed and this run does not train.
    base_weights = {}
    if recipe.trained in ("layers", "ports"):
        trained = find_target_layers(transformer, targets)
        for name, layer in find_target_layers(transformer, index.changed).items():
            if name not in trained:
                base_weights[name] = layer.weight.data

    # Without LoRA layers to train, the adapter's LoRA is added to the weights.
    load_adapter(transformer, adapter, fuse=recipe.trained != "lora")
    for name, weight in base_weights.items():
        transformer.get_submodule(name).weight = nn.Parameter(weight)
    if base_weights:
        names = ", ".join(base_weights)
        logger.warning("not among lora_targets, so the base's again, in %d layers: %s", len(base_weights), names)


def compile_blocks(transformer: ModelMixin, *, sizes: int) -> None:
    """Compile each block at its first call, in place; blocks of one kind share a graph, and names stay.

    With more than one of `sizes`, one graph serves them all.
    """
    for block in blocks_of(transformer):
        block.compile(dynamic=sizes > 1)
