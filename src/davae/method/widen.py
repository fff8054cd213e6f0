"""Widening: both latent ports of a transformer grow by zeros, so that it takes and gives D more channels (Sec. 3.2).

Nothing here knows a model: `davae.backbones` says where the ports of each backbone are and how they are laid out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from davae.errors import SettingsError

Transformer = TypeVar("Transformer", bound=ModelMixin)


@dataclass(frozen=True)
class LatentPorts:
    """The two layers where latents enter and leave a transformer, and where the channel axis `c` hides in each.

    Layouts are einops patterns of the weights: `d` width, `c` latent channel, `p q` patch, `k` prediction (for instance
    mean and variance). The bias of the output port has the output layout without `d`.
    """

    input: str
    """Dotted name of the patch embed."""
    input_layout: str
    """Layout of its weight, for instance `"d c p q"` for a convolution."""
    output: str
    """Dotted name of the output projection."""
    output_layout: str
    """Layout of its weight, for instance `"(p q c) d"`."""
    packed: int = 1
    """Side of the patches that the pipeline packs into channels before the transformer sees them; 1 if it does not."""
    patch: int | None = None
    """Side of the transformer's own patches, where its config has no `patch_size`."""


def patch_side(transformer: ModelMixin, ports: LatentPorts) -> int:
    """Side in latent positions of what one token holds, packed by the pipeline or by the transformer itself."""
    return ports.packed if ports.packed > 1 else ports.patch or transformer.config.patch_size


def width_of(transformer: ModelMixin, ports: LatentPorts) -> int:
    """How wide a transformer is: how many numbers its output port takes for a token."""
    return int(transformer.get_submodule(ports.output).weight.shape[1])


def lost_directions(transformer: ModelMixin, ports: LatentPorts) -> int:
    """In how many directions a token keeps the noise that sampling starts from, whatever the training; 0 if in none.

    A token has n = (C + D) p^2 numbers, and the output port makes them of as many as the transformer is wide. So all of
    its predictions lie in one affine subspace of at most `width` dimensions, at every time and for every prompt, while
    noise fills n. In the n - width others a sampler adds nothing but a constant, and flow matching's loss is that of
    the noise at least, (n - width) / n in all (docs/method.md; RAE, arXiv 2510.11690).
    """
    numbers = transformer.config.in_channels // ports.packed**2 * patch_side(transformer, ports) ** 2
    return max(0, numbers - width_of(transformer, ports))


def pad_channels(weight: Tensor, layout: str, detail_channels: int, **axes: int) -> Tensor:
    """Append `detail_channels` zero channels to the axis `c` of a port's weight or bias.

    Args:
        weight: the tensor to pad.
        layout: its einops pattern; `c` is the latent channel, alone or inside a flattened axis.
        detail_channels: how many channels to add.
        **axes: the sizes of the axes that share brackets with `c`, for instance `p=2, q=2, k=1`.

    Returns:
        A new tensor of the same layout, in which the old channels come first and the new ones are zero.
    """
    others = [axis for axis in layout.replace("(", " ").replace(")", " ").split() if axis != "c"]
    channels_last = " ".join([*others, "c"])
    padded = pad(rearrange(weight, f"{layout} -> {channels_last}", **axes), (0, detail_channels))
    return rearrange(padded, f"{channels_last} -> {layout}", **axes).contiguous()


def widen_ports(
    transformer: Transformer, ports: LatentPorts, *, base_channels: int, detail_channels: int
) -> Transformer:
    """A transformer of the same class for base_channels + detail_channels latent channels that starts as the base.

    For any finite detail input its first `base_channels` outputs are the base's and the others are zero (of each
    prediction, if there are several). The sums are the same but for added zeros: in float32 they agree to the last bit
    wherever the matrix kernels add in the same order for both widths, as they do for real models with patches of 2.

    All tensors but the ports are shared with `transformer`, not copied: training one in place trains the other. Mode,
    dtype, device and `requires_grad` are those of `transformer`.

    Raises:
        SettingsError: if `transformer` does not have `base_channels` latent channels, or if its layers are not the
            plain ones of its class (LoRA layers, quantised layers).
    """
    _check_channels(transformer, ports, base_channels=base_channels, detail_channels=detail_channels)
    # `_use_default_values` names the arguments that were left out: `from_config` would ignore what is given for them.
    settings = {name: value for name, value in transformer.config.items() if name != "_use_default_values"}
    grown = {
        name: value * (base_channels + detail_channels) // base_channels
        for name in ("in_channels", "out_channels")
        if (value := transformer.config.get(name)) is not None
    }
    with init_empty_weights(include_buffers=False):
        widened = type(transformer).from_config({**settings, **grown})

    tensors = transformer.state_dict()
    if tensors.keys() != widened.state_dict().keys():
        foreign = sorted(tensors.keys() ^ widened.state_dict().keys())
        raise SettingsError(
            f"this {type(transformer).__name__} is not as its class builds it: {', '.join(foreign[:3])} "
            f"({len(foreign)} tensors in all) differ; fuse or unload adapters, and widen before you quantise"
        )
    # The input port's bias keeps its shape, and must not be the base's own, either: the ports are trained.
    own = {name: tensor.clone() for name, tensor in tensors.items() if name.rpartition(".")[0] == ports.input}
    padded = _padded_ports(transformer, ports, base_channels, detail_channels)
    widened.load_state_dict({**tensors, **own, **padded}, assign=True)
    for name, buffer in transformer.named_buffers():  # positions are those of the base's grid, persistent or not
        owner, _, attribute = name.rpartition(".")
        setattr(widened.get_submodule(owner), attribute, buffer)
    for name, parameter in transformer.named_parameters():
        widened.get_parameter(name).requires_grad_(parameter.requires_grad)
    for name, module in transformer.named_modules():  # `from_config` returns everything in train mode
        widened.get_submodule(name).training = module.training
    if transformer.is_gradient_checkpointing:
        widened.enable_gradient_checkpointing()
    return widened


def _check_channels(transformer: ModelMixin, ports: LatentPorts, *, base_channels: int, detail_channels: int) -> None:
    has = transformer.config.in_channels // ports.packed**2
    if base_channels != has:
        raise SettingsError(
            f"base_channels={base_channels}, but this {type(transformer).__name__} has {has} latent channels "
            f"(in_channels={transformer.config.in_channels}): pass base_channels={has}"
        )
    if detail_channels < 1:
        raise SettingsError(f"detail_channels={detail_channels} must be 1 or more")
    for name in (ports.input, ports.output):
        layer = transformer.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or type(layer.weight) is not nn.Parameter:
            raise SettingsError(
                f"the port {name} of this {type(transformer).__name__} is a {type(layer).__name__} with a "
                f"{type(getattr(layer, 'weight', None)).__name__} for its weight, not a plain layer: "
                "fuse or unload adapters, and widen before you quantise"
            )


def _padded_ports(
    transformer: ModelMixin, ports: LatentPorts, base_channels: int, detail_channels: int
) -> Mapping[str, Tensor]:
    """The state-dict entries of both ports, padded; the bias of the input port has no channel axis and stays."""
    tensors = transformer.state_dict()
    with torch.no_grad():
        return {
            name: pad_channels(tensors[name], layout, detail_channels, **axes)
            for name, (layout, axes) in _port_layouts(transformer, ports, base_channels).items()
        }


def _port_layouts(
    transformer: ModelMixin, ports: LatentPorts, channels: int
) -> Mapping[str, tuple[str, dict[str, int]]]:
    """Layout and sizes of the axes in its brackets, of every tensor with a channel axis, which has `channels`."""
    tensors = transformer.state_dict()
    rows = tensors[f"{ports.output}.weight"].shape[0]
    layouts = {
        f"{ports.input}.weight": ports.input_layout,
        f"{ports.output}.weight": ports.output_layout,
        f"{ports.output}.bias": ports.output_layout.removesuffix(" d"),
    }
    patch = patch_side(transformer, ports)
    return {
        name: (layout, bracket_sizes(layout, patch=patch, predictions=rows // (patch * patch * channels)))
        for name, layout in layouts.items()
        if name in tensors
    }


def bracket_sizes(layout: str, *, patch: int, predictions: int) -> dict[str, int]:
    """What `pad_channels` must be told of a layout: the sizes of the axes in its brackets, but for the channels'."""
    sizes = {"p": patch, "q": patch, "k": predictions}
    return {axis: size for axis, size in sizes.items() if axis in layout and "(" in layout}


PortsStart = Literal["zero", "random", "repeat"]


@torch.no_grad()
def start_ports(
    transformer: ModelMixin,
    ports: LatentPorts,
    *,
    base_channels: int,
    start: PortsStart,
    generator: torch.Generator,
) -> None:
    """Start the new half of a widened transformer's ports otherwise than at zero, to compare (docs/method.md 9).

    With r = D / C detail channels to each base channel, and consecutive channels in a group:

    - "zero": as `widen_ports` leaves them, the warm start of the method; nothing is changed.
    - "random": the new weights and biases as torch starts a layer of the widened size, uniform in +-1/sqrt(fan in).
      The base's own stay, so its prediction is disturbed by what the detail channels add to the tokens.
    - "repeat": the input weights of base channel i, divided by 1 + r, for it and for each channel of its group, and the
      output weights of channel i for each channel of its group. The sum over the input is kept: where the group mean
      of the detail channels is the base latent, the base prediction is the base's, and so is each detail channel's.

    Args:
        transformer: widened; its ports are changed in place.
        ports: where they are.
        base_channels: C.
        start: which of the three.
        generator: of the random numbers, on the CPU.

    Raises:
        SettingsError: "repeat" with detail channels that are no multiple of the base's.
    """
    if start == "zero":
        return
    channels = transformer.config.in_channels // ports.packed**2
    ratio, left = divmod(channels - base_channels, base_channels)
    if start == "repeat" and left:
        raise SettingsError(
            f"{channels - base_channels} detail channels are no multiple of {base_channels}, so the "
            'base\'s rows cannot be repeated: use "zero" or "random"'
        )
    tensors = transformer.state_dict()
    for name, (layout, axes) in _port_layouts(transformer, ports, channels).items():
        others = [axis for axis in layout.replace("(", " ").replace(")", " ").split() if axis != "c"]
        pattern = " ".join([*others, "c"])
        weight = rearrange(tensors[name], f"{layout} -> {pattern}", **axes)
        base = weight[..., :base_channels]
        if start == "random":
            fan_in = tensors[f"{name.rpartition('.')[0]}.weight"][0].numel()
            uniform = torch.rand((*base.shape[:-1], channels - base_channels), generator=generator)
            new = ((2 * uniform - 1) / fan_in**0.5).to(weight)
        else:
            base = base / (1 + ratio) if name.startswith(f"{ports.input}.") else base
            new = base.repeat_interleave(ratio, dim=-1)
        tensors[name].copy_(rearrange(torch.cat([base, new], dim=-1), f"{pattern} -> {layout}", **axes))
