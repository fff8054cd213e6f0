"""The start without training: what is exact about it, and that its coordinates do what they are for."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from davae.autoencoder_da import AutoencoderDA
from davae.closed_form import fit_closed_form
from davae.errors import DataError, SettingsError
from davae.losses import detail_alignment_loss


def pictures() -> torch.Tensor:
    """Smooth noise: neighbouring pixels are alike, as in pictures."""
    coarse = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    return F.interpolate(coarse, size=48, mode="bicubic").clamp(-1, 1)


def fitted(detail_channels: int, **settings) -> tuple[AutoencoderDA, dict[str, list[float]]]:
    vae = tiny.tiny_taesd().double()
    with torch.no_grad():
        latents = vae.encode(pictures()).latents
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=detail_channels)
    return autoencoder, fit_closed_form(autoencoder, pictures(), metric_pictures=4, **settings)


@torch.no_grad()
def full_latents_error(autoencoder: AutoencoderDA) -> float:
    """Mean squared error of the full picture's latents, as the joint decoder's first block rebuilds them."""
    image = pictures()
    joined = torch.cat([autoencoder.encode_base(image), autoencoder.encode_detail(image)[0]], dim=1)
    return (autoencoder.detail_upsample(joined) - autoencoder.encode_pretrained(image)).square().mean().item()


@pytest.mark.parametrize("aligned", [True, False])
def test_decoder_map_undoes_the_encoder_map_on_the_kept_directions(aligned: bool) -> None:
    autoencoder, _ = fitted(8, aligned=aligned)
    with torch.no_grad():
        image = pictures()[:4]
        base, code = autoencoder.encode_base(image), autoencoder.encode_detail(image)[0]
        rebuilt = autoencoder.detail_upsample(torch.cat([base, code], dim=1))
        # Encoding the rebuilt latents gives the code again: what the D directions hold is kept exactly.
        again = autoencoder.detail_downsample(rebuilt)[:, :8]
    assert torch.allclose(again, code, atol=1e-8)


def test_error_falls_with_the_number_of_channels() -> None:
    errors = [full_latents_error(fitted(detail_channels)[0]) for detail_channels in (4, 8, 12)]
    assert errors[0] > errors[1] > errors[2]


def test_unexplained_part_is_the_tail_of_the_spectrum() -> None:
    _, facts = fitted(8)
    values = facts["eigenvalues"]
    assert len(values) == 16
    assert values == sorted(values, reverse=True)
    assert facts["unexplained"][0] == pytest.approx(sum(values[8:]) / sum(values), rel=1e-9)


def test_unit_variance_or_one_scale() -> None:
    for aligned in (True, False):
        autoencoder, _ = fitted(8, aligned=aligned)
        with torch.no_grad():
            code = autoencoder.encode_detail(pictures())[0]
        assert torch.allclose(code.mean((0, 2, 3)), torch.zeros(8).double(), atol=1e-9)
        if aligned:
            assert code.square().mean().item() == pytest.approx(1, rel=1e-6)
        else:
            assert torch.allclose(code.std((0, 2, 3), correction=0), torch.ones(8).double(), atol=1e-6)


def test_aligned_code_is_nearer_to_the_base_and_rebuilds_the_same() -> None:
    (aligned, _), (plain, _) = fitted(8, aligned=True), fitted(8, aligned=False)
    image = pictures()
    with torch.no_grad():
        losses = [detail_alignment_loss(a.encode_detail(image)[0], a.encode_base(image)) for a in (aligned, plain)]
        assert torch.allclose(aligned(image).sample, plain(image).sample, atol=1e-8)
    assert losses[0] < losses[1]


def test_same_seed_same_start() -> None:
    (first, _), (second, _) = fitted(4, seed=3), fitted(4, seed=3)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_refusals() -> None:
    autoencoder = AutoencoderDA.from_base(tiny.tiny_taesd(), detail_channels=4)
    with pytest.raises(DataError, match="latent positions"):
        fit_closed_form(autoencoder, pictures()[:1, :, :8, :8].float())
    paper = AutoencoderDA.from_base(tiny.tiny_taesd(), detail_channels=4, linear_blocks=False)
    with pytest.raises(SettingsError, match="linear_blocks"):
        fit_closed_form(paper, pictures().float())
