"""Tiles of large images: exact ones for AutoencoderKL's decoder, blended ones for everything else.

Tiles that are decoded on their own differ from the whole, because every group norm sees the statistics of one tile. So
`decode_tiles` takes all tiles through one layer at a time, and keeps mean and variance of its whole output.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn

from davae.models.offloading import weights_in_place
from davae.models.precision import at_least_float32

Window = tuple[slice, slice]  # rows and columns of a layer
Sides = tuple[int, int]  # height and width of a tile


class TileSettings:
    """The settings of an AutoencoderDA's tiles, in pixels, under the names that base autoencoders have for them."""

    use_slicing = False
    use_tiling = False
    tile_sample_min_height = 1024
    tile_sample_min_width = 1024
    """Sides of a tile; images no larger are never tiled."""
    tile_sample_stride_height = 768.0
    tile_sample_stride_width = 768.0
    """From one tile to the next, where tiles are blended."""
    tile_storage: torch.device | str = "cpu"
    """Where the layers of the whole image lie while AutoencoderKL's decoder goes over tiles of them."""

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Tile larger images; a stride that is not given keeps its part of its side."""
        given = {
            "height": (tile_sample_min_height, tile_sample_stride_height),
            "width": (tile_sample_min_width, tile_sample_stride_width),
        }
        for axis, (side, stride) in given.items():
            before = getattr(self, f"tile_sample_min_{axis}"), getattr(self, f"tile_sample_stride_{axis}")
            side = side or before[0]
            step = stride or side * before[1] / before[0]
            if not 0 < step <= side:
                raise ValueError(f"tile_sample_stride_{axis}={step}: allowed are 1 to {side}, the side of a tile")
            setattr(self, f"tile_sample_min_{axis}", side)
            setattr(self, f"tile_sample_stride_{axis}", step)
        self.use_tiling = True

    @property
    def tile_sample_size(self) -> int:
        """The longer side of a tile; setting it makes tiles square, with the same overlap."""
        return max(self.tile_sample_min_height, self.tile_sample_min_width)

    @tile_sample_size.setter
    def tile_sample_size(self, side: int) -> None:
        overlap = self.tile_overlap
        self.tile_sample_min_height = self.tile_sample_min_width = side
        self.tile_overlap = overlap

    @property
    def tile_overlap(self) -> float:
        """Part of a tile's height that it shares with its neighbour, where tiles are blended; set for both sides."""
        return 1 - self.tile_sample_stride_height / self.tile_sample_min_height

    @tile_overlap.setter
    def tile_overlap(self, overlap: float) -> None:
        self.tile_sample_stride_height = self.tile_sample_min_height * (1 - overlap)
        self.tile_sample_stride_width = self.tile_sample_min_width * (1 - overlap)

    tile_sample_min_size = tile_sample_size
    tile_overlap_factor = tile_overlap

    def tile_sides(self, pixels: int) -> Sides:
        """Height and width of a tile in positions of so many pixels."""
        return max(1, self.tile_sample_min_height // pixels), max(1, self.tile_sample_min_width // pixels)

    def tile_strides(self, pixels: int) -> Sides:
        """From one tile to the next, down and across, in positions of so many pixels; no larger than a tile."""
        height, width = self.tile_sides(pixels)
        down = height * self.tile_sample_stride_height / self.tile_sample_min_height
        across = width * self.tile_sample_stride_width / self.tile_sample_min_width
        return min(max(1, int(down + 1e-6)), height), min(max(1, int(across + 1e-6)), width)


def run_in_pieces(
    autoencoder: ModelMixin, run: Callable[[Tensor], Tensor], x: Tensor, *, channels: int, up: int, down: int
) -> Tensor:
    """`run` on single images if an AutoencoderDA has slicing on, on `blend_tiles` if it has tiling on.

    A latent position is `down` positions of `x` and `up` positions of the output, which has `channels` channels.
    """
    sizes = {"channels": channels, "up": up, "down": down}
    if autoencoder.use_slicing and len(x) > 1:
        return torch.cat([run_in_pieces(autoencoder, run, one, **sizes) for one in x.split(1)])

    # A tile in latent positions; exact tiles are made by `decode_pixels`.
    factor = autoencoder.downsample_factor
    tile = autoencoder.tile_sides(factor)
    exact = up > 1 and has_exact_tiles(autoencoder)
    if not autoencoder.use_tiling or exact or fits_tile(x, (tile[0] * down, tile[1] * down)):
        return run(x)
    return blend_tiles(run, x, tile=tile, stride=autoencoder.tile_strides(factor), **sizes)


def fits_tile(x: Tensor, tile: Sides) -> bool:
    """Whether neither side of [B, any, H, W] is longer than a tile's."""
    return x.shape[-2] <= tile[0] and x.shape[-1] <= tile[1]


def decode_pixels(autoencoder: ModelMixin, hidden: Tensor, post_quant_conv: nn.Module | None) -> Tensor:
    """An AutoencoderDA's decoder, on exact tiles if tiling is on and it has any: images, about [-1, 1]."""
    decoder = autoencoder.joint_decoder
    if autoencoder.base.nested:
        for setting in ("use_tiling", "tile_sample_min_height", "tile_sample_min_width", "tile_storage"):
            setattr(decoder, setting, getattr(autoencoder, setting))

    # A tile in positions of the decoder's input, which is s times finer than the latents.
    tile = autoencoder.tile_sides(autoencoder.downsample_factor // autoencoder.config.resolution_factor)
    if autoencoder.use_tiling and not fits_tile(hidden, tile) and can_decode_tiles(decoder):
        hidden = hidden if post_quant_conv is None else post_quant_conv(hidden)
        return decode_tiles(decoder, hidden, tile=tile, storage=autoencoder.tile_storage)
    return autoencoder.base.decode(decoder, post_quant_conv, hidden)


def has_exact_tiles(autoencoder: ModelMixin) -> bool:
    """Whether `decode_pixels` makes the tiles of an AutoencoderDA."""
    decoder = autoencoder.joint_decoder
    return has_exact_tiles(decoder) if autoencoder.base.nested else can_decode_tiles(decoder)


def can_decode_tiles(decoder: nn.Module) -> bool:
    """Whether a decoder is made of the layers that `decode_tiles` knows."""
    return isinstance(decoder, Decoder) and all(isinstance(block, UpDecoderBlock2D) for block in decoder.up_blocks)


def decode_tiles(decoder: Decoder, hidden: Tensor, *, tile: Sides, storage: torch.device | str) -> Tensor:
    """`decoder(hidden)` but for rounding, [B, Ci, h, w] -> [B, 3, H, W]; `tile` is in positions of `hidden`.

    The layers of the whole image lie in `storage`. With "cpu" for a model on a GPU, the GPU holds one tile of a layer,
    and moving tiles takes longer than decoding them.
    """
    # The decoder's own layers, and each block's, may be offloaded until its `forward` runs, which nothing calls here.
    with weights_in_place(decoder):
        # The middle block's attention sees the whole image, at the latents' resolution.
        middle = decoder.mid_block(decoder.conv_in(hidden), None)
        layer = _Layer(torch.empty_like(middle, device=storage), hidden.device)
        layer.write(middle)

        # Every tile goes through a layer before any goes through the next.
        for block in decoder.up_blocks:
            with weights_in_place(block):
                for resnet in block.resnets:
                    layer = _run_resnet(resnet, layer, tile)
                for upsampler in block.upsamplers or ():
                    layer = _convolve(layer, partial(F.interpolate, scale_factor=2.0), upsampler.conv, tile, up=2)
                    tile = (2 * tile[0], 2 * tile[1])

        before = partial(layer.normalise, decoder.conv_norm_out, decoder.conv_act)
        return _convolve(layer, before, decoder.conv_out, tile).values.to(hidden.device)


class _Layer:
    """A layer's output for the whole image, and mean and variance of each channel so far, in float64."""

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self.values, self.device = values, device  # pieces are computed on the device
        self.count = 0
        self.mean = self.variance = torch.zeros(values.shape[:2], dtype=torch.float64)

    def write(self, piece: Tensor, top: int = 0, left: int = 0) -> None:
        height, width = piece.shape[2:]
        self.values[..., top : top + height, left : left + width] = piece
        variance, mean = torch.var_mean(at_least_float32(piece), dim=(2, 3), correction=0)

        # Mean and variance of two sets together, from those of each.
        self.count += height * width
        share, difference = height * width / self.count, mean.double().cpu() - self.mean
        self.variance = (
            (1 - share) * self.variance + share * variance.double().cpu() + share * (1 - share) * difference.square()
        )
        self.mean = self.mean + share * difference

    def read(self, window: Window) -> Tensor:
        return self.values[(..., *window)].to(self.device)

    def normalise(self, norm: nn.GroupNorm, activation: nn.Module, piece: Tensor) -> Tensor:
        """A piece after a group norm with the statistics of the whole, and an activation."""
        wide = torch.promote_types(piece.dtype, torch.float32)

        # A group's variance: its channels' mean variance, and the variance of their means.
        means = self.mean.unflatten(1, (norm.num_groups, -1))
        mean = means.mean(dim=2, keepdim=True)
        variance = (self.variance.unflatten(1, means.shape[1:]) + (means - mean).square()).mean(dim=2, keepdim=True)

        # Copies, because offloaded weights are there within the block only.
        with weights_in_place(norm):
            weight = norm.weight.to(self.device, wide, copy=True)
            bias = norm.bias.to(self.device, wide, copy=True)

        # One scale and one shift for each channel.
        scale = (variance + norm.eps).rsqrt().expand_as(means).flatten(1).to(self.device, wide) * weight
        shift = bias - mean.expand_as(means).flatten(1).to(scale) * scale
        return activation(torch.addcmul(shift[..., None, None], piece, scale[..., None, None]).to(piece.dtype))


def _run_resnet(block: ResnetBlock2D, source: _Layer, tile: Sides) -> _Layer:
    before = partial(source.normalise, block.norm1, block.nonlinearity)
    middle = _convolve(source, before, block.conv1, tile)

    def add_shortcut(piece: Tensor, window: Window) -> Tensor:
        shortcut = source.read(window)
        shortcut = shortcut if block.conv_shortcut is None else block.conv_shortcut(shortcut)
        return (piece + shortcut) / block.output_scale_factor

    before = partial(middle.normalise, block.norm2, block.nonlinearity)
    return _convolve(middle, before, block.conv2, tile, after=add_shortcut)


def _convolve(
    source: _Layer,
    before: Callable[[Tensor], Tensor],
    conv: nn.Conv2d,
    tile: Sides,
    *,
    up: int = 1,
    after: Callable[[Tensor, Window], Tensor] | None = None,
) -> _Layer:
    """A 3x3 convolution of `before` each tile of the source, whose result `after` may change."""
    batch, _, height, width = source.values.shape
    target = _Layer(source.values.new_empty(batch, conv.out_channels, up * height, up * width), source.device)
    for top in range(0, height, tile[0]):
        for left in range(0, width, tile[1]):
            # The window is the tile and one position around it, as far as there is one.
            bottom, right = min(top + tile[0], height), min(left + tile[1], width)
            rows, columns = slice(max(top - 1, 0), bottom + 1), slice(max(left - 1, 0), right + 1)
            piece = conv(before(source.read((rows, columns))))
            if after is not None:
                piece = after(piece, (rows, columns))

            # Without that border, in positions of the output.
            y, x = up * (top - rows.start), up * (left - columns.start)
            target.write(piece[..., y : y + up * (bottom - top), x : x + up * (right - left)], up * top, up * left)
    return target


def blend_tiles(
    run: Callable[[Tensor], Tensor], x: Tensor, *, tile: Sides, stride: Sides, channels: int, up: int, down: int
) -> Tensor:
    """`run` on overlapping tiles, averaged: [B, any, H, W] -> [B, `channels`, H / `down` * `up`, W / `down` * `up`].

    Neighbours are no further from each other than `stride`.
    """
    # Lengths, here and below, in `down` positions of `x`, the unit that `run` needs.
    height, width = x.shape[-2] // down, x.shape[-1] // down
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), channels, height * up, width * up, dtype=dtype, device=x.device)
    weights = torch.zeros_like(total[:1, :1])

    for top in tile_starts(height, tile[0], stride[0]):
        for left in tile_starts(width, tile[1], stride[1]):
            piece = run(x[..., top * down : (top + tile[0]) * down, left * down : (left + tile[1]) * down])
            weight = torch.outer(_feather(piece.shape[-2], total), _feather(piece.shape[-1], total))

            # In positions of the output.
            rows = slice(top * up, top * up + piece.shape[-2])
            columns = slice(left * up, left * up + piece.shape[-1])
            total[..., rows, columns] += piece * weight
            weights[..., rows, columns] += weight
    return (total / weights).to(x.dtype)


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Every `stride`, and one tile flush with the end."""
    return [*range(0, length - tile, stride), max(0, length - tile)]


def _feather(length: int, like: Tensor) -> Tensor:
    """Weights [length] that rise as a squared sine from each border and never reach zero."""
    position = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
    return torch.sin(torch.pi * position).square() + 1e-4
