"""Facts of a pipeline, and the changes that an upgrade would make; from a folder's configs and headers alone, too."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from davae.backbones import buffer_names, check_part_names, find_backbone
from davae.backbones.backbone import Pipeline, Size, checked_side
from davae.errors import CheckpointError
from davae.method.widen import LatentPorts
from davae.models.base_autoencoders import downsample_factor
from davae.pipelines.places import HubName, fetch_files, fetch_shapes, loading
from davae.run.storage import read_json

RESOLUTION_FACTOR = 2  # of the default upgrade
DEFAULT_SAMPLE_SIZE = 128  # of stock pipelines whose transformer's config names none


@dataclass(frozen=True)
class Part:
    """A model of a pipeline, without its weights."""

    kind: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    """Of its weights, by their names."""
    parameters: int


def describe(pipeline: Pipeline, size: Size | None = None) -> dict[str, Any]:
    """Facts of a pipeline as plain JSON values: factor, channels, tokens per size, ports, and the upgrade's effect.

    Tokens are counted at half the default size, at that and at twice that, and at `size`. `"upgrade"` holds the changes
    of the default upgrade (as many detail channels as base channels, twice the side length); None for a pipeline that
    is upgraded already.
    """
    names = {name for name, part in pipeline.components.items() if part is not None}
    check_part_names(type(pipeline).__name__, names)
    parts = []
    for model in (pipeline.transformer, pipeline.vae):
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parts.append(Part(type(model).__name__, model.config, shapes, model.num_parameters()))
    transformer, vae = parts

    sample_size = getattr(pipeline, "default_sample_size", None) or transformer.config.get("sample_size")
    return _describe(type(pipeline).__name__, transformer, vae, sample_size or DEFAULT_SAMPLE_SIZE, size)


def describe_folder(folder: Path, size: Size | None = None, hub: HubName | None = None) -> dict[str, Any]:
    """The facts of `describe`, of a pipeline's folder; no weights are read, and nothing is checked that needs them.

    With `hub` the folder has the JSON of this repository, and weights that are not there keep their headers on the Hub.
    """
    index = read_json(folder / "model_index.json")
    kind, names = str(index.get("_class_name")), set()
    for name, entry in index.items():
        if isinstance(entry, list) and entry != [None, None]:
            names.add(name)
    check_part_names(kind, names)
    with loading(folder, "a pipeline"):
        transformer, vae = (read_part(folder / name, index[name][1], hub) for name in ("transformer", "vae"))
        return _describe(kind, transformer, vae, transformer.config.get("sample_size") or DEFAULT_SAMPLE_SIZE, size)


def describe_on_hub(hub: HubName, size: Size | None = None) -> dict[str, Any]:
    """The facts of `describe`, of a name on the Hub: its JSON is fetched, and of weights their headers alone."""
    folder = fetch_files(hub, ["model_index.json", "transformer/*.json", "vae/*.json"])
    return describe_folder(folder, size, hub._replace(revision=folder.name))


def read_part(folder: Path, kind: str, hub: HubName | None = None) -> Part:
    """A model's config, and the shapes in the headers of its weights, which may still be on the Hub."""
    config = read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with loading(path, "weights"), safe_open(path, framework="numpy") as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())

    # A download that was cut short has left some of the shards.
    shards: set[str] = set()
    for path in folder.glob("*.safetensors.index.json"):
        shards.update(read_json(path)["weight_map"].values())
    if hub is not None and not (files and shards <= {path.name for path in files}):
        shapes |= fetch_shapes(hub, folder.name)
    if not shapes:
        raise CheckpointError(f"{folder} has no .safetensors weights: save the pipeline with safe_serialization")
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(buffer_names(kind)))
    return Part(config.get("_class_name", kind), config, shapes, parameters)


def _describe(kind: str, transformer: Part, vae: Part, sample_size: int, size: Size | None) -> dict[str, Any]:
    backbone = find_backbone(transformer.kind)
    ports, config = backbone.ports, vae.config
    patch = ports.packed if ports.packed > 1 else ports.patch or transformer.config["patch_size"]
    factor = downsample_factor(config)  # some pipelines' own count differs from their VAE's
    channels = transformer.config["in_channels"] // ports.packed**2
    detail_channels = config.get("detail_channels", 0)
    side = sample_size * factor

    unit = factor * patch  # side of a token in pixels
    tokens = {}
    for each in (side // 2, side, 2 * side):
        tokens[str(each)] = (each // unit) ** 2
    if size is not None:
        width, height = size if isinstance(size, tuple) else (size, size)
        tokens[f"{width}x{height}"] = checked_side(width, unit=unit) * checked_side(height, unit=unit) // unit**2

    facts: dict[str, Any] = {
        "pipeline": kind,
        "transformer": transformer.kind,
        "transformer_parameters": transformer.parameters,
        "autoencoder": vae.kind,
        "autoencoder_parameters": vae.parameters,
        "upgraded": detail_channels > 0,
        "downsample_factor": factor,
        "latent_channels": channels,
        "base_channels": channels - detail_channels,
        "detail_channels": detail_channels,
        "patch_size": patch,
        "numbers_per_token": channels * patch**2,
        "transformer_width": transformer.shapes[f"{ports.output}.weight"][1],
        "scaling_factor": config.get("scaling_factor"),
        "shift_factor": config.get("shift_factor"),
        "default_size": side,
        "tokens": tokens,
        "ports": {
            "input": _describe_port(transformer, ports.input, ports.input_layout),
            "output": _describe_port(transformer, ports.output, ports.output_layout),
        },
    }
    if backbone.advice:
        facts["once_upgraded"] = backbone.advice
    facts["upgrade"] = None if facts["upgraded"] else _describe_upgrade(transformer, ports, facts)
    return facts


def _describe_port(transformer: Part, layer: str, layout: str) -> dict[str, Any]:
    return {"layer": layer, "layout": layout, "weight": list(transformer.shapes[f"{layer}.weight"])}


def _describe_upgrade(transformer: Part, ports: LatentPorts, facts: dict[str, Any]) -> dict[str, Any]:
    """The effect of the default upgrade on a base pipeline with these facts."""
    channels, factor, side = facts["latent_channels"], facts["downsample_factor"], facts["default_size"]

    # Both weights double, and so does the output port's bias.
    grown = [f"{ports.input}.weight", f"{ports.output}.weight", f"{ports.output}.bias"]
    added = sum(math.prod(transformer.shapes[name]) for name in grown if name in transformer.shapes)

    # Numbers of a token beyond the transformer's width would keep their noise (`widen.lost_directions`).
    most = facts["transformer_width"] // facts["patch_size"] ** 2 - channels
    return {
        "detail_channels": channels,
        "most_detail_channels": max(0, most),
        "latent_channels": [channels, 2 * channels],
        "downsample_factor": [factor, factor * RESOLUTION_FACTOR],
        "default_size": [side, side * RESOLUTION_FACTOR],
        "tokens_at_default_size": [facts["tokens"][str(side)]] * 2,
        "added_transformer_parameters": added,
        "changed_layers": [ports.input, ports.output],
    }


def tabulate(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of `describe` as rows for a person: name, value."""
    ports, upgrade = facts["ports"], facts["upgrade"]
    channels = f"{facts['latent_channels']} latent channels"
    if facts["upgraded"]:
        channels += f", {facts['base_channels']} base and {facts['detail_channels']} detail"
    tokens = []
    for size, count in facts["tokens"].items():
        tokens.append(f"{count:,} at {size} px" + (" (default)" if size == str(facts["default_size"]) else ""))

    rows = [
        ("pipeline", facts["pipeline"]),
        ("state", "upgraded by davae" if facts["upgraded"] else "a base, not upgraded"),
        ("transformer", f"{facts['transformer']}, {facts['transformer_parameters']:,} parameters"),
        ("autoencoder", f"{facts['autoencoder']}, {facts['autoencoder_parameters']:,} parameters"),
        ("latents", f"{channels}, downsample factor {facts['downsample_factor']}"),
        ("scale, shift", f"{facts['scaling_factor']}, {facts['shift_factor']}"),
        ("tokens", ", ".join(tokens)),
        ("token", f"{facts['numbers_per_token']} numbers, patch size {facts['patch_size']}"),
        ("width", f"{facts['transformer_width']} numbers inside the transformer"),
    ]
    for name, port in ports.items():
        rows.append((f"{name} port", f"{port['layer']} {port['weight']}, {port['layout']}"))
    if upgrade is not None:
        before, after = upgrade["default_size"]
        rows.append(
            ("an upgrade", f"{before} px -> {after} px at the same {upgrade['tokens_at_default_size'][0]:,} tokens")
        )
        added = f"{upgrade['detail_channels']} detail channels (at most {upgrade['most_detail_channels']})"
        rows.append(
            ("it adds", f"{added} and {upgrade['added_transformer_parameters']:,} parameters, to the two ports")
        )
    if "once_upgraded" in facts:
        rows.append(("once upgraded", facts["once_upgraded"]))
    return rows
