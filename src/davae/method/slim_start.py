"""A start for a slim joint decoder without training: some of the full one's channels, each layer by least squares.

No start of a narrower decoder is exact: fewer channels cannot hold what more of them do. What comes near takes one
layer at a time, from the latents outwards. The slim layer has as its goal some of the full layer's channels, those from
which the others are predicted best; its input is what the slim layers before it make of the same pictures, errors
included, so that the fit makes up for them where it can (He, Zhang and Sun, arXiv 1707.06168, prune so). Channels are
chosen by whole groups of the next norm, which then has the same statistics, and keeps scale and shift of its channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from davae.errors import NumericsError, SettingsError
from davae.method.closed_form import least_squares
from davae.models.autoencoder_da import AutoencoderDA
from davae.seeds import generator

ROWS = 16
"""Positions for each unknown of a fit."""


@torch.no_grad()
def fit_slim_decoder(slim: AutoencoderDA, full: AutoencoderDA, pictures: Tensor, *, seed: int = 0) -> float:
    """Set the joint decoder of `slim`, which `slim_decoder.slimmed` made of `full`, from `pictures` [N, 3, H, W].

    The inner stages that both have in the same shapes are copies already, and stay.

    Args:
        slim: changed in place.
        full: the autoencoder with the full decoder.
        pictures: in [-1, 1]; some dozens. One layer's output for all of them is in memory at a time.
        seed: of the positions that are fitted.

    Returns:
        The mean squared difference of the two decoders' pictures on these, in the scale of [-1, 1].

    Raises:
        SettingsError: the innermost stage is narrower, and there are no linear blocks: no layer then has the latents
            for its input.
        NumericsError: a decoder's pictures are not finite.
    """
    ours: Decoder = slim.joint_decoder
    theirs: Decoder = full.joint_decoder
    if not isinstance(ours.conv_in, nn.Conv2d) and len(ours.mid_block.resnets[0].norm1.weight) != len(
        theirs.mid_block.resnets[0].norm1.weight
    ):
        raise SettingsError(
            "decoder_block_out_channels: the innermost stage is narrower than the base's, and without linear blocks "
            'nothing can be fitted to that. Keep its width, or use start="closed form"'
        )
    seen: list[Tensor] = []
    hook = theirs.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in pictures.split(8):
        full.decode(full.encode(batch.to(full.device, full.dtype)).latent_dist.mode())
    hook.remove()
    hidden = torch.cat(seen)
    walk = _Walk(hidden, hidden, torch.arange(hidden.shape[1]), seed)
    _walk(walk, ours, theirs)
    error = (walk.slim - walk.full).double().square().mean().item()
    if not torch.tensor(error).isfinite():
        raise NumericsError("the decoders' pictures are not finite: the autoencoder is damaged")
    return error


@dataclass
class _Walk:
    """Both decoders' outputs of the layer reached: `slim`'s channels stand for the `chosen` ones of `full`."""

    slim: Tensor
    full: Tensor
    chosen: Tensor
    seed: int

    @property
    def exact(self) -> bool:
        return torch.equal(self.slim, self.full)


def _walk(walk: _Walk, slim: Decoder, full: Decoder) -> None:
    if isinstance(slim.conv_in, nn.Conv2d):
        _convolution(walk, slim.conv_in, full.conv_in, groups=full.mid_block.resnets[0].norm1.num_groups)
    middle = zip(slim.mid_block.attentions, full.mid_block.attentions, strict=True)
    for place, (ours, theirs) in enumerate([(None, None), *middle]):
        if ours is not None:
            if not walk.exact:  # its queries and keys are of all channels: without it at first
                ours.to_out[0].weight.zero_()
                ours.to_out[0].bias.zero_()
            walk.slim, walk.full = ours(walk.slim), theirs(walk.full)
        _resnet(walk, slim.mid_block.resnets[place], [full.mid_block.resnets[place]], walk.full)
    for ours, theirs in zip(slim.up_blocks, full.up_blocks, strict=True):
        last = walk.full
        for resnet in theirs.resnets:
            last = resnet(last, None)
        for place, resnet in enumerate(ours.resnets):
            end = place + 1 if place + 1 < len(ours.resnets) else len(theirs.resnets)
            _resnet(walk, resnet, list(theirs.resnets[place:end]), last)
        for our_up, their_up in zip(ours.upsamplers or (), theirs.upsamplers or (), strict=True):
            walk.slim, walk.full = (F.interpolate(each, scale_factor=2.0) for each in (walk.slim, walk.full))
            _convolution(walk, our_up.conv, their_up.conv, groups=full.conv_norm_out.num_groups)
    _norm(slim.conv_norm_out, full.conv_norm_out, walk.chosen)
    walk.slim, walk.full = slim.conv_act(slim.conv_norm_out(walk.slim)), full.conv_act(full.conv_norm_out(walk.full))
    _convolution(walk, slim.conv_out, full.conv_out, groups=1)


def _convolution(walk: _Walk, slim: nn.Conv2d, full: nn.Conv2d, *, groups: int) -> None:
    """One layer alone, to the channels of `full` that stand for the others best."""
    target, copied = full(walk.full), walk.exact and slim.weight.shape == full.weight.shape
    walk.chosen = _choose(target, slim.out_channels, groups)
    if not copied:
        _fit([slim], [walk.slim], target[:, walk.chosen], walk.seed)
    walk.slim, walk.full = slim(walk.slim), target


def _resnet(walk: _Walk, slim: ResnetBlock2D, full: Sequence[ResnetBlock2D], stage: Tensor) -> None:
    """One residual block for one or several; `stage` is what the full decoder has at the end of them all."""
    first, target = full[0], walk.full
    for block in full:
        target = block(target, None)
    same = [p.shape for p in slim.parameters()] == [p.shape for p in first.parameters()]
    if walk.exact and same and len(full) == 1:
        walk.chosen = torch.arange(slim.conv2.out_channels)
    else:
        hidden = first.conv1(first.nonlinearity(first.norm1(walk.full)))
        features = first.nonlinearity(first.norm2(hidden))
        inner = _choose(features, slim.conv1.out_channels, first.norm2.num_groups)
        _norm(slim.norm1, first.norm1, walk.chosen)
        _norm(slim.norm2, first.norm2, inner)
        before = slim.nonlinearity(slim.norm1(walk.slim))
        _fit([slim.conv1], [before], hidden[:, inner], walk.seed)
        if first.conv_shortcut is not None or len(walk.chosen) != slim.conv2.out_channels:
            walk.chosen = _choose(stage, slim.conv2.out_channels, first.norm2.num_groups)
        behind = slim.nonlinearity(slim.norm2(slim.conv1(before)))
        wanted = target[:, walk.chosen] * slim.output_scale_factor
        if slim.conv_shortcut is None:
            _fit([slim.conv2], [behind], wanted - walk.slim, walk.seed)
        else:
            _fit([slim.conv2, slim.conv_shortcut], [behind, walk.slim], wanted, walk.seed)
    walk.slim, walk.full = slim(walk.slim, None), target


def _norm(slim: nn.GroupNorm, full: nn.GroupNorm, chosen: Tensor) -> None:
    slim.weight.copy_(full.weight[chosen])
    slim.bias.copy_(full.bias[chosen])


def _choose(values: Tensor, count: int, groups: int) -> Tensor:
    """Numbers, rising, of `count` channels of [N, C, h, w] that predict the others well: whole groups of a norm.

    A Cholesky decomposition of their covariance with pivots: the next group is that of which the least is known yet.
    """
    channels = values.shape[1]
    if count == channels:
        return torch.arange(channels)
    rest = torch.cov(values.double().transpose(0, 1).flatten(1))
    chosen: list[Tensor] = []
    for _ in range(count * groups // channels):
        unknown = rest.diagonal().unflatten(0, (groups, -1)).sum(dim=1)
        unknown[[int(each[0]) * groups // channels for each in chosen]] = -torch.inf
        group = torch.arange(channels).unflatten(0, (groups, -1))[unknown.argmax()]
        chosen.append(group)
        rest = rest - rest[:, group] @ torch.linalg.pinv(rest[group][:, group], hermitian=True) @ rest[group]
    return torch.cat(chosen).sort().values


def _fit(convolutions: list[nn.Conv2d], sources: list[Tensor], target: Tensor, seed: int) -> None:
    """Weights of convolutions whose outputs are added, to make `target` of their `sources`; the first has the bias."""
    number, _, height, width = target.shape
    sizes = [conv.weight[0].numel() for conv in convolutions]
    each = min(height * width, -(-ROWS * sum(sizes) // number))
    at = torch.randperm(height * width, generator=generator(seed, "positions"))[:each]
    rows = [_patches(source, conv.kernel_size[0], at) for source, conv in zip(sources, convolutions, strict=True)]
    wanted = target.flatten(2)[:, :, at].double().transpose(0, 1).flatten(1)
    weights, bias = least_squares(torch.cat(rows), wanted)
    for conv, part in zip(convolutions, weights.split(sizes, dim=1), strict=True):
        conv.weight.copy_(part.unflatten(1, conv.weight.shape[1:]))
        assert conv.bias is not None, "a decoder's convolutions have biases"
        conv.bias.copy_(bias[:, 0] if conv is convolutions[0] else torch.zeros_like(conv.bias))


def _patches(source: Tensor, side: int, at: Tensor) -> Tensor:
    """What a convolution of `side` reads at positions `at` of each picture, [channels x side^2, N x positions]."""
    height, width = source.shape[2:]
    padded = F.pad(source, [side // 2] * 4)
    shifted = [
        padded[:, :, top : top + height, left : left + width].flatten(2)[:, :, at]
        for top in range(side)
        for left in range(side)
    ]
    return torch.stack(shifted, dim=2).double().flatten(1, 2).transpose(0, 1).flatten(1)
