"""The two new blocks of AutoencoderDA: space to channels behind its encoder, channels to space before its decoder."""

import torch.nn.functional as F
from torch import Tensor, nn


class DetailDownsample(nn.Module):
    """Space to channel at the end of the detail encoder: [B, Ci, H, W] -> [B, Co, H/s, W/s] (docs/method.md 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, *, factor: int = 2, linear_shortcut: bool = False) -> None:
        super().__init__()
        places = factor**2
        if out_channels % places:
            raise ValueError(f"out_channels={out_channels} must be a multiple of {places}, for a pixel unshuffle.")

        self.factor = factor
        self.conv = nn.Conv2d(in_channels, out_channels // places, 3, padding=1)
        # Without weights, the shortcut averages groups of consecutive channels, if they are of one size. A linear one
        # is the place of the closed-form start.
        self.shortcut: nn.Conv2d | None = None
        if linear_shortcut:
            self.shortcut = nn.Conv2d(places * in_channels, out_channels, 1)
        elif places * in_channels % out_channels:
            self.shortcut = nn.Conv2d(places * in_channels, out_channels, 1, bias=False)
            nn.init.zeros_(self.shortcut.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Ci, H, W] -> [B, Co, H/s, W/s]; H and W multiples of s."""
        main = F.pixel_unshuffle(self.conv(hidden), self.factor)
        folded = F.pixel_unshuffle(hidden, self.factor)
        if self.shortcut is not None:
            return main + self.shortcut(folded)
        return main + folded.unflatten(1, (main.shape[1], -1)).mean(dim=2)


class DetailUpsample(nn.Module):
    """Channel to space before the joint decoder: [B, Ci, h, w] -> [B, Co, s h, s w] (docs/method.md 2.1)."""

    def __init__(self, in_channels: int, out_channels: int, *, factor: int = 2, linear_shortcut: bool = False) -> None:
        super().__init__()
        made = factor**2 * out_channels
        if not linear_shortcut and made % in_channels:
            raise ValueError(
                f"in_channels={in_channels} must divide {factor**2} * out_channels={made}: the shortcut repeats "
                "channels. Choose detail_channels accordingly, or linear_shortcut=True."
            )

        self.factor = factor
        self.conv = nn.Conv2d(in_channels, made, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, made, 1) if linear_shortcut else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Ci, h, w] -> [B, Co, s h, s w]."""
        main = self.conv(hidden)
        if self.shortcut is not None:
            return F.pixel_shuffle(main + self.shortcut(hidden), self.factor)
        # Without weights, the shortcut repeats channels.
        repeats = main.shape[1] // hidden.shape[1]
        return F.pixel_shuffle(main + hidden.repeat_interleave(repeats, dim=1), self.factor)
