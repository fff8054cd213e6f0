"""What a pipeline is, in davae's terms, and what an upgrade would change of it."""

from typing import Any

from diffusers import DiffusionPipeline, ModelMixin

from davae.backbones import backbone_of, check_parts
from davae.backbones.sizes import Size, checked_side
from davae.method.widen import LatentPorts, patch_side, width_of
from davae.models.base_autoencoders import downsample_factor

_RESOLUTION_FACTOR = 2


def describe(pipeline: DiffusionPipeline, size: Size | None = None) -> dict[str, Any]:
    """Facts of a pipeline as plain JSON values: factor, channels, tokens per size, ports, and the upgrade's effect.

    Tokens are of half the default size, of that and of twice that, and of `size`, by width and height.

    A token of more numbers than the transformer is wide keeps noise (`davae.method.widen.lost_directions`), which is
    where `"most_detail_channels"` comes from.

    `"upgrade"` is None for a pipeline that is upgraded already; for a base pipeline it says what the default upgrade
    (as many detail channels as base channels, twice the side length) would change.

    Raises:
        SettingsError: if there is no transformer or no autoencoder, or the transformer's backbone is unknown; or a side
            of `size` is no multiple of downsample factor x patch.
    """
    check_parts(pipeline)
    transformer, autoencoder = pipeline.transformer, pipeline.vae
    backbone = backbone_of(transformer)
    ports = backbone.ports
    patch = patch_side(transformer, ports)
    factor = downsample_factor(autoencoder.config)  # not every pipeline's own count is its VAE's
    channels = transformer.config.in_channels // ports.packed**2
    detail_channels = autoencoder.config.get("detail_channels", 0)
    sample_size = getattr(pipeline, "default_sample_size", None) or transformer.config.get("sample_size")
    side = sample_size * factor if sample_size else backbone.picture_side(pipeline, None)
    sizes = {str(each): (each, each) for each in sorted({side // 2, side, 2 * side})}
    if size is not None:
        sides = (size, size) if isinstance(size, int) else size
        width, height = (checked_side(each, unit=factor * patch) for each in sides)
        sizes[f"{width}x{height}"] = width, height
    facts: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "transformer": type(transformer).__name__,
        "transformer_parameters": transformer.num_parameters(),
        "autoencoder": type(autoencoder).__name__,
        "autoencoder_parameters": autoencoder.num_parameters(),
        "upgraded": detail_channels > 0,
        "downsample_factor": factor,
        "latent_channels": channels,
        "base_channels": channels - detail_channels,
        "detail_channels": detail_channels,
        "patch_size": patch,
        "numbers_per_token": channels * patch**2,
        "transformer_width": width_of(transformer, ports),
        "scaling_factor": autoencoder.config.get("scaling_factor"),
        "shift_factor": autoencoder.config.get("shift_factor"),
        "default_size": side,
        "tokens": {
            name: (width // factor // patch) * (height // factor // patch) for name, (width, height) in sizes.items()
        },
        "ports": {
            name: {"layer": layer, "layout": layout, "weight": list(_layer(transformer, layer).weight.shape)}
            for name, layer, layout in (
                ("input", ports.input, ports.input_layout),
                ("output", ports.output, ports.output_layout),
            )
        },
    }
    if backbone.advice:
        facts["once_upgraded"] = backbone.advice
    facts["upgrade"] = None if facts["upgraded"] else _upgrade_effect(transformer, ports, channels, factor, side, patch)
    return facts


def _upgrade_effect(
    transformer: ModelMixin, ports: LatentPorts, channels: int, factor: int, side: int, patch: int
) -> dict[str, Any]:
    entry, leave = _layer(transformer, ports.input), _layer(transformer, ports.output)
    added = entry.weight.numel() + leave.weight.numel() + (0 if leave.bias is None else leave.bias.numel())
    return {
        "detail_channels": channels,
        "most_detail_channels": max(0, width_of(transformer, ports) // patch**2 - channels),
        "latent_channels": [channels, 2 * channels],
        "downsample_factor": [factor, factor * _RESOLUTION_FACTOR],
        "default_size": [side, side * _RESOLUTION_FACTOR],
        "tokens_at_default_size": [(side // factor // patch) ** 2] * 2,
        "added_transformer_parameters": added,
        "changed_layers": [ports.input, ports.output],
    }


def _layer(transformer: ModelMixin, name: str) -> Any:
    return transformer.get_submodule(name)
