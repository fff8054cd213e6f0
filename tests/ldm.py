"""The networks of LDM and VQGAN in plain torch, by docs/method.md (2.1), under the reference checkpoints' names.

Written apart from the importer and without diffusers, for it to be compared with.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + hidden


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))  # [B, C, positions]
        weights = torch.softmax(torch.einsum("bci,bcj->bij", query, key) / x.shape[1] ** 0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, value).view(x.shape))


class Resampling(nn.Module):
    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride == (2, 2):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class Level(nn.Module):
    def __init__(self, channels: int, out_channels: int, blocks: int, *, attended: bool) -> None:
        super().__init__()
        widths = [channels, *[out_channels] * blocks]
        self.block = nn.ModuleList(Residual(*pair) for pair in itertools.pairwise(widths))
        self.attn = nn.ModuleList(Attention(out_channels) for _ in range(blocks if attended else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            Residual(channels, channels),
            Attention(channels),
            Residual(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        before = [widths[0], *widths]
        self.down = nn.ModuleList(
            Level(before[i], width, blocks, attended=i == len(widths) - 1) for i, width in enumerate(widths)
        )
        for level, width in zip(self.down, widths[:-1], strict=False):
            level.downsample = Resampling(width, down=True)
        self.mid = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * channels, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return F.silu(self.norm_out(self.mid(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.features(x))


class Decoder(nn.Module):
    def __init__(self, widths: Sequence[int], blocks: int, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        after = [*widths, widths[-1]]
        self.up = nn.ModuleList(
            Level(after[i + 1], width, blocks + 1, attended=i == len(widths) - 1) for i, width in enumerate(widths)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Resampling(width, down=False)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def from_features(self, x: Tensor) -> Tensor:
        x = self.mid(x)
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))

    def forward(self, z: Tensor) -> Tensor:
        return self.from_features(self.conv_in(z))


class VaVae(nn.Module):
    """The frozen tokenizer, with a piece of its training's own beside it."""

    def __init__(self, widths: Sequence[int] = (32, 32, 64), blocks: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, blocks, channels), Decoder(widths, blocks, channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.loss = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros(()))})

    def encode(self, x: Tensor) -> Tensor:
        """The mode."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def unshuffle(x: Tensor) -> Tensor:
    """Space to channel, each channel's four places next to one another."""
    places = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(places, dim=2).flatten(1, 2)


def shuffle(x: Tensor) -> Tensor:
    """Channel to space, the inverse."""
    wide = x.new_zeros(x.shape[0], x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
    for place in range(4):
        wide[..., place // 2 :: 2, place % 2 :: 2] = x[:, place::4]
    return wide


def up_block(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """docs/method.md, 2.1: convolution and shuffle, beside each channel repeated 4 Co / Ci times and shuffled."""
    main = conv(x)
    return shuffle(main + x.repeat_interleave(main.shape[1] // x.shape[1], dim=1))


class ImagenetDaVae(nn.Module):
    """The reference code's DA-VAE for ImageNet: base latents first."""

    def __init__(
        self, widths: Sequence[int] = (32, 32, 64), blocks: int = 2, channels: int = 4, detail: int = 12
    ) -> None:
        super().__init__()
        self.base_encoder = Encoder(widths, blocks, channels)
        self.base_quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.da = nn.Module()
        self.da.encoder, self.da.decoder = Encoder(widths, blocks, channels), Decoder(widths, blocks, channels)
        self.da.da_down, self.da.da_up = nn.Module(), nn.Module()
        self.da.da_down.conv = nn.Conv2d(widths[-1], detail // 2, 3, padding=1)
        self.da.da_down.shortcut_proj = nn.Conv2d(4 * widths[-1], 2 * detail, 1, bias=False)
        self.da.da_up.conv = nn.Conv2d(channels + detail, 4 * widths[-1], 3, padding=1)
        self.loss = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros(()))})

    def base(self, x: Tensor) -> Tensor:
        small = F.interpolate(x, scale_factor=0.5, mode="bicubic", align_corners=False)  # no antialias, no clamp
        return self.base_quant_conv(self.base_encoder(small)).chunk(2, dim=1)[0]

    def detail(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        hidden, down = self.da.encoder.features(x), self.da.da_down
        return (unshuffle(down.conv(hidden)) + down.shortcut_proj(unshuffle(hidden))).chunk(2, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.da.decoder.from_features(up_block(latents, self.da.da_up.conv))


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter, a norm's included, at the value it is built with; in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    return module.eval()
