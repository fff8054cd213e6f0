"""The two new blocks: diffusers' blocks where shortcuts have no weights, and the reference's numbers of parameters."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from torch import nn

from davae.models.detail_blocks import DetailDownsample, DetailUpsample


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_blocks_have_the_references_parameters() -> None:
    assert count(DetailDownsample(512, 192)) == 614_448
    assert count(DetailDownsample(512, 32)) == 36_872
    assert count(DetailUpsample(128, 512)) == 2_361_344
    assert count(DetailUpsample(32, 512)) == 591_872


@pytest.mark.parametrize(("channels", "out_channels"), [(16, 8), (8, 32), (12, 4)])
def test_downsample_is_the_block_of_diffusers(channels: int, out_channels: int) -> None:
    ours = DetailDownsample(channels, out_channels).double()
    theirs = DCDownBlock2d(channels, out_channels, downsample=True, shortcut=True).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    hidden = torch.randn(2, channels, 6, 4).double()
    assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize(("channels", "out_channels"), [(8, 16), (32, 8), (4, 3)])
def test_upsample_is_the_block_of_diffusers(channels: int, out_channels: int) -> None:
    ours = DetailUpsample(channels, out_channels).double()
    theirs = DCUpBlock2d(channels, out_channels, interpolate=False, shortcut=True).double()
    theirs.conv.load_state_dict(ours.conv.state_dict())
    hidden = torch.randn(2, channels, 3, 5).double()
    assert torch.equal(ours(hidden), theirs(hidden))


def test_where_groups_are_unequal_the_shortcut_is_learned_and_starts_at_nothing() -> None:
    block, hidden = DetailDownsample(6, 20), torch.randn(1, 6, 4, 4)  # 24 channels on 20
    assert block.shortcut.bias is None
    assert torch.equal(block(hidden), F.pixel_unshuffle(block.conv(hidden), 2))
    with torch.no_grad():
        block.shortcut.weight[0, 5] = 1  # the last place of the first channel
    added = block(hidden) - F.pixel_unshuffle(block.conv(hidden), 2)
    assert torch.allclose(added[:, 0], hidden[:, 1, 0::2, 1::2], atol=1e-6)
    assert not added[:, 1:].any()


def test_linear_shortcuts_stand_behind_the_unshuffle_and_before_the_shuffle() -> None:
    down, up = DetailDownsample(4, 12, linear_shortcut=True), DetailUpsample(12, 4, linear_shortcut=True)
    for block in (down, up):
        nn.init.zeros_(block.conv.weight)
        nn.init.zeros_(block.conv.bias)
    hidden = torch.randn(1, 4, 4, 4)
    assert torch.equal(down(hidden), down.shortcut(F.pixel_unshuffle(hidden, 2)))
    small = down(hidden)
    assert torch.equal(F.pixel_unshuffle(up(small), 2), up.shortcut(small))


def test_blocks_refuse_channels_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        DetailDownsample(8, 6)
    with pytest.raises(ValueError, match="linear_shortcut=True"):
        DetailUpsample(12, 8)
    assert DetailUpsample(12, 8, linear_shortcut=True)(torch.zeros(1, 12, 2, 2)).shape == (1, 8, 4, 4)
