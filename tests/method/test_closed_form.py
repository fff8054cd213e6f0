"""The start without training: what is exact about it, and that its coordinates do what they are for."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from davae.errors import DataError, NumericsError, SettingsError
from davae.method.closed_form import BASE_CODES, LOG_VARIANCE, Code, decoder_metric, fit_closed_form
from davae.method.losses import channel_group_mean, detail_alignment_loss
from davae.models.autoencoder_da import AutoencoderDA

METRIC_PICTURES = 4


@functools.cache
def pictures() -> Tensor:
    """Smooth noise: neighbouring pixels are alike, as in pictures."""
    coarse = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return F.interpolate(coarse, size=32, mode="bicubic").clamp(-1, 1)


def untrained(detail_channels: int, *, base_in_detail: bool = False) -> AutoencoderDA:
    """C = 4, with scalars that bring its latents to unit scale, as a real one's do."""
    vae = tiny.tiny_taesd().double()
    with torch.no_grad():
        latents = vae.encode(pictures()).latents
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return AutoencoderDA.from_base(vae, detail_channels=detail_channels, base_in_detail=base_in_detail)


@functools.cache
def fitted(detail_channels: int, *, code: Code = "aligned", seed: int = 0) -> tuple[AutoencoderDA, dict]:
    autoencoder = untrained(detail_channels, base_in_detail=code in BASE_CODES)
    facts = fit_closed_form(
        autoencoder, pictures(), metric_pictures=METRIC_PICTURES, code=code, seed=seed, batch_size=10
    )
    return autoencoder, facts


def rows(latents: Tensor) -> Tensor:
    """[B, channels, h, w] -> [positions, channels]."""
    return latents.movedim(1, -1).flatten(0, -2)


@functools.cache
def latents() -> tuple[Tensor, Tensor]:
    """Base latents [positions, C], and the unshuffled ones of the full pictures [positions, 4 C]."""
    autoencoder = untrained(4)
    with torch.no_grad():
        full = F.pixel_unshuffle(autoencoder.encode_pretrained(pictures()), 2)
        return rows(autoencoder.encode_base(pictures())), rows(full)


@functools.cache
def prediction() -> Tensor:
    """A Zb + a by an ordinary least-squares solver."""
    base, full = latents()
    source = torch.cat([base, torch.ones(len(base), 1).double()], dim=1)
    return source @ torch.linalg.lstsq(source, full).solution


@torch.no_grad()
def rebuilt(autoencoder: AutoencoderDA) -> Tensor:
    """Zf^ [positions, 4 C], as the joint decoder's first block makes it."""
    image = pictures()
    joined = torch.cat([autoencoder.encode_base(image), autoencoder.encode_detail(image)[0]], dim=1)
    return rows(F.pixel_unshuffle(autoencoder.detail_upsample(joined), 2))


def projection(autoencoder: AutoencoderDA) -> Tensor:
    """P = W^-1 U U^T W: the encoder's map to the code and the decoder's map back."""
    config = autoencoder.config
    encode = autoencoder.detail_downsample.shortcut.weight[: config.detail_channels, :, 0, 0]
    decode = autoencoder.detail_upsample.shortcut.weight[:, config.base_channels :, 0, 0]
    return (decode @ encode).detach()


# --------------------------------------------------------------------------------------------------- what is exact


@pytest.mark.parametrize("code", ["aligned", "unit variance", "residual", "base added"])
@pytest.mark.parametrize("detail_channels", [4, 8, 12])
def test_the_code_holds_its_directions_and_the_base_predicts_the_rest(detail_channels: int, code: Code) -> None:
    autoencoder, _ = fitted(detail_channels, code=code)
    p = projection(autoencoder)
    assert torch.allclose(p @ p, p, atol=1e-10)
    assert p.trace().item() == pytest.approx(detail_channels, abs=1e-10)
    rest = torch.eye(16).double() - p
    assert torch.allclose(rebuilt(autoencoder), prediction() @ rest.T + latents()[1] @ p.T, atol=1e-7)


def test_with_all_directions_it_is_the_pretrained_autoencoder_at_full_size() -> None:
    autoencoder, facts = fitted(16)
    assert facts["unexplained"] == [0]
    assert torch.allclose(rebuilt(autoencoder), latents()[1], atol=1e-9)
    image = pictures()[:4]
    with torch.no_grad():
        expected = autoencoder.decode_full(autoencoder.encode_pretrained(image))
        assert torch.allclose(autoencoder(image).sample, expected, atol=1e-9)


def test_the_error_in_the_metric_is_the_tail_of_the_spectrum() -> None:
    metric = decoder_metric(untrained(4), pictures()[:METRIC_PICTURES], seed=0)
    errors = []
    for detail_channels in (4, 8, 12):
        autoencoder, facts = fitted(detail_channels)
        values = torch.tensor(facts["eigenvalues"])
        assert len(values) == 16
        assert facts["eigenvalues"] == sorted(facts["eigenvalues"], reverse=True)
        error = latents()[1] - rebuilt(autoencoder)
        errors.append((error @ metric * error).sum(dim=1).mean().item())
        assert errors[-1] == pytest.approx(values[detail_channels:].sum().item(), rel=1e-4)
        assert facts["unexplained"][0] == pytest.approx((values[detail_channels:].sum() / values.sum()).item())
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("code", ["aligned", "unit variance"])
def test_scale_of_the_code(code: Code) -> None:
    autoencoder, _ = fitted(8, code=code)
    with torch.no_grad():
        detail, log_variance = autoencoder.encode_detail(pictures())
    assert detail.mean((0, 2, 3)).abs().max() < 1e-9
    deviation = detail.std((0, 2, 3), correction=0)
    if code == "aligned":  # one scale for all, the components' own proportions
        assert detail.square().mean().item() == pytest.approx(1, abs=1e-9)
        assert deviation.max() > 1.2 * deviation.min()
    else:
        assert torch.allclose(deviation, torch.ones(8).double(), atol=1e-9)
    assert torch.equal(log_variance, torch.full_like(log_variance, LOG_VARIANCE))


def test_only_the_two_blocks_are_set() -> None:
    before, after = untrained(8).state_dict(), fitted(8)[0].state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {
        f"detail_{block}.shortcut.{kind}" for block in ("downsample", "upsample") for kind in ("weight", "bias")
    }


def test_it_is_a_function_of_pictures_and_seed() -> None:
    once, again, other = fitted(4, seed=3)[0], untrained(4), fitted(4, seed=4)[0]
    fit_closed_form(again, pictures(), metric_pictures=METRIC_PICTURES, seed=3, batch_size=10)
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(projection(once), projection(other))


# ----------------------------------------------------------------------------------------------------------- the metric


def test_metric_is_symmetric_positive_and_keyed_by_the_seed() -> None:
    autoencoder = untrained(4)
    metric = decoder_metric(autoencoder, pictures()[:METRIC_PICTURES], seed=0)
    assert torch.allclose(metric, metric.T, rtol=1e-10, atol=0)
    assert torch.linalg.eigvalsh(metric).min() > 0
    assert torch.equal(metric, decoder_metric(autoencoder, pictures()[:METRIC_PICTURES], seed=0))
    assert not torch.equal(metric, decoder_metric(autoencoder, pictures()[:METRIC_PICTURES], seed=1))


def test_metric_is_the_jacobians_in_expectation() -> None:
    autoencoder, image = untrained(4), pictures()[:1, :, :8, :8]  # one position of the latents
    full = F.pixel_unshuffle(autoencoder.encode_pretrained(image), 2).detach()

    def pixels(vector: Tensor) -> Tensor:
        return autoencoder.decode_full(F.pixel_shuffle(vector.view(full.shape), 2)).flatten()

    jacobian = torch.autograd.functional.jacobian(pixels, full.flatten())
    exact = jacobian.T @ jacobian
    estimate = decoder_metric(autoencoder, image.expand(250, -1, -1, -1), seed=0)
    assert (estimate - exact).norm() < 0.15 * exact.norm()


# ------------------------------------------------------------------------------------------------------- what it is for


@torch.no_grad()
def test_it_starts_nearer_to_the_autoencoder_at_full_size_than_enlarged_base_latents() -> None:
    image, start = pictures()[:8], untrained(4)
    full = start.decode_full(start.encode_pretrained(image))
    starts = (start, fitted(4)[0], fitted(8)[0])
    errors = [(autoencoder(image).sample - full).square().mean().item() for autoencoder in starts]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


@pytest.mark.parametrize("detail_channels", [4, 8])
@torch.no_grad()
def test_aligned_code_is_nearest_to_the_base_and_rebuilds_the_same(detail_channels: int) -> None:
    (aligned, _), (plain, _) = fitted(detail_channels), fitted(detail_channels, code="unit variance")
    image = pictures()
    assert torch.allclose(aligned(image[:4]).sample, plain(image[:4]).sample, atol=1e-8)
    base, code = aligned.encode_base(image), aligned.encode_detail(image)[0]
    assert detail_alignment_loss(code, base) < detail_alignment_loss(plain.encode_detail(image)[0], base)
    repeated = base.repeat_interleave(detail_channels // 4, dim=1)
    distance = (code - repeated).square().mean()
    for seed in range(20):  # of all rotations of it, no other one is nearer
        generator = torch.Generator().manual_seed(seed)
        skew = torch.randn(detail_channels, detail_channels, generator=generator).double()
        rotation = torch.linalg.matrix_exp((0.1 if seed % 2 else 1.0) * (skew - skew.T))
        assert (torch.einsum("ij,bjhw->bihw", rotation, code) - repeated).square().mean() > distance


@pytest.mark.parametrize("detail_channels", [4, 8, 12])
@torch.no_grad()
def test_with_the_base_added_the_group_mean_is_the_base_and_the_codes_own(detail_channels: int) -> None:
    autoencoder, _ = fitted(detail_channels, code="base added")
    base, detail = autoencoder.encode_base(pictures()), autoencoder.encode_detail(pictures())[0]
    own = rows(detail - base.repeat_interleave(detail_channels // 4, dim=1))
    assert torch.allclose(own.T @ own / len(own), torch.eye(detail_channels).double(), atol=1e-4)  # the metric's floor
    assert (own.T @ rows(base) / len(own)).abs().max() < 1e-6  # what least squares leaves knows nothing of the base
    mean = own.view(len(own), 4, -1).mean(dim=2)
    assert detail_alignment_loss(detail, base).item() == pytest.approx(mean.square().mean().item(), rel=1e-9)
    picture = fitted(detail_channels, code="unit variance")[0](pictures()[:4]).sample
    assert torch.allclose(autoencoder(pictures()[:4]).sample, picture, atol=1e-8)


@torch.no_grad()
def test_the_residual_code_knows_nothing_of_the_base_and_zero_is_what_the_base_predicts() -> None:
    autoencoder, _ = fitted(8, code="residual")
    base, code = autoencoder.encode_base(pictures()), autoencoder.encode_detail(pictures())[0]
    assert (rows(code).T @ rows(base) / len(rows(base))).abs().max() < 1e-6
    assert torch.allclose(code.std((0, 2, 3), correction=0), torch.ones(8).double(), atol=1e-9)
    without = autoencoder.detail_upsample(torch.cat([base, torch.zeros_like(code)], dim=1))
    assert torch.allclose(rows(F.pixel_unshuffle(without, 2)), prediction(), atol=1e-7)


@pytest.mark.parametrize("detail_channels", [8, 12])
@torch.no_grad()
def test_codes_of_zero_sum_are_aligned_exactly_and_cost_one_dimension_a_group(detail_channels: int) -> None:
    autoencoder, facts = fitted(detail_channels, code="zero sum")
    base, detail = autoencoder.encode_base(pictures()), autoencoder.encode_detail(pictures())[0]
    assert torch.allclose(channel_group_mean(detail, 4), base, atol=1e-9)
    own = rows(detail - base.repeat_interleave(detail_channels // 4, dim=1))
    assert own.square().mean().item() == pytest.approx(1, abs=1e-6)
    values = torch.linalg.eigvalsh(own.T @ own / len(own))
    assert torch.allclose(values[:4], torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(
        values[4:], torch.full((detail_channels - 4,), detail_channels / (detail_channels - 4)).double()
    )
    fewer, theirs = fitted(detail_channels - 4, code="unit variance")
    assert torch.allclose(autoencoder(pictures()[:4]).sample, fewer(pictures()[:4]).sample, atol=1e-8)
    assert facts == theirs


@torch.no_grad()
def test_calibration_standardises_it_and_leaves_the_picture() -> None:
    autoencoder, image = untrained(8), pictures()[:8]
    fit_closed_form(autoencoder, image, metric_pictures=1)
    before = autoencoder(image).sample
    autoencoder.calibrate(image.split(3))
    assert torch.allclose(autoencoder(image).sample, before, atol=1e-10)
    detail = autoencoder.split(autoencoder.to_units(autoencoder.encode(image).latent_dist.mode()))[1]
    assert torch.allclose(detail.std((0, 2, 3), correction=0), torch.ones(8).double(), atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- the border


def test_refusals() -> None:
    with pytest.raises(DataError, match=r"8 latent positions, 64 are needed: give more \(fit_pictures\)"):
        fit_closed_form(untrained(4), pictures()[:8, :, :8, :8])
    with pytest.raises(SettingsError, match=r"detail_channels=20.*16"):
        fit_closed_form(untrained(20), pictures())
    paper = AutoencoderDA.from_base(tiny.tiny_taesd().double(), detail_channels=4, linear_blocks=False)
    with pytest.raises(SettingsError, match="linear_blocks"):
        fit_closed_form(paper, pictures())
    with pytest.raises(SettingsError, match="base_in_detail=True"):
        fit_closed_form(untrained(8), pictures(), code="zero sum")
    with pytest.raises(SettingsError, match="0 components: give detail_channels from 8"):
        fit_closed_form(untrained(4, base_in_detail=True), pictures(), code="zero sum")
    with pytest.raises(NumericsError, match="not finite"):
        fit_closed_form(untrained(4), pictures() * torch.nan)
