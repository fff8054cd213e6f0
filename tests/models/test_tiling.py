"""Decoding over tiles is decoding the whole, with AutoencoderKL's decoder."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL
from torch import Tensor

from davae import AutoencoderDA, assets
from davae.data.sources import open_pictures
from davae.models.tiling import can_decode_tiles, decode_tiles
from davae.pipelines.loading import load_autoencoder, load_base_vae
from tiny import tiny_taesd, tiny_vae

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 13), (3, 20)])
@pytest.mark.parametrize("tile", [1, 4, 5])
def test_tiles_are_the_whole_but_for_rounding(height: int, width: int, tile: int) -> None:
    decoder = tiny_vae().decoder.double()
    hidden = 3 * torch.randn(2, 4, height, width).double()
    whole, tiled = decoder(hidden), decode_tiles(decoder, hidden, tile=tile, storage="cpu")
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() < 1e-12


def test_gradients_pass_through_tiles() -> None:
    decoder, gradients = tiny_vae().decoder.double(), []
    hidden = torch.randn(1, 4, 6, 5).double().requires_grad_()
    target = torch.randn(1, 3, 24, 20).double()
    with torch.enable_grad():
        for picture in (decoder(hidden), decode_tiles(decoder, hidden, tile=4, storage="cpu")):
            loss = (picture - target).square().mean()
            gradients.append(torch.autograd.grad(loss, [hidden, *decoder.parameters()]))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*gradients, strict=True))


def test_a_decoder_in_half_precision_is_as_near_to_the_exact_one_as_the_whole_is() -> None:
    exact, half = tiny_vae().decoder.double(), tiny_vae().decoder.bfloat16()
    hidden = 3 * torch.randn(1, 4, 12, 12).bfloat16()
    target = exact(hidden.double())
    tiled = decode_tiles(half, hidden, tile=5, storage="cpu")
    assert tiled.dtype == torch.bfloat16
    errors = [(made.double() - target).square().mean().sqrt() for made in (half(hidden), tiled)]
    assert errors[1] < 1.2 * errors[0]


def test_a_decoder_whose_weights_are_offloaded_layer_by_layer_decodes_tiles() -> None:
    decoder, hidden = tiny_vae().decoder, torch.randn(1, 4, 6, 5)
    whole = decoder(hidden)
    cpu_offload(decoder, execution_device="cpu")  # what `enable_sequential_cpu_offload` does
    assert torch.allclose(decode_tiles(decoder, hidden, tile=4, storage="cpu"), whole, atol=1e-5)
    assert decoder.conv_norm_out.weight.is_meta


def test_decoders_with_other_layers_are_left_to_blended_tiles() -> None:
    attending = AutoencoderKL(up_block_types=("AttnUpDecoderBlock2D",), block_out_channels=(8,), norm_num_groups=4)
    assert can_decode_tiles(tiny_vae().decoder)
    assert not can_decode_tiles(tiny_taesd().decoder)
    assert not can_decode_tiles(attending.decoder)
    autoencoder = AutoencoderDA.from_base(attending.eval(), detail_channels=4)
    latents = torch.randn(1, 8, 8, 8)
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size = 8
    assert autoencoder.decode(latents).sample.shape == whole.shape


@pytest.mark.parametrize("linear_blocks", [True, False])
def test_an_autoencoders_tiles_are_pixels_of_the_picture(linear_blocks: bool) -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderDA.from_base(tiny_vae(), detail_channels=4, linear_blocks=linear_blocks).double()
    latents = torch.randn(3, 8, 6, 4).double()
    whole = autoencoder.decode(latents).sample
    seen: list[tuple[int, ...]] = []
    autoencoder.joint_decoder.conv_out.register_forward_hook(lambda module, args, made: seen.append(made.shape[2:]))
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size = 24
    assert (autoencoder.decode(latents).sample - whole).abs().max() < 1e-12
    # 48 x 32 px in tiles of 24 px, with one pixel more wherever a neighbour is.
    assert seen == [(25, 25), (25, 9), (25, 25), (25, 9)]
    autoencoder.tile_sample_size = 48
    autoencoder.decode(latents)
    assert seen[4:] == [(48, 32)]


def test_the_shipped_pair_decodes_real_pictures_without_a_seam() -> None:
    autoencoder = load_autoencoder(assets.upgrade(), base=load_base_vae(str(assets.base_pipeline())))
    pictures = open_pictures(assets.pictures(), size=256, split="heldout", limit=3)
    latents = autoencoder.encode(pictures.batch(range(3))).latent_dist.mode()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size = 128
    assert levels(autoencoder.decode(latents).sample, whole) < 0.1
    # A quarter on its own is far off even in its middle: its norms see another picture.
    quarter = autoencoder.decode(latents[..., :8, :8]).sample
    assert levels(quarter[..., 32:64, 32:64], whole[..., 32:64, 32:64]) > 5


def levels(one: Tensor, other: Tensor) -> float:
    """Largest difference, in 255ths of the range of a picture."""
    return 255 / 2 * (one.clamp(-1, 1) - other.clamp(-1, 1)).abs().max().item()
