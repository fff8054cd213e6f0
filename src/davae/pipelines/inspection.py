"""Facts of a pipeline, and the changes that an upgrade would make."""

from typing import Any

from diffusers import DiffusionPipeline

from davae.backbones import backbone_of, check_parts
from davae.backbones.backbone import Size, checked_side
from davae.method.widen import measure_width, patch_side
from davae.models.base_autoencoders import downsample_factor

RESOLUTION_FACTOR = 2  # of the default upgrade


def describe(pipeline: DiffusionPipeline, size: Size | None = None) -> dict[str, Any]:
    """Facts of a pipeline as plain JSON values: factor, channels, tokens per size, ports, and the upgrade's effect.

    Tokens are counted at half the default size, at that and at twice that, and at `size`. `"upgrade"` holds the changes
    of the default upgrade (as many detail channels as base channels, twice the side length); None for a pipeline that
    is upgraded already.
    """
    check_parts(pipeline)
    transformer, config = pipeline.transformer, pipeline.vae.config
    backbone = backbone_of(transformer)
    ports, patch = backbone.ports, patch_side(transformer, backbone.ports)
    factor = downsample_factor(config)  # some pipelines' own count differs from their VAE's
    channels = transformer.config.in_channels // ports.packed**2
    detail_channels = config.get("detail_channels", 0)
    sample_size = getattr(pipeline, "default_sample_size", None) or transformer.config.get("sample_size")
    side = sample_size * factor if sample_size else backbone.picture_side(pipeline, None)

    unit = factor * patch  # side of a token in pixels
    tokens = {}
    for each in (side // 2, side, 2 * side):
        tokens[str(each)] = (each // unit) ** 2
    if size is not None:
        width, height = size if isinstance(size, tuple) else (size, size)
        tokens[f"{width}x{height}"] = checked_side(width, unit=unit) * checked_side(height, unit=unit) // unit**2

    facts: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "transformer": type(transformer).__name__,
        "transformer_parameters": transformer.num_parameters(),
        "autoencoder": type(pipeline.vae).__name__,
        "autoencoder_parameters": pipeline.vae.num_parameters(),
        "upgraded": detail_channels > 0,
        "downsample_factor": factor,
        "latent_channels": channels,
        "base_channels": channels - detail_channels,
        "detail_channels": detail_channels,
        "patch_size": patch,
        "numbers_per_token": channels * patch**2,
        "transformer_width": measure_width(transformer, ports),
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
    facts["upgrade"] = None if facts["upgraded"] else _describe_upgrade(pipeline, facts)
    return facts


def _describe_port(transformer: Any, layer: str, layout: str) -> dict[str, Any]:
    return {"layer": layer, "layout": layout, "weight": list(transformer.get_submodule(layer).weight.shape)}


def _describe_upgrade(pipeline: DiffusionPipeline, facts: dict[str, Any]) -> dict[str, Any]:
    """The effect of the default upgrade on a base pipeline with these facts."""
    channels, factor, side = facts["latent_channels"], facts["downsample_factor"], facts["default_size"]
    layers = [facts["ports"]["input"]["layer"], facts["ports"]["output"]["layer"]]

    # Both weights double, and so does the output port's bias.
    input_port, output_port = map(pipeline.transformer.get_submodule, layers)
    added = input_port.weight.numel() + sum(parameter.numel() for parameter in output_port.parameters())

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
        "changed_layers": layers,
    }
