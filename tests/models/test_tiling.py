"""Slices and tiles are the whole: exactly with AutoencoderKL's decoder, without a seam with others."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from autoencoders import BASES, images, trained
from davae import AutoencoderDA, assets
from davae.data.avatars import draw_attributes, draw_image
from davae.data.pictures import to_floats
from davae.method.closed_form import fit_closed_form
from davae.models.tiling import can_decode_tiles, decode_tiles
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
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
    whole, tiled = decoder(hidden), decode_tiles(decoder, hidden, tile=(tile, tile + 1), storage="cpu")
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() < 1e-12


def test_gradients_pass_through_tiles() -> None:
    decoder, gradients = tiny_vae().decoder.double(), []
    hidden = torch.randn(1, 4, 6, 5).double().requires_grad_()
    target = torch.randn(1, 3, 24, 20).double()
    with torch.enable_grad():
        for picture in (decoder(hidden), decode_tiles(decoder, hidden, tile=(4, 4), storage="cpu")):
            loss = (picture - target).square().mean()
            gradients.append(torch.autograd.grad(loss, [hidden, *decoder.parameters()]))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*gradients, strict=True))


def test_a_decoder_in_half_precision_is_as_near_to_the_exact_one_as_the_whole_is() -> None:
    exact, half = tiny_vae().decoder.double(), tiny_vae().decoder.bfloat16()
    hidden = 3 * torch.randn(1, 4, 12, 12).bfloat16()
    target = exact(hidden.double())
    tiled = decode_tiles(half, hidden, tile=(5, 5), storage="cpu")
    assert tiled.dtype == torch.bfloat16
    errors = [(made.double() - target).square().mean().sqrt() for made in (half(hidden), tiled)]
    assert errors[1] < 1.2 * errors[0]


def test_a_decoder_whose_weights_are_offloaded_layer_by_layer_decodes_tiles() -> None:
    decoder, hidden = tiny_vae().decoder, torch.randn(1, 4, 6, 5)
    whole = decoder(hidden)
    cpu_offload(decoder, execution_device="cpu")  # what `enable_sequential_cpu_offload` does
    assert torch.allclose(decode_tiles(decoder, hidden, tile=(4, 4), storage="cpu"), whole, atol=1e-5)
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
    drawn = [np.asarray(draw_image(draw_attributes(number), 256)) for number in range(3)]
    pictures = to_floats(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2))
    latents = autoencoder.encode(pictures).latent_dist.mode()
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


# ----------------------------------------------------------------------------------------------- a whole AutoencoderDA


@pytest.mark.parametrize("base", BASES)
def test_slices_are_the_whole(base: str) -> None:
    autoencoder, image = trained(base), images(3)
    latents, whole = autoencoder.encode(image).latent_dist.parameters, autoencoder(image).sample
    autoencoder.enable_slicing()
    assert torch.allclose(autoencoder.encode(image).latent_dist.parameters, latents, atol=1e-12)
    assert torch.allclose(autoencoder(image).sample, whole, atol=1e-12)


def pointwise() -> AutoencoderDA:
    """Its 3x3 kernels see their centre only: no tile can know what lies beyond its border, or need to."""
    autoencoder = trained("tiny")
    with torch.no_grad():
        for module in autoencoder.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                centre = module.weight[..., 1, 1].clone()
                module.weight.zero_()[..., 1, 1] = centre
    return autoencoder


@pytest.mark.parametrize(("height", "width"), [(64, 64), (56, 72), (24, 104)])
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0.25), (32, 0.0), (44, 0.5), (40, 0.9), (4, 0.5)])
def test_tiles_cover_every_size_and_weigh_one(height: int, width: int, tile: int, overlap: float) -> None:
    autoencoder = pointwise()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, height, width, generator=generator).double() * 2 - 1
    moments = autoencoder.encode(image).latent_dist.parameters
    latents = torch.randn(2, 12, height // 8, width // 8, generator=generator).double()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size, autoencoder.tile_overlap = tile, overlap
    assert torch.allclose(autoencoder.decode(latents).sample, whole, atol=1e-12)
    tiled = autoencoder.encode(image).latent_dist.parameters
    assert tiled.shape == moments.shape
    # The filter of the base picture reaches over a tile's border; all else is pointwise.
    assert torch.allclose(tiled[:, 4:], moments[:, 4:], atol=1e-12)
    autoencoder.disable_tiling()
    assert torch.equal(autoencoder.decode(latents).sample, whole)


def test_pictures_no_larger_than_a_tile_are_not_tiled() -> None:
    autoencoder, image = trained("kl"), images()
    whole = autoencoder(image).sample
    autoencoder.enable_tiling()
    assert torch.equal(autoencoder(image).sample, whole)
    autoencoder.tile_sample_size = 32
    assert torch.equal(autoencoder(image).sample, whole)
    autoencoder.tile_sample_size = 24
    assert not torch.equal(autoencoder(image).sample, whole)


def scene(side: int) -> Tensor:
    """Smooth shades with a soft disc on them."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side).double(),) * 2, indexing="ij")
    disc = torch.sigmoid(20 * (0.5 - (x.square() + y.square()).sqrt()))
    return torch.stack([0.7 * x, 0.7 * y * (1 - disc), 1.2 * disc - 0.6])[None]


@torch.no_grad()
def test_tiles_join_without_a_seam() -> None:
    # No norms and no attention: a tile's middle does not know that it is one.
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(0, 1), num_decoder_blocks=(0, 1)).double().eval()
    autoencoder, image = AutoencoderDA.from_base(vae, detail_channels=4), scene(192)
    fit_closed_form(autoencoder, torch.cat([image, image.flip(3), image.transpose(2, 3)]), metric_pictures=1)
    latents = autoencoder.encode(image).latent_dist.mode()
    whole = autoencoder.decode(latents).sample
    autoencoder.enable_tiling()
    autoencoder.tile_sample_size, errors = 64, {}
    for overlap in (0.0, 0.5):  # side by side, and sharing 32 px: the decoder sees half of that around a pixel
        autoencoder.tile_overlap = overlap
        tiled = autoencoder.decode(latents).sample
        errors[overlap] = (tiled - whole).abs().max().item()
    assert errors[0.5] < 1 / 255
    assert errors[0.0] > 50 * errors[0.5]
    again = autoencoder.encode(image).latent_dist.mode()
    assert again.shape == latents.shape
    assert (again - latents).abs().max() < 0.1
