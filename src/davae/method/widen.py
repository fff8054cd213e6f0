"""Widening: both latent ports of a transformer grow by zeros, so that it takes and gives D more channels (Sec. 3.2).

Nothing here knows a model: `davae.backbones` says where the ports of each backbone are and how they are laid out.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from davae.errors import SettingsError

Model = Any
"""A ModelMixin of diffusers, whose import takes longer than all else that `davae inspect` does."""
Transformer = TypeVar("Transformer", bound=Any)


@dataclass(frozen=True)
class LatentPorts:
    """The two layers where latents enter and leave a transformer, and where the channel axis `c` hides in each.

    Layouts are einops patterns of the weights: `d` width, `c` latent channel, `p q` patch, `k` prediction (for instance
    mean and variance). The bias of the output port has the output layout without `d`.
    """

    input: str
    """Dotted name of the patch embed."""
    input_layout: str
    """For instance `"d c p q"` for a convolution."""
    output: str
    """Dotted name of the output projection."""
    output_layout: str
    """For instance `"(p q c) d"`."""
    packed: int = 1
    """Side of the patches that the pipeline packs into channels before the transformer sees them; 1 if it does not."""
    patch: int | None = None
    """Side of the transformer's own patches, where its config has no `patch_size`."""


def patch_side(transformer: Model, ports: LatentPorts) -> int:
    """Side in latent positions of the patch in one token, packed by the pipeline or by the transformer itself."""
    return ports.packed if ports.packed > 1 else ports.patch or transformer.config.patch_size


def measure_width(transformer: Model, ports: LatentPorts) -> int:
    """How many numbers a token has inside a transformer, where its output port reads it."""
    return int(transformer.get_submodule(ports.output).weight.shape[1])


def lost_directions(transformer: Model, ports: LatentPorts) -> int:
    """In how many directions a token keeps the noise that sampling starts from, whatever the training; 0 if in none.

    A token has n = (C + D) p^2 numbers, and the output port makes them from `width` numbers. So all predictions lie in
    one affine subspace of at most `width` dimensions, while noise fills n (docs/method.md 7; RAE, arXiv 2510.11690).
    """
    numbers = transformer.config.in_channels // ports.packed**2 * patch_side(transformer, ports) ** 2
    return max(0, numbers - measure_width(transformer, ports))


def pad_channels(weight: Tensor, layout: str, detail_channels: int, *, patch: int = 1, predictions: int = 1) -> Tensor:
    """A port's weight or bias with `detail_channels` zero channels behind the old ones of its axis `c`.

    `layout` is its einops pattern, `patch` the side of the axes p and q, and `predictions` the length of the axis k.
    """
    channels_last, sizes = _put_channels_last(layout, patch, predictions)
    padded = pad(rearrange(weight, f"{layout} -> {channels_last}", **sizes), (0, detail_channels))
    return rearrange(padded, f"{channels_last} -> {layout}", **sizes).contiguous()


def _put_channels_last(layout: str, patch: int, predictions: int) -> tuple[str, dict[str, int]]:
    """The same axes without brackets, `c` behind the others; and the sizes of those that share brackets with it."""
    axes = layout.replace("(", " ").replace(")", " ").split()
    axes.remove("c")
    sizes = {"p": patch, "q": patch, "k": predictions}
    return " ".join([*axes, "c"]), {axis: size for axis, size in sizes.items() if axis in axes and "(" in layout}


def widen_ports(
    transformer: Transformer, ports: LatentPorts, *, base_channels: int, detail_channels: int
) -> Transformer:
    """A transformer of the same class for base_channels + detail_channels latent channels that starts as the base.

    For any finite detail input its first `base_channels` outputs are the base's and the others are zero (of each
    prediction, if there are several), to the last bit wherever the matrix kernels add in the same order for both
    widths. All tensors but the ports are shared with `transformer`, not copied: training one in place trains the other.
    """
    from accelerate import init_empty_weights

    _check_channels(transformer, ports, base_channels=base_channels, detail_channels=detail_channels)

    # `_use_default_values` names the arguments that were left out: `from_config` would ignore what is given for them.
    settings = dict(transformer.config)
    settings.pop("_use_default_values", None)
    for name in ("in_channels", "out_channels"):
        if settings.get(name) is not None:
            settings[name] = settings[name] * (base_channels + detail_channels) // base_channels
    with init_empty_weights(include_buffers=False):
        widened = type(transformer).from_config(settings)

    tensors = transformer.state_dict()
    foreign = sorted(tensors.keys() ^ widened.state_dict().keys())
    if foreign:
        raise SettingsError(
            f"this {type(transformer).__name__} is not as its class builds it: {', '.join(foreign[:3])} "
            f"({len(foreign)} tensors in all) differ; fuse or unload adapters, and widen before you quantise"
        )

    # Zeros for the new channels. The input port's bias keeps its shape, but is not shared: the ports are trained.
    for name in list(tensors):
        if name.rpartition(".")[0] == ports.input:
            tensors[name] = tensors[name].clone()
    layouts, sizes = _port_layouts(transformer, ports, base_channels)
    with torch.no_grad():
        for name, layout in layouts.items():
            tensors[name] = pad_channels(tensors[name], layout, detail_channels, **sizes)
    widened.load_state_dict(tensors, assign=True)
    _copy_state(transformer, widened)
    return widened


def _check_channels(transformer: Model, ports: LatentPorts, *, base_channels: int, detail_channels: int) -> None:
    channels = transformer.config.in_channels // ports.packed**2
    if base_channels != channels:
        raise SettingsError(
            f"base_channels={base_channels}, but this {type(transformer).__name__} has {channels} latent channels "
            f"(in_channels={transformer.config.in_channels}): pass base_channels={channels}"
        )
    if detail_channels < 1:
        raise SettingsError(f"detail_channels={detail_channels} must be 1 or more")

    # Zeros can be appended to plain weights only.
    for name in (ports.input, ports.output):
        layer = transformer.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer.weight) is not nn.Parameter:
            raise SettingsError(
                f"the port {name} of this {type(transformer).__name__} is a {type(layer).__name__} with a "
                f"{type(getattr(layer, 'weight', None)).__name__} for its weight, not a plain layer: "
                "fuse or unload adapters, and widen before you quantise"
            )


def _copy_state(source: Model, target: Model) -> None:
    """Everything that a state dict does not hold: buffers of positions, `requires_grad`, modes, checkpointing."""
    for name, buffer in source.named_buffers():  # positions on the base's grid, persistent or not
        owner, _, attribute = name.rpartition(".")
        setattr(target.get_submodule(owner), attribute, buffer)
    for name, parameter in source.named_parameters():
        target.get_parameter(name).requires_grad_(parameter.requires_grad)
    for name, module in source.named_modules():  # `from_config` returns everything in train mode
        target.get_submodule(name).training = module.training
    if source.is_gradient_checkpointing:
        target.enable_gradient_checkpointing()


def _port_layouts(transformer: Model, ports: LatentPorts, channels: int) -> tuple[dict[str, str], dict[str, int]]:
    """Layout of every tensor with a channel axis, which has `channels`; and their `patch` and `predictions`."""
    tensors, patch = transformer.state_dict(), patch_side(transformer, ports)
    layouts = {f"{ports.input}.weight": ports.input_layout, f"{ports.output}.weight": ports.output_layout}
    if f"{ports.output}.bias" in tensors:
        layouts[f"{ports.output}.bias"] = ports.output_layout.removesuffix(" d")
    predictions = len(tensors[f"{ports.output}.weight"]) // (patch * patch * channels)
    return layouts, {"patch": patch, "predictions": predictions}


PortsStart = Literal["zero", "random", "repeat"]


@torch.no_grad()
def start_ports(
    transformer: Model, ports: LatentPorts, *, base_channels: int, start: PortsStart, generator: torch.Generator
) -> None:
    """Start the new half of a widened transformer's ports in place, otherwise than at zero (docs/method.md 9).

    "random" starts the new weights as torch starts a layer of the widened size. "repeat" gives the base's weights to
    each channel of its group, and keeps the sum over the input: where the group mean of the detail channels is the base
    latent, the base prediction is the base's.
    """
    if start == "zero":
        return
    channels = transformer.config.in_channels // ports.packed**2
    detail_channels = channels - base_channels
    if start == "repeat" and detail_channels % base_channels:
        raise SettingsError(
            f"{detail_channels} detail channels are no multiple of {base_channels}, so the "
            'base\'s rows cannot be repeated: use "zero" or "random"'
        )

    # In each tensor of a port, keep the base's channels and make the others anew.
    tensors, ratio = transformer.state_dict(), detail_channels // base_channels
    layouts, sizes = _port_layouts(transformer, ports, channels)
    for name, layout in layouts.items():
        channels_last, axes = _put_channels_last(layout, **sizes)
        base = rearrange(tensors[name], f"{layout} -> {channels_last}", **axes)[..., :base_channels]
        if start == "random":
            fan_in = tensors[f"{name.rpartition('.')[0]}.weight"][0].numel()
            uniform = torch.rand((*base.shape[:-1], detail_channels), generator=generator)
            new = ((2 * uniform - 1) / fan_in**0.5).to(base)
        else:
            if name.startswith(f"{ports.input}."):
                base = base / (1 + ratio)
            new = base.repeat_interleave(ratio, dim=-1)
        tensors[name].copy_(rearrange(torch.cat([base, new], dim=-1), f"{channels_last} -> {layout}", **axes))
