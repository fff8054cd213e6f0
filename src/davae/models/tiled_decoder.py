"""AutoencoderKL's decoder over tiles, exactly: each group norm sees the whole picture, each convolution its neighbours.

Tiles that are decoded on their own differ from the whole, wherever they are cut and however they are blended: each has
its own statistics in every group norm. So the tiles take one layer at a time here. A layer's output for the whole
picture lies in `storage`, with mean and variance of each channel; the next layer reads a tile of it and one position
around. The middle block, whose attention sees the whole picture, runs at once: it is at the latents' resolution.

Imports torch and diffusers only, so that this one file can lie beside weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn


def can_decode_tiles(decoder: nn.Module) -> bool:
    """Whether a decoder is made of the layers that `decode_tiles` knows."""
    return isinstance(decoder, Decoder) and all(isinstance(block, UpDecoderBlock2D) for block in decoder.up_blocks)


def decode_tiles(decoder: Decoder, hidden: Tensor, *, tile: int, storage: torch.device | str) -> Tensor:
    """What `decoder(hidden)` is, but for rounding.

    Args:
        decoder: one that `can_decode_tiles`.
        hidden: [B, Ci, h, w].
        tile: side of a tile in positions of `hidden`; behind each doubling it is twice that.
        storage: where the layers of the whole picture are kept. In memory of its own ("cpu", for a model on a GPU), the
            GPU holds a tile of one layer only, and what is moved there and back takes longer than the decoding itself.

    Returns:
        [B, 3, H, W] on the device of `hidden`.
    """
    device = hidden.device
    layer = _Layer(decoder.mid_block(decoder.conv_in(hidden), None), storage)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            layer = _resnet(resnet, layer, tile, device)
        for upsampler in block.upsamplers or ():
            source = layer
            layer = _tiled(
                layer,
                lambda rows, columns: F.interpolate(source.read(rows, columns, device), scale_factor=2.0),  # noqa: B023
                upsampler.conv,
                tile,
                up=2,
            )
            tile *= 2
    last = layer
    picture = _tiled(
        last,
        lambda rows, columns: decoder.conv_act(last.normalised(decoder.conv_norm_out, rows, columns, device)),
        decoder.conv_out,
        tile,
    )
    return picture.values.to(device)


class _Layer:
    """A layer's output for the whole picture, and mean and variance of each of its channels in float64."""

    def __init__(self, values: Tensor, storage: torch.device | str, *, filled: bool = True) -> None:
        self.values = values.to(storage)
        self.count = 0
        self.mean = self.variance = torch.zeros(values.shape[:2], dtype=torch.float64)
        if filled:
            self._account(values)

    def _account(self, piece: Tensor) -> None:
        """Take a piece into the statistics, by the rule for the variance of two sets together."""
        wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
        variance, mean = (found.double().cpu() for found in torch.var_mean(wide, dim=(2, 3), correction=0))
        number, before = piece.shape[2] * piece.shape[3], self.count
        self.count = before + number
        share, apart = number / self.count, mean - self.mean
        self.variance = (1 - share) * self.variance + share * variance + share * (1 - share) * apart.square()
        self.mean = self.mean + share * apart

    def write(self, piece: Tensor, top: int, left: int) -> None:
        height, width = piece.shape[2:]
        self.values[..., top : top + height, left : left + width] = piece
        self._account(piece)

    def read(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        return self.values[..., rows, columns].to(device)

    def normalised(self, norm: nn.GroupNorm, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """A piece after a group norm with the statistics of the whole."""
        piece = self.read(rows, columns, device)
        means = self.mean.unflatten(1, (norm.num_groups, -1))
        mean = means.mean(dim=2, keepdim=True)
        variance = (self.variance.unflatten(1, means.shape[1:]) + (means - mean).square()).mean(dim=2, keepdim=True)
        wide = torch.promote_types(piece.dtype, torch.float32)
        hook = getattr(norm, "_hf_hook", None)  # accelerate's: offloaded weights are there between these two calls only
        if hook is not None:
            hook.pre_forward(norm)
        weight, bias = (own.to(device, wide) for own in (norm.weight, norm.bias))
        if hook is not None:
            hook.post_forward(norm, None)
        scale = (variance + norm.eps).rsqrt().expand_as(means).flatten(1).to(device, wide) * weight
        shift = bias - mean.expand_as(means).flatten(1).to(scale) * scale
        return torch.addcmul(shift[..., None, None], piece, scale[..., None, None]).to(piece.dtype)


def _resnet(block: ResnetBlock2D, source: _Layer, tile: int, device: torch.device) -> _Layer:
    """norm, activation, convolution, twice, beside a shortcut."""
    middle = _tiled(
        source,
        lambda rows, columns: block.nonlinearity(source.normalised(block.norm1, rows, columns, device)),
        block.conv1,
        tile,
    )

    def shortcut(rows: slice, columns: slice) -> Tensor:
        piece = source.read(rows, columns, device)
        return piece if block.conv_shortcut is None else block.conv_shortcut(piece)

    return _tiled(
        middle,
        lambda rows, columns: block.nonlinearity(middle.normalised(block.norm2, rows, columns, device)),
        block.conv2,
        tile,
        beside=shortcut,
        divided_by=block.output_scale_factor,
    )


def _tiled(
    source: _Layer,
    before: Callable[[slice, slice], Tensor],
    conv: nn.Conv2d,
    tile: int,
    *,
    up: int = 1,
    beside: Callable[[slice, slice], Tensor] | None = None,
    divided_by: float = 1.0,
) -> _Layer:
    """A 3x3 convolution of what `before` makes of the source's rows and columns, tile by tile."""
    batch, _, height, width = source.values.shape
    shape = (batch, conv.out_channels, up * height, up * width)
    made = _Layer(source.values.new_empty(shape), source.values.device, filled=False)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            rows, columns = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
            piece = conv(before(rows, columns))
            if beside is not None:
                piece = (piece + beside(rows, columns)) / divided_by
            y, x = up * (top - rows.start), up * (left - columns.start)
            piece = piece[..., y : y + up * (bottom - top), x : x + up * (right - left)]
            made.write(piece, up * top, up * left)
    return made
