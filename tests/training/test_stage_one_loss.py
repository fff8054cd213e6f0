"""The loss of one batch: its parts, what is drawn for it, and who plays against whom."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from davae.data.sources import PictureSet, open_pictures
from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS, patchwise_lpips
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_autoencoder
from davae.run.ranks import Ranks
from davae.seeds import generator, rand, randn, sample_generators
from davae.training.companion import Companion
from davae.training.stage_one import discriminator_of
from davae.training.stage_one_loss import (
    adaptive_factors,
    adversarial_losses,
    adversarial_ramp,
    last_convolution,
    perceptual_loss,
    stage_one_loss,
    with_detail_dropout,
    with_latent_noise,
)
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.state import TrainingState
from tiny import tiny_taesd, tiny_vae


@pytest.fixture(scope="module")
def train_pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64, split="train")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS.alex()


@pytest.fixture
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


@pytest.fixture
def state(autoencoder: AutoencoderDA, tmp_path: Path) -> TrainingState:
    return TrainingState(
        tmp_path,
        {"a": autoencoder},
        autoencoder.detail_parameters(),
        total_steps=1,
        learning_rate=lambda step: 1e-3,
        seed=0,
        recipe_digest="0" * 64,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_parts_are_what_they_are_called_and_add_up(autoencoder, state, train_pictures, lpips, reduction) -> None:
    weights = LossWeights(l1=0.7, gradient=0.3, lpips=0.2, kl=1e-3, kl_reduction=reduction, alignment=0.4)
    image = train_pictures.batch([0, 1])
    state.step = 3
    loss, parts, _ = stage_one_loss(autoencoder, image, lpips, AutoencoderRecipe(loss=weights, seed=5), state)
    assert loss.requires_grad
    assert set(parts) == {"l1", "gradient", "lpips", "kl", "alignment"}
    total = sum(getattr(weights, name) * part.item() for name, part in parts.items())
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
    for name, part in expected.items():
        assert parts[name].item() == pytest.approx(part.item(), rel=1e-4), name


def test_gradients_reach_all_that_is_trained_and_nothing_else(autoencoder, state, train_pictures, lpips) -> None:
    loss, _, _ = stage_one_loss(autoencoder, train_pictures.batch([0]), lpips, AutoencoderRecipe(), state)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in autoencoder.detail_parameters())
    assert all(p.grad is None for p in autoencoder.base_encoder.parameters())
    assert all(p.grad is None for p in lpips.parameters())


def test_the_posterior_noise_is_a_function_of_seed_and_sample(autoencoder, state, train_pictures, lpips) -> None:
    image, losses = train_pictures.batch([0]), []
    for seed, state.step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        recipe = AutoencoderRecipe(loss=LossWeights(lpips=0), seed=seed)
        losses.append(stage_one_loss(autoencoder, image, lpips, recipe, state)[0].item())
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_latent_noise_has_its_level_in_each_channels_own_deviations() -> None:
    shift = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    base, detail = torch.randn(64, 4, 16, 16), shift * torch.randn(64, 4, 16, 16) + shift
    noisy = with_latent_noise(base, detail, 0.5, sample_generators(0, "latent noise", range(64)), Ranks())
    level = 0.5 * randn((64,), sample_generators(0, "latent noise", range(64))).abs()
    for half, clean in zip(noisy, (base, detail), strict=True):
        found = (half - clean).std(dim=(2, 3)) / clean.std(dim=(0, 2, 3))
        torch.testing.assert_close(found, level[:, None].expand(-1, 4), rtol=0.2, atol=1e-3)
    assert not torch.equal(noisy[0] - base, (noisy[1] - detail) / shift)
    assert with_latent_noise(base, detail, 0.0, [], Ranks()) == (base, detail)


def test_latent_noise_cannot_be_shrunk_away_through_its_deviation() -> None:
    detail = torch.randn(2, 4, 8, 8, requires_grad=True)
    upstream = torch.randn(2, 4, 8, 8)
    random = sample_generators(0, "latent noise", range(2))
    noisy = with_latent_noise(torch.randn(2, 4, 8, 8), detail, 0.5, random, Ranks())[1]
    assert torch.equal(torch.autograd.grad(noisy, detail, upstream)[0], upstream)


def test_latent_noise_changes_what_is_decoded_and_not_what_is_aligned(
    autoencoder, state, train_pictures, lpips
) -> None:
    image = train_pictures.batch([0, 1])
    (_, quiet, _), (_, noisy, _) = (
        stage_one_loss(
            autoencoder, image, lpips, AutoencoderRecipe(loss=LossWeights(lpips=0), latent_noise=scale), state
        )
        for scale in (0.0, 1.0)
    )
    assert noisy["l1"] != quiet["l1"]
    assert noisy["alignment"] == quiet["alignment"]


# --------------------------------------------------------------------------------------------------- detail dropout


@pytest.mark.parametrize("inverted", [False, True])
def test_detail_dropout_is_of_whole_pictures_at_its_rate(inverted: bool) -> None:
    """METHOD section 2.2: zero with probability p for each sample; inverted, the others times 1 / (1 - p)."""
    detail = torch.randn(2000, 2, 2, 2, dtype=torch.float64) + 3
    random = sample_generators(0, "detail dropout", range(2000))
    dropped = with_detail_dropout(detail, 0.25, random, inverted=inverted).numpy()
    scale = 1 / (1 - 0.25) if inverted else 1.0
    gone = (dropped == 0).all(axis=(1, 2, 3))
    np.testing.assert_allclose(dropped[~gone], scale * detail.numpy()[~gone], rtol=1e-15)
    assert gone.mean() == pytest.approx(0.25, abs=0.04)  # four deviations of the mean of 2000
    assert dropped.mean() / detail.mean().item() == pytest.approx(0.75 * scale, abs=0.05)


def test_no_detail_dropout_changes_nothing() -> None:
    detail = torch.randn(2, 4, 2, 2)
    assert with_detail_dropout(detail, 0.0, [], inverted=True) is detail


def test_only_the_joint_decoder_sees_dropped_details(autoencoder, state, train_pictures, lpips) -> None:
    image = train_pictures.batch(range(8))
    plain, inverted, whole = (
        stage_one_loss(autoencoder, image, lpips, AutoencoderRecipe(loss=LossWeights(lpips=0), **changes), state).logs
        for changes in ({"detail_dropout": 0.5}, {"detail_dropout": 0.5, "inverted_dropout": True}, {})
    )
    assert len({logs["l1"].item() for logs in (plain, inverted, whole)}) == 3
    for name in ("kl", "alignment"):
        assert plain[name] == inverted[name] == whole[name]
    with torch.no_grad():
        mean, _ = autoencoder.encode_detail(image)
        assert autoencoder(image).sample.equal(autoencoder(image).sample), "nothing is dropped outside of training"
        gone = rand(sample_generators(0, "detail dropout", range(8))) < 0.5
        assert 0 < gone.sum() < 8
        without = autoencoder.reconstruct(autoencoder.encode_base(image[gone]), torch.zeros_like(mean[gone]))
    loss = stage_one_loss(
        autoencoder, image[gone], lpips, AutoencoderRecipe(loss=LossWeights(lpips=0), detail_dropout=0.999), state
    )
    torch.testing.assert_close(loss.logs["l1"], (without - image[gone]).abs().mean())


# --------------------------------------------------------------------------------------------------- the target, LPIPS


def test_the_reconstruction_is_compared_with_the_target(autoencoder, state, train_pictures, lpips) -> None:
    image, recipe = train_pictures.batch([0, 1]), AutoencoderRecipe(detail_dropout=0.5, latent_noise=0.3)
    with torch.no_grad():
        base, (mean, log_variance) = autoencoder.encode_base(image), autoencoder.encode_detail(image)
        posterior, latent, dropout = (
            sample_generators(0, name, range(2)) for name in ("posterior", "latent noise", "detail dropout")
        )
        detail = mean + (0.5 * log_variance).exp() * randn(mean.shape, posterior)
        base, detail = with_latent_noise(base, detail, 0.3, latent, Ranks())
        detail = with_detail_dropout(detail, 0.5, dropout, inverted=False)
        reconstruction = autoencoder.reconstruct(base, detail)
    own = stage_one_loss(autoencoder, image, lpips, recipe, state).logs
    other = stage_one_loss(autoencoder, image, lpips, recipe, state, target=reconstruction).logs
    for name in ("l1", "gradient", "lpips"):
        assert own[name] > 0.01
        assert other[name].item() == pytest.approx(0, abs=1e-6)
    for name in ("kl", "alignment"):
        assert other[name] == own[name]


def test_lpips_is_patchwise_where_the_recipe_says_so(train_pictures, lpips) -> None:
    image = train_pictures.batch([0, 1])
    blurred = image.roll(3, -1)
    for chosen, stride in (({}, 16), ({"lpips_stride": 24}, 24)):
        found = perceptual_loss(lpips, blurred, image, LossWeights(lpips_patch=32, **chosen))
        assert found == patchwise_lpips(lpips, blurred, image, patch=32, stride=stride).mean()
    assert perceptual_loss(lpips, blurred, image, LossWeights()) == lpips(blurred, image).mean()
    assert perceptual_loss(lpips, blurred, image, LossWeights(lpips=0, lpips_patch=32)) == 0


# --------------------------------------------------------------------------------------------------- the adversary


@pytest.fixture
def opponent(state: TrainingState) -> Companion:
    made = discriminator_of(AutoencoderRecipe(loss=LossWeights(adversarial=0.1)))
    made.prepare(state.ranks)
    return made


ADVERSARIAL = LossWeights(l1=0.7, gradient=0.3, lpips=0.2, alignment=0.4, kl=1e-3, adversarial=0.1)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_both_players_change_in_their_own_step_only(autoencoder, state, train_pictures, lpips, opponent) -> None:
    image = train_pictures.batch([0, 1])
    trained = {name for name, p in autoencoder.named_parameters() if p.requires_grad}
    loss = stage_one_loss(autoencoder, image, lpips, AutoencoderRecipe(loss=ADVERSARIAL), state, opponent=opponent)
    ours, theirs = copies(autoencoder), copies(opponent.model)
    state.update(loss.total, loss.logs)
    assert changed(autoencoder, ours) == trained
    assert changed(opponent.model, theirs) == set()
    assert all(p.grad is None for p in opponent.model.parameters())
    ours = copies(autoencoder)
    opponent.update(loss.discriminator)
    assert changed(autoencoder, ours) == set()
    assert changed(opponent.model, theirs) == set(theirs)
    assert all(p.grad is None for p in autoencoder.parameters())


def test_hinge_losses_of_one_batch_at_a_time() -> None:
    """Each batch has BatchNorm statistics of its own; only the generator's loss reaches the pictures."""
    discriminator = PatchDiscriminator(generator(0, "discriminator"), width=4)
    reconstruction = torch.randn(2, 3, 32, 32, requires_grad=True)
    target = 2 * torch.randn(2, 3, 32, 32)
    losses = adversarial_losses(discriminator, reconstruction, target)
    real, fake = discriminator(target).detach().numpy(), discriminator(reconstruction).detach().numpy()
    assert losses["adversarial"].item() == pytest.approx(-fake.mean(), rel=1e-5)
    expected = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    assert losses["discriminator"].item() == pytest.approx(expected, rel=1e-5)
    losses["discriminator"].backward()
    assert reconstruction.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())
    discriminator.zero_grad(set_to_none=True)
    losses["adversarial"].backward()
    assert reconstruction.grad.any()
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


@pytest.mark.parametrize(("ramp_steps", "expected"), [(0, [0, 0, 0, 1, 1, 1, 1]), (4, [0, 0, 0, 0.25, 0.5, 0.75, 1])])
def test_the_ramp_is_zero_before_its_start_and_then_linear(ramp_steps: int, expected: list[float]) -> None:
    assert [adversarial_ramp(step, start=3, ramp_steps=ramp_steps) for step in range(7)] == expected
    assert adversarial_ramp(1000, start=3, ramp_steps=ramp_steps) == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_total_is_the_weighted_sum_with_ramp_and_factors(
    autoencoder, state, train_pictures, lpips, opponent, adaptive
) -> None:
    """METHOD sections 3 and 4: factors |g of L_rec| / (|g| + 1e-4), constants for the gradient of the total."""
    changes = {"adversarial_start": 2, "adversarial_ramp_steps": 4}
    if adaptive:
        changes |= {"adaptive_adversarial": True, "adaptive_alignment": True}
    weights, image = ADVERSARIAL.model_copy(update=changes), train_pictures.batch([0, 1])
    state.step = 3
    loss = stage_one_loss(autoencoder, image, lpips, AutoencoderRecipe(loss=weights), state, opponent=opponent)
    logs = loss.logs
    factors = {"alignment": 1.0, "adversarial": 1.0}
    conv = autoencoder.detail_downsample.conv.weight
    assert not conv.any(), "the closed-form start: the gradient is there although the weight is zero"
    places = {"alignment": conv, "adversarial": autoencoder.joint_decoder.conv_out.weight}
    rec = 0.7 * logs["l1"] + 0.3 * logs["gradient"] + 0.2 * logs["lpips"]
    norms = {
        name: [
            np.linalg.norm(torch.autograd.grad(value, place, retain_graph=True)[0].double().numpy())
            for value in (rec, logs[name])
        ]
        for name, place in places.items()
    }
    if adaptive:
        factors = {name: reference / (own + 1e-4) for name, (reference, own) in norms.items()}
        assert all(0 < factor != pytest.approx(1) for factor in factors.values())
    for name, factor in factors.items():
        found = logs.get(f"{name}_factor")
        assert (found is None) if not adaptive else found.item() == pytest.approx(factor, rel=1e-4)
    scaled = 0.4 * factors["alignment"] * logs["alignment"] + 0.1 * 0.5 * factors["adversarial"] * logs["adversarial"]
    expected = rec + 1e-3 * logs["kl"] + scaled
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-4)
    for place in places.values():
        found, wanted = (torch.autograd.grad(value, place, retain_graph=True)[0] for value in (loss.total, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6 * wanted.abs().max().item())


def test_adaptive_factors_are_capped_and_only_where_they_have_a_weight() -> None:
    weight = torch.ones(3, requires_grad=True)
    parts = {
        "l1": 1e9 * weight.sum(),
        "gradient": 0 * weight.sum(),
        "lpips": 0 * weight.sum(),
        "alignment": 0 * weight.sum(),
        "adversarial": 0 * weight.sum(),
    }
    places = {"alignment": weight, "adversarial": weight}
    both = {"adaptive_alignment": True, "adaptive_adversarial": True}
    found = adaptive_factors(parts, LossWeights(adversarial=1.0, **both), places, Ranks())
    assert found == {"alignment": 1e8, "adversarial": 1e4}
    assert set(adaptive_factors(parts, LossWeights(adversarial=0.0, **both), places, Ranks())) == {"alignment"}
    assert adaptive_factors(parts, LossWeights(adversarial=1.0), places, Ranks()) == {}
    del parts["adversarial"]  # before the discriminator's start
    assert set(adaptive_factors(parts, LossWeights(adversarial=1.0, **both), places, Ranks())) == {"alignment"}


def test_the_last_convolution_is_the_one_that_makes_pixels() -> None:
    kl, small = tiny_vae().decoder, tiny_taesd().decoder
    assert last_convolution(kl) is kl.conv_out.weight
    assert last_convolution(small) is small.layers[-1].weight
    assert last_convolution(kl).shape[0] == last_convolution(small).shape[0] == 3
