import numpy as np
import pytest
import torch

from davae.method.discriminator import DISCRIMINATOR_MIN_SIDE, PatchDiscriminator
from davae.seeds import generator


def made(width: int = 4, seed: int = 0) -> PatchDiscriminator:
    return PatchDiscriminator(generator(seed, "discriminator"), width=width)


def test_it_has_the_references_parameters_by_count_and_by_name():
    """2,765,633 parameters, as in the reference code; keys `loss.discriminator.main.*` of its checkpoints."""
    discriminator = made(width=64)
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    convolutions, norms = [0, 2, 5, 8, 11], [3, 6, 9]
    names = {f"main.{index}.weight" for index in convolutions} | {"main.0.bias", "main.11.bias"}
    kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names |= {f"main.{index}.{name}" for index in norms for name in kept}
    assert set(discriminator.state_dict()) == names


def convolution(image: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, stride: int) -> np.ndarray:
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwpq,ocpq->bohw", windows, weight) + np.reshape(bias, (1, -1, 1, 1))


def test_its_logits_are_those_of_the_layers_written_out():
    """NLayerDiscriminator with 3 layers, in numpy float64: convolutions, BatchNorm of the batch, LeakyReLU(0.2)."""
    discriminator = made().double()
    image = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    weights = {name: tensor.numpy().copy() for name, tensor in discriminator.state_dict().items()}
    hidden = convolution(image.numpy(), weights["main.0.weight"], weights["main.0.bias"], 2)
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    for index, stride in ((2, 2), (5, 2), (8, 1)):
        hidden = convolution(hidden, weights[f"main.{index}.weight"], 0.0, stride)
        mean, variance = (f(hidden, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
        scale, shift = (weights[f"main.{index + 1}.{name}"].reshape(1, -1, 1, 1) for name in ("weight", "bias"))
        hidden = (hidden - mean) / np.sqrt(variance + 1e-5) * scale + shift
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    expected = convolution(hidden, weights["main.11.weight"], weights["main.11.bias"], 1)
    assert expected.shape == (2, 1, 2, 3)
    np.testing.assert_allclose(discriminator(image).detach().numpy(), expected, rtol=1e-10)


def test_a_logit_sees_70_px():
    discriminator = made().eval()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(image)
    assert logits.shape == (1, 1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], image)
    for side in (2, 3):
        seen = gradient.abs().sum(dim=(0, 1, 5 - side)).nonzero().flatten()
        assert seen[-1] - seen[0] + 1 == 70


def test_the_smallest_picture_has_one_logit():
    assert made()(torch.zeros(2, 3, DISCRIMINATOR_MIN_SIDE, DISCRIMINATOR_MIN_SIDE)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        made()(torch.zeros(2, 3, DISCRIMINATOR_MIN_SIDE - 1, DISCRIMINATOR_MIN_SIDE - 1))


def test_its_start_is_small_normal_numbers_and_a_function_of_the_generator():
    state = torch.get_rng_state()
    first, again, other = (made(width=64, seed=seed).state_dict() for seed in (0, 0, 1))
    torch.set_rng_state(state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for index in (0, 2, 5, 8, 11):
        weight = first[f"main.{index}.weight"]
        assert not torch.equal(weight, other[f"main.{index}.weight"])
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.mean().item() == pytest.approx(0, abs=0.002)
    for index in (3, 6, 9):
        assert not first[f"main.{index}.bias"].any()
        assert first[f"main.{index}.weight"].mean().item() == pytest.approx(1, abs=0.008)
        assert first[f"main.{index}.weight"].std().item() == pytest.approx(0.02, rel=0.25)
    for index, inputs in ((0, 48), (11, 8192)):
        bias = first[f"main.{index}.bias"]
        assert bias.any()
        assert bias.abs().max() <= inputs**-0.5
