"""AutoencoderTAEF2: TAEF2's architecture against a plain calculation, its folder, and its place as a base."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import tiny
from davae import AutoencoderDA, AutoencoderTAEF2
from davae.data.pictures import to_floats
from davae.errors import CheckpointError, SettingsError
from davae.method.metrics import psnr
from davae.pipelines.autoencoders import load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from scenes import scene

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights" / "taef2"
PUBLISHED = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="TAEF2's weights are not here")


def picture(side: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(5)).mul(2).sub(1).to(dtype)


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """A convolution of stride 1 with zeros around, as its defining sum; [C, H, W] -> [C', H, W]."""
    reach = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    height, width = x.shape[1:]
    out = np.zeros((len(weight), height, width))
    for row in range(weight.shape[-2]):
        for column in range(weight.shape[-1]):
            seen = padded[:, row : row + height, column : column + width]
            out += np.einsum("oc,chw->ohw", weight[:, :, row, column], seen)
    return out + np.reshape(bias, (-1, 1, 1))


def middle_block(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """ReLU(conv-ReLU-conv-ReLU-conv of u + u), u = x + W2 ReLU(GroupNorm_4(W1 x)): TAEF2's block, in numpy."""
    inner = convolved(x, weights["pool.0.weight"])
    grouped = inner.reshape(4, -1)
    grouped = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-5)
    scale, shift = (weights[f"pool.1.{name}"][:, None, None] for name in ("weight", "bias"))
    inner = grouped.reshape(inner.shape) * scale + shift
    u = x + convolved(np.maximum(inner, 0), weights["pool.3.weight"])
    hidden = u
    for layer in (0, 2, 4):
        hidden = convolved(hidden, weights[f"conv.{layer}.weight"], weights[f"conv.{layer}.bias"])
        hidden = np.maximum(hidden, 0) if layer < 4 else hidden
    return np.maximum(hidden + u, 0)


@pytest.mark.parametrize(("part", "index"), [("encoder", 5), ("encoder", 6), ("decoder", 2), ("decoder", 3)])
def test_blocks_at_the_latents_resolution_are_taef2s(part: str, index: int) -> None:
    block = getattr(tiny.tiny_taef2().double(), part).layers[index]
    weights = {name: tensor.detach().numpy() for name, tensor in block.named_parameters()}
    x = torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(2)).double()
    expected = middle_block(x[0].numpy(), weights)
    np.testing.assert_allclose(block(x)[0].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def plain(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The walk over an original file's layers by their numbers: what its keys alone say."""
    last = max(int(key.partition(".")[0]) for key in weights)
    decoder = "0.weight" not in weights
    if decoder:
        x = torch.tanh(x / 3) * 3
    for index in range(decoder, last + 1):
        own = {key.partition(".")[2]: tensor for key, tensor in weights.items() if key.startswith(f"{index}.")}
        if "conv.0.weight" in own:
            if "pool.0.weight" in own:
                inner = F.group_norm(F.conv2d(x, own["pool.0.weight"]), 4, own["pool.1.weight"], own["pool.1.bias"])
                x = x + F.conv2d(inner.relu(), own["pool.3.weight"])
            hidden = F.conv2d(x, own["conv.0.weight"], own["conv.0.bias"], padding=1).relu()
            hidden = F.conv2d(hidden, own["conv.2.weight"], own["conv.2.bias"], padding=1).relu()
            x = (F.conv2d(hidden, own["conv.4.weight"], own["conv.4.bias"], padding=1) + x).relu()
        elif own:
            stride = 1 if decoder or "bias" in own else 2
            x = F.conv2d(x, own["weight"], own.get("bias"), padding=1, stride=stride)
        elif index == 2:
            x = x.relu()
        else:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x


@PUBLISHED
def test_published_weights_do_what_their_keys_say_and_reconstruct() -> None:
    script = Path(__file__).parents[2] / "recipes" / "taef2" / "build_base.py"
    spec = spec_from_file_location("build_base", script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    vae = module.load_taef2(WEIGHTS)
    image = to_floats(torch.from_numpy(np.stack([scene(0, 128), scene(1, 128)])).permute(0, 3, 1, 2))
    encoder, decoder = (
        {key: tensor.float() for key, tensor in load_file(WEIGHTS / f"{part}.safetensors").items()}
        for part in ("encoder", "decoder")
    )
    with torch.no_grad():
        latents = vae.encode(image).latents
        assert latents.shape == (2, 32, 16, 16)
        torch.testing.assert_close(latents, plain(encoder, (image + 1) / 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(latents).sample, plain(decoder, latents) * 2 - 1, rtol=1e-4, atol=1e-4)
        assert psnr(vae(image).sample.clamp(-1, 1), image).min() > 28


def test_forward_does_not_round_the_latents() -> None:
    vae, image = tiny.tiny_taef2().double(), picture()
    assert torch.equal(vae(image).sample, vae.decode(vae.encode(image).latents).sample)


def test_folder_round_trip(tmp_path: Path) -> None:
    vae = tiny.tiny_taef2()
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderTAEF2.from_pretrained(tmp_path)
    assert [list(layer.state_dict()) for layer in loaded.encoder.layers] == [
        list(layer.state_dict()) for layer in vae.encoder.layers
    ]
    assert torch.equal(loaded(picture(dtype=torch.float32)).sample, vae(picture(dtype=torch.float32)).sample)
    as_base = load_base_vae(str(tmp_path))
    assert type(as_base) is AutoencoderTAEF2
    assert all(torch.equal(ours, vae.state_dict()[name]) for name, ours in as_base.state_dict().items())


def test_autoencoder_da_starts_from_it_and_keeps_it(tmp_path: Path) -> None:
    vae, image = tiny.tiny_taef2().double(), picture()
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=8)
    latents = autoencoder.encode_pretrained(image)
    assert torch.equal(latents, vae.encode(image).latents)
    assert torch.equal(autoencoder.decode_full(latents), vae.decode(latents).sample)
    autoencoder.save_pretrained(tmp_path)
    loaded = AutoencoderDA.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.base_config["_class_name"] == "AutoencoderTAEF2"
    assert torch.equal(loaded(image).sample, autoencoder(image).sample)


def test_a_pipeline_with_it_is_saved_upgraded_and_loaded(tmp_path: Path) -> None:
    pipeline = tiny.tiny_sd3_pipeline(vae=tiny.tiny_taef2())
    save_pipeline(pipeline, tmp_path / "base")
    assert type(load_base_vae(str(tmp_path / "base"))) is AutoencoderTAEF2
    loaded = load_pipeline(tmp_path / "base")
    upgraded = upgrade(loaded, AutoencoderDA.from_base(loaded.vae, detail_channels=4))
    save_pipeline(upgraded, tmp_path / "upgraded")
    assert load_pipeline(tmp_path / "upgraded").vae.config.base_config["_class_name"] == "AutoencoderTAEF2"


def test_a_bare_folder_of_another_class_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(SettingsError, match=r"VQModel.*AutoencoderKL, AutoencoderTiny, .*AutoencoderTAEF2"):
        load_base_vae(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTAEF2"}')
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_base_vae(str(tmp_path))
