"""A tiny base, an autoencoder for it, and what training left of both."""

import pytest
import torch

import tiny
from davae.backbones import BACKBONES
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import add_lora, digest_base, find_target_layers, save_adapter
from davae.pipelines.upgrade import upgrade
from tiny_adapters import disturb, generate

TARGETS = BACKBONES["SD3Transformer2DModel"].lora_targets


@pytest.fixture
def base():
    return tiny.tiny_sd3_pipeline()


@pytest.fixture
def autoencoder(base):
    return AutoencoderDA.from_base(base.vae, detail_channels=4).eval()


@pytest.fixture
def trained(base, autoencoder, tmp_path):
    """A saved base, an adapter for it, and the image that the trained pipeline makes."""
    base.save_pretrained(tmp_path / "base")
    pipeline = upgrade(base, autoencoder)
    disturb(add_lora(pipeline.transformer, 4, 8.0, TARGETS))
    save_adapter(tmp_path / "adapter", pipeline, base="tiny/base", base_sha256=digest_base(base.transformer))
    return tmp_path, generate(pipeline)


@pytest.fixture
def trained_layers(base, autoencoder, tmp_path):
    """A saved base, an adapter of trained layers and ports for it, and the pipeline that these belong to."""
    base.save_pretrained(tmp_path / "base")
    pipeline = upgrade(base, autoencoder)
    digest = digest_base(pipeline.transformer)
    transformer = pipeline.transformer
    for layer in (*find_target_layers(transformer, ["to_q", "ff.net.2"]).values(), transformer.proj_out):
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        disturb([layer.weight])
    save_adapter(tmp_path / "adapter", pipeline, base="tiny/base", layers=["to_q", "ff.net.2"], base_sha256=digest)
    return tmp_path, pipeline
