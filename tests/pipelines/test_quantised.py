"""Eight-bit weights by torchao (the `quant` extra): the upgraded transformer runs, its ports in full precision."""

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, TorchAoConfig
from torch import Tensor, nn

from davae import assets, load_pipeline, widen_transformer
from davae.backbones import backbone_of
from davae.errors import SettingsError

quantization = pytest.importorskip("torchao.quantization", reason="the `quant` extra is not installed")


@pytest.fixture(scope="module")
def upgraded() -> StableDiffusion3Pipeline:
    return load_pipeline(assets.base_pipeline(), adapter=assets.upgrade())


def quantised(pipeline: StableDiffusion3Pipeline, folder: Path, config: object) -> SD3Transformer2DModel:
    """As docs/speed.md does it, by diffusers."""
    pipeline.transformer.save_pretrained(folder)
    ports = backbone_of(pipeline.transformer).ports
    settings = TorchAoConfig(config, modules_to_not_convert=[ports.input, ports.output])
    return SD3Transformer2DModel.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16).eval()


@torch.no_grad()
def velocity(pipeline: StableDiffusion3Pipeline, transformer: SD3Transformer2DModel) -> Tensor:
    backbone, sigma = backbone_of(transformer), torch.tensor([0.3, 0.9])
    condition = backbone.condition(pipeline, ["long red curls", "grinning woman"], max_sequence_length=12)
    arguments = {name: tensor.to(transformer.dtype) for name, tensor in condition.items()}
    noise = torch.randn(2, transformer.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    return backbone.velocity(transformer, noise.to(transformer.dtype), sigma.to(transformer.dtype), arguments).float()


@pytest.mark.parametrize(("kind", "bound"), [("Int8WeightOnlyConfig", 0.03), ("Float8WeightOnlyConfig", 0.08)])
def test_weights_of_eight_bits_are_near_full_precision(upgraded, tmp_path: Path, kind: str, bound: float) -> None:
    transformer = quantised(upgraded, tmp_path, getattr(quantization, kind)())
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    eight = {name for name, layer in layers.items() if type(layer.weight) is not nn.Parameter}

    assert eight == layers.keys() - {"proj_out"}
    ports = backbone_of(transformer).ports
    for name in (ports.input, ports.output):
        weight = transformer.get_submodule(name).weight
        assert torch.equal(weight, upgraded.transformer.get_submodule(name).weight.to(torch.bfloat16))
    exact, rounded = velocity(upgraded, upgraded.transformer), velocity(upgraded, transformer)
    error = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()

    assert 1e-4 < error < bound


def test_a_quantised_pipeline_makes_images_and_its_transformer_is_saved(upgraded, tmp_path: Path) -> None:
    transformer = quantised(upgraded, tmp_path / "whole", quantization.Int8WeightOnlyConfig())
    transformer.save_pretrained(tmp_path / "eight")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "eight", dtype=torch.bfloat16).eval()

    assert torch.equal(velocity(upgraded, loaded), velocity(upgraded, transformer))
    whole, eight = (
        sum(p.stat().st_size for p in (tmp_path / name).rglob("*.safetensors")) for name in ("whole", "eight")
    )

    assert eight < 0.35 * whole  # the whole is in float32
    pipeline = load_pipeline(assets.base_pipeline(), adapter=assets.upgrade(), dtype=torch.bfloat16)
    pipeline.transformer = loaded
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "max_sequence_length": 12, "output_type": "pt"}

    assert pipeline("long red curls", generator=torch.Generator().manual_seed(0), **arguments).images.shape == (
        1,
        3,
        256,
        256,
    )


def test_a_quantised_base_is_not_widened(tmp_path: Path) -> None:
    base = load_pipeline(assets.base_pipeline())
    quantization.quantize_(base.transformer, quantization.Int8WeightOnlyConfig())
    with pytest.raises(SettingsError, match="widen before you quantise"):
        widen_transformer(base.transformer, base_channels=16, detail_channels=16)
