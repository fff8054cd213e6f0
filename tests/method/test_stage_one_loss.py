"""The loss of one batch: its terms, its random draws, and the discriminator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from davae.data.sources import PictureSet, open_pictures
from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS, patchwise_lpips
from davae.method.stage_one_loss import (
    StageOneLoss,
    StageOneSettings,
    adaptive_factors,
    add_latent_noise,
    adversarial_losses,
    adversarial_ramp,
    drop_details,
    last_convolution,
    perceptual_loss,
    stage_one_loss,
)
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder
from davae.seeds import generator, rand, randn, sample_generators
from tiny import tiny_taesd, tiny_vae

WITHOUT_LPIPS = {"l1": 1.0, "kl": 1e-6, "alignment": 0.5}
ADVERSARIAL = {"l1": 0.7, "gradient": 0.3, "lpips": 0.2, "alignment": 0.4, "kl": 1e-3, "adversarial": 0.1}


@pytest.fixture(scope="module")
def train_pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64, split="train")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS.alex()


@pytest.fixture
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


def keyed(images: Tensor) -> dict[str, Any]:
    return {"seed": 0, "samples": range(len(images))}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_terms_are_what_they_are_called_and_add_up(autoencoder, train_pictures, lpips, reduction) -> None:
    weights = {"l1": 0.7, "gradient": 0.3, "lpips": 0.2, "kl": 1e-3, "alignment": 0.4}
    settings = StageOneSettings(weights=weights, kl_reduction=reduction)
    image = train_pictures.batch([0, 1])
    loss, logs, _ = stage_one_loss(autoencoder, image, lpips, settings, seed=5, samples=[6, 7])
    assert loss.requires_grad
    assert set(logs) == {"l1", "gradient", "lpips", "kl", "alignment"}
    total = sum(weights[name] * term.item() for name, term in logs.items())
    assert loss.item() == pytest.approx(total, rel=1e-6)

    with torch.no_grad():
        base = autoencoder.encode_base(image)
        mean, log_variance = autoencoder.encode_detail(image)
        noise = randn(mean.shape, sample_generators(5, "posterior", [6, 7]))
        detail = mean + log_variance.exp().sqrt() * noise
        error = autoencoder.reconstruct(base, detail) - image
        divergence = kl_divergence(Normal(mean, log_variance.exp().sqrt()), Normal(0.0, 1.0))
        pairs = (detail[:, 0::2] + detail[:, 1::2]) / 2  # 8 detail channels on 4 of the base
    expected = {
        "l1": error.abs().mean(),
        "gradient": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
        "lpips": lpips(image + error, image).mean(),
        "kl": 2 * divergence.mean() if reduction == "mean" else divergence.sum() / len(image),
        "alignment": (pairs - base).square().mean(),
    }
    for name, term in expected.items():
        assert logs[name].item() == pytest.approx(term.item(), rel=1e-4), name


def test_gradients_reach_all_that_is_trained_and_nothing_else(autoencoder, train_pictures, lpips) -> None:
    stage_one_loss(autoencoder, train_pictures.batch([0]), lpips).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in autoencoder.detail_parameters())
    assert all(p.grad is None for p in autoencoder.base_encoder.parameters())
    assert all(p.grad is None for p in lpips.parameters())


def test_the_posterior_noise_is_a_function_of_seed_and_sample(autoencoder, train_pictures, lpips) -> None:
    image, settings = train_pictures.batch([0]), StageOneSettings(weights=WITHOUT_LPIPS)
    losses = []
    for seed, sample in ((0, 0), (0, 0), (0, 1), (1, 0)):
        loss = stage_one_loss(autoencoder, image, lpips, settings, seed=seed, samples=[sample])
        losses.append(loss.total.item())
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_without_generators_torchs_own_draws(autoencoder, train_pictures, lpips) -> None:
    image = train_pictures.batch([0, 1])
    settings = StageOneSettings(weights=WITHOUT_LPIPS, latent_noise=0.1, detail_dropout=0.5)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(stage_one_loss(autoencoder, image, lpips, settings).total.item())
    assert losses[0] == losses[1] != losses[2]


# ------------------------------------------------------------------------------------------------------ latent noise


def test_latent_noise_has_its_level_in_each_channels_own_deviations() -> None:
    shift = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    base, detail = torch.randn(64, 4, 16, 16), shift * torch.randn(64, 4, 16, 16) + shift
    noisy = add_latent_noise(base, detail, 0.5, sample_generators(0, "latent noise", range(64)))
    level = 0.5 * randn((64,), sample_generators(0, "latent noise", range(64))).abs()
    for half, clean in zip(noisy, (base, detail), strict=True):
        ratio = (half - clean).std(dim=(2, 3)) / clean.std(dim=(0, 2, 3))
        torch.testing.assert_close(ratio, level[:, None].expand(-1, 4), rtol=0.2, atol=1e-3)
    assert not torch.equal(noisy[0] - base, (noisy[1] - detail) / shift)
    assert add_latent_noise(base, detail, 0.0, []) == (base, detail)


def test_latent_noise_cannot_be_shrunk_away_through_its_deviation() -> None:
    detail = torch.randn(2, 4, 8, 8, requires_grad=True)
    upstream = torch.randn(2, 4, 8, 8)
    random = sample_generators(0, "latent noise", range(2))
    noisy = add_latent_noise(torch.randn(2, 4, 8, 8), detail, 0.5, random)[1]
    assert torch.equal(torch.autograd.grad(noisy, detail, upstream)[0], upstream)


def test_latent_noise_changes_what_is_decoded_and_not_what_is_aligned(autoencoder, train_pictures, lpips) -> None:
    image, logs = train_pictures.batch([0, 1]), {}
    for scale in (0.0, 1.0):
        settings = StageOneSettings(weights=WITHOUT_LPIPS, latent_noise=scale)
        logs[scale] = stage_one_loss(autoencoder, image, lpips, settings, **keyed(image)).logs
    assert logs[1.0]["l1"] != logs[0.0]["l1"]
    assert logs[1.0]["alignment"] == logs[0.0]["alignment"]


# --------------------------------------------------------------------------------------------------- detail dropout


@pytest.mark.parametrize("inverted", [False, True])
def test_detail_dropout_is_of_whole_pictures_at_its_rate(inverted: bool) -> None:
    """Zero with probability p for each sample; inverted, the others times 1 / (1 - p)."""
    detail = torch.randn(2000, 2, 2, 2, dtype=torch.float64) + 3
    random = sample_generators(0, "detail dropout", range(2000))
    dropped = drop_details(detail, 0.25, random, inverted=inverted).numpy()
    scale = 1 / (1 - 0.25) if inverted else 1.0
    gone = (dropped == 0).all(axis=(1, 2, 3))
    np.testing.assert_allclose(dropped[~gone], scale * detail.numpy()[~gone], rtol=1e-15)
    assert gone.mean() == pytest.approx(0.25, abs=0.04)  # four deviations of the mean of 2000
    assert dropped.mean() / detail.mean().item() == pytest.approx(0.75 * scale, abs=0.05)


def test_no_detail_dropout_changes_nothing() -> None:
    detail = torch.randn(2, 4, 2, 2)
    assert drop_details(detail, 0.0, [], inverted=True) is detail


def test_only_the_joint_decoder_sees_dropped_details(autoencoder, train_pictures, lpips) -> None:
    image = train_pictures.batch(range(8))

    def logs_of(images: Tensor, **changes: object) -> dict[str, Tensor]:
        settings = StageOneSettings(weights=WITHOUT_LPIPS, **changes)
        return stage_one_loss(autoencoder, images, lpips, settings, **keyed(images)).logs

    plain = logs_of(image, detail_dropout=0.5)
    inverted = logs_of(image, detail_dropout=0.5, inverted_dropout=True)
    whole = logs_of(image)
    assert len({logs["l1"].item() for logs in (plain, inverted, whole)}) == 3
    for name in ("kl", "alignment"):
        assert plain[name] == inverted[name] == whole[name]

    with torch.no_grad():
        mean, _ = autoencoder.encode_detail(image)
        assert autoencoder(image).sample.equal(autoencoder(image).sample), "nothing is dropped outside of training"
        gone = rand(sample_generators(0, "detail dropout", range(8))) < 0.5
        assert 0 < gone.sum() < 8
        without = autoencoder.reconstruct(autoencoder.encode_base(image[gone]), torch.zeros_like(mean[gone]))
    logs = logs_of(image[gone], detail_dropout=0.999)
    torch.testing.assert_close(logs["l1"], (without - image[gone]).abs().mean())


# --------------------------------------------------------------------------------------------------- the target, LPIPS


def test_the_reconstruction_is_compared_with_the_target(autoencoder, train_pictures, lpips) -> None:
    image, settings = train_pictures.batch([0, 1]), StageOneSettings(detail_dropout=0.5, latent_noise=0.3)
    posterior, noise, dropout = (
        sample_generators(0, purpose, range(2)) for purpose in ("posterior", "latent noise", "detail dropout")
    )
    with torch.no_grad():
        base, (mean, log_variance) = autoencoder.encode_base(image), autoencoder.encode_detail(image)
        detail = mean + (0.5 * log_variance).exp() * randn(mean.shape, posterior)
        base, detail = add_latent_noise(base, detail, 0.3, noise)
        detail = drop_details(detail, 0.5, dropout, inverted=False)
        reconstruction = autoencoder.reconstruct(base, detail)

    own = stage_one_loss(autoencoder, image, lpips, settings, **keyed(image)).logs
    other = stage_one_loss(autoencoder, image, lpips, settings, target=reconstruction, **keyed(image)).logs
    for name in ("l1", "gradient", "lpips"):
        assert own[name] > 0.01
        assert other[name].item() == pytest.approx(0, abs=1e-6)
    for name in ("kl", "alignment"):
        assert other[name] == own[name]


def test_lpips_is_patchwise_where_the_settings_say_so(train_pictures, lpips) -> None:
    image = train_pictures.batch([0, 1])
    blurred = image.roll(3, -1)
    for chosen, stride in (({}, 16), ({"lpips_stride": 24}, 24)):
        loss = perceptual_loss(lpips, blurred, image, StageOneSettings(lpips_patch=32, **chosen))
        assert loss == patchwise_lpips(lpips, blurred, image, patch=32, stride=stride).mean()
    assert perceptual_loss(lpips, blurred, image, StageOneSettings()) == lpips(blurred, image).mean()
    for weights in ({"lpips": 0.0}, {}):
        assert perceptual_loss(lpips, blurred, image, StageOneSettings(weights=weights, lpips_patch=32)) == 0


# --------------------------------------------------------------------------------------------------- the discriminator


def test_hinge_losses_of_one_batch_at_a_time() -> None:
    """Each batch has BatchNorm statistics of its own; only the decoder's loss reaches the images."""
    discriminator = PatchDiscriminator(generator(0, "discriminator"), width=4)
    reconstruction = torch.randn(2, 3, 32, 32, requires_grad=True)
    target = 2 * torch.randn(2, 3, 32, 32)
    adversarial, own = adversarial_losses(discriminator, reconstruction, target)
    real, fake = discriminator(target).detach().numpy(), discriminator(reconstruction).detach().numpy()
    assert adversarial.item() == pytest.approx(-fake.mean(), rel=1e-5)
    expected = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    assert own.item() == pytest.approx(expected, rel=1e-5)

    own.backward()
    assert reconstruction.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())
    discriminator.zero_grad(set_to_none=True)
    adversarial.backward()
    assert reconstruction.grad.any()
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize(("ramp_steps", "expected"), [(0, [0, 0, 0, 1, 1, 1, 1]), (4, [0, 0, 0, 0.25, 0.5, 0.75, 1])])
def test_the_ramp_is_zero_before_its_start_and_then_linear(ramp_steps: int, expected: list[float]) -> None:
    assert [adversarial_ramp(step, start=3, ramp_steps=ramp_steps) for step in range(7)] == expected
    assert adversarial_ramp(1000, start=3, ramp_steps=ramp_steps) == 1


def gradient_norm(loss: Tensor, place: Tensor) -> float:
    return np.linalg.norm(torch.autograd.grad(loss, place, retain_graph=True)[0].double().numpy())


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_total_is_the_weighted_sum_with_ramp_and_factors(autoencoder, train_pictures, lpips, adaptive) -> None:
    """Factors |g of L_rec| / (|g| + 1e-4), constants for the gradient of the total (arXiv 2012.09841, Eq. 7)."""
    names = frozenset({"adversarial", "alignment"}) if adaptive else frozenset()
    settings = StageOneSettings(weights=ADVERSARIAL, adaptive=names)
    discriminator = PatchDiscriminator(generator(0, "discriminator"))
    image = train_pictures.batch([0, 1])
    loss: StageOneLoss = stage_one_loss(
        autoencoder, image, lpips, settings, discriminator=discriminator, ramp=0.5, **keyed(image)
    )
    logs = loss.logs

    conv = autoencoder.detail_downsample.conv.weight
    assert not conv.any(), "the closed-form start: the gradient is there although the weight is zero"
    places = {"alignment": conv, "adversarial": autoencoder.joint_decoder.conv_out.weight}
    reconstruction = 0.7 * logs["l1"] + 0.3 * logs["gradient"] + 0.2 * logs["lpips"]
    factors = {"alignment": 1.0, "adversarial": 1.0}
    if adaptive:
        for name, place in places.items():
            factors[name] = gradient_norm(reconstruction, place) / (gradient_norm(logs[name], place) + 1e-4)
        assert all(0 < factor != pytest.approx(1) for factor in factors.values())
    for name, factor in factors.items():
        logged = logs.get(f"{name}_factor")
        assert (logged is None) if not adaptive else logged.item() == pytest.approx(factor, rel=1e-4)

    scaled = 0.4 * factors["alignment"] * logs["alignment"] + 0.1 * 0.5 * factors["adversarial"] * logs["adversarial"]
    expected = reconstruction + 1e-3 * logs["kl"] + scaled
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    for place in places.values():
        own, wanted = (torch.autograd.grad(value, place, retain_graph=True)[0] for value in (loss.total, expected))
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-6 * wanted.abs().max().item())


def test_adaptive_factors_are_capped_and_only_where_they_have_a_weight() -> None:
    weight = torch.ones(3, requires_grad=True)
    terms = {name: 0 * weight.sum() for name in ("gradient", "lpips", "alignment", "adversarial")}
    terms["l1"] = 1e9 * weight.sum()
    places = {"alignment": weight, "adversarial": weight}

    def factors(adversarial: float, *adaptive: str) -> dict[str, Tensor]:
        weights = {"l1": 1.0, "lpips": 1.0, "alignment": 0.5, "adversarial": adversarial}
        settings = StageOneSettings(weights=weights, adaptive=frozenset(adaptive))
        return adaptive_factors(terms, settings, places)

    assert factors(1.0, "alignment", "adversarial") == {"alignment": 1e8, "adversarial": 1e4}
    assert set(factors(0.0, "alignment", "adversarial")) == {"alignment"}
    assert factors(1.0) == {}
    del terms["adversarial"]  # before the discriminator's start
    assert set(factors(1.0, "alignment", "adversarial")) == {"alignment"}


def test_the_last_convolution_is_the_one_that_makes_pixels() -> None:
    kl, small = tiny_vae().decoder, tiny_taesd().decoder
    assert last_convolution(kl) is kl.conv_out.weight
    assert last_convolution(small) is small.layers[-1].weight
    assert last_convolution(kl).shape[0] == last_convolution(small).shape[0] == 3
