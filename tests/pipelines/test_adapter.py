"""Adapters: LoRA, layers and ports that training changed, saved and put back on their base."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import tiny
from davae.backbones import BACKBONES
from davae.errors import CheckpointError, SettingsError, StorageError
from davae.pipelines.adapter import add_lora, digest_base, load_adapter, save_adapter
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade
from tiny_adapters import disturb, generate

TARGETS = BACKBONES["SD3Transformer2DModel"].lora_targets


def test_lora_starts_without_effect_and_trains_the_ports_in_full(base, autoencoder):
    pipeline = upgrade(base, autoencoder)
    before = generate(pipeline)
    pipeline.transformer.to(torch.bfloat16)
    parameters = add_lora(pipeline.transformer, 4, 4.0, TARGETS)

    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    pipeline.transformer.to(torch.float32)
    names = {name for name, parameter in pipeline.transformer.named_parameters() if parameter.requires_grad}
    ports = {name for name in names if ".lora_" not in name}

    assert ports == {f"{port}.{kind}" for port in ("pos_embed.proj", "proj_out") for kind in ("weight", "bias")}
    # Per block 4 attention layers, the MLP's output and the modulation; 4 more where attention is dual.
    assert len(names - ports) == 2 * (2 * 6 + 4)
    assert len(parameters) == len(names)
    assert np.abs(generate(pipeline) - before).max() < 0.05  # the trip through bfloat16


def test_lora_is_the_same_for_the_same_seed_and_leaves_the_global_stream_alone(base):
    torch.manual_seed(0)
    expected = torch.randn(1)
    torch.manual_seed(0)
    one, two = (add_lora(tiny.tiny_sd3(), 2, 2.0, ["to_q"], seed=5)[1:-2] for _ in range(2))
    torch.manual_seed(0)
    add_lora(base.transformer, 2, 2.0, ["to_q"])
    assert torch.equal(torch.randn(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_adapter_on_the_base_gives_the_trained_pipeline_in_plain_weights(trained, base):
    folder, image = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter")
    assert np.allclose(generate(pipeline), image, atol=1e-4)
    assert not np.allclose(generate(upgrade(load_pipeline(folder / "base"), pipeline.vae)), image, atol=1e-2)
    assert not any("lora" in name or "base_layer" in name for name in pipeline.transformer.state_dict())
    type(base.transformer).from_config(pipeline.transformer.config).load_state_dict(pipeline.transformer.state_dict())
    pipeline.save_pretrained(folder / "fused")
    assert np.array_equal(generate(DiffusionPipeline.from_pretrained(folder / "fused")), generate(pipeline))


def test_fusing_an_adapter_leaves_the_base_alone_that_shares_its_weights(trained, base, autoencoder):
    folder, image = trained
    before = generate(base)
    pipeline = upgrade(base, autoencoder)
    load_adapter(pipeline.transformer, folder / "adapter", fuse=True)
    assert np.allclose(generate(pipeline), image, atol=1e-4)
    assert np.array_equal(generate(base), before)


def test_an_adapter_can_stay_apart_from_the_weights(trained):
    folder, image = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", fuse=False)
    assert np.array_equal(generate(pipeline), image)
    assert any(".lora_A." in name for name in pipeline.transformer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_for_half_precision_is_recognised(trained, dtype):
    folder, _ = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", dtype=dtype)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {dtype}
    assert {model.dtype for model in (pipeline.vae, pipeline.text_encoder)} == {dtype}
    base = load_pipeline(folder / "base", dtype=dtype)  # transformers keeps some of T5 in float32
    assert pipeline.text_encoder_3.get_memory_footprint() == base.text_encoder_3.get_memory_footprint()
    assert np.isfinite(generate(pipeline)).all()


def test_an_adapter_of_the_ports_alone_is_exact(base, autoencoder, tmp_path):
    base.save_pretrained(tmp_path / "base")
    pipeline = upgrade(base, autoencoder)
    disturb([*pipeline.transformer.pos_embed.proj.parameters(), *pipeline.transformer.proj_out.parameters()])
    save_adapter(tmp_path / "adapter", pipeline, base="tiny/base", base_sha256=digest_base(base.transformer))
    reloaded = load_pipeline(tmp_path / "base", adapter=tmp_path / "adapter")
    assert np.array_equal(generate(reloaded), generate(pipeline))


def test_an_adapter_of_trained_layers_is_exact(trained_layers, base, autoencoder):
    folder, pipeline = trained_layers
    image, before = generate(pipeline), generate(base)
    for fuse in (True, False):
        reloaded = load_pipeline(folder / "base", adapter=folder / "adapter", fuse=fuse)
        assert np.array_equal(generate(reloaded), image)

    assert not np.allclose(generate(upgrade(base, autoencoder)), image, atol=1e-2)
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files == {"adapter.json", "transformer_ports.safetensors", "transformer_layers.safetensors", "vae"}

    shared = upgrade(base, autoencoder)
    load_adapter(shared.transformer, folder / "adapter", fuse=True)
    assert np.array_equal(generate(shared), image)
    assert np.array_equal(generate(base), before)


def test_an_adapter_of_trained_layers_in_half_precision(trained_layers):
    folder, _ = trained_layers
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}


def test_trained_layers_that_do_not_fit_are_refused(trained_layers):
    folder, _ = trained_layers
    path = folder / "adapter" / "transformer_layers.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "to_q" in name}, path)
    with pytest.raises(CheckpointError, match=r"transformer_layers.*first at .*ff\.net\.2\.weight"):
        load_pipeline(folder / "base", adapter=folder / "adapter")


def test_an_adapter_on_another_base_is_refused_with_both_hashes(trained):
    folder, _ = trained
    other = tiny.tiny_sd3_pipeline()
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.1)
    other.save_pretrained(folder / "other")
    with pytest.raises(CheckpointError, match=r"tiny/base with SHA-256 [0-9a-f]{64}, but this .* is [0-9a-f]{64}"):
        load_pipeline(folder / "other", adapter=folder / "adapter")


@pytest.mark.parametrize(
    "name", ["adapter.json", "transformer_ports.safetensors", "transformer_lora.safetensors", "vae/config.json"]
)
def test_a_damaged_or_missing_file_of_an_adapter_is_named(trained, name):
    folder, _ = trained
    file = folder / "adapter" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        load_pipeline(folder / "base", adapter=folder / "adapter")
    file.unlink()
    with pytest.raises(CheckpointError, match=name.split("/")[0]):
        load_pipeline(folder / "base", adapter=folder / "adapter")


def test_saving_again_replaces_an_adapter_and_nothing_else(trained, base, autoencoder):
    folder, _ = trained
    pipeline = upgrade(base, autoencoder)
    save_adapter(folder / "adapter", pipeline, base="tiny/base", base_sha256="0" * 64)
    assert not (folder / "adapter" / "transformer_lora.safetensors").exists()
    with pytest.raises(SettingsError, match="not davae's to replace"):
        save_adapter(folder / "base", pipeline, base="tiny/base", base_sha256="0" * 64)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


def test_a_failed_save_leaves_the_old_adapter_and_nothing_half_written(trained, base, autoencoder):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir() if path.is_file()}
    pipeline = upgrade(base, autoencoder)
    pipeline.vae.save_pretrained = None  # the last of the files cannot be written

    with pytest.raises(TypeError):
        save_adapter(folder / "adapter", pipeline, base="tiny/base", base_sha256="0" * 64)
    assert before == {path.name: path.read_bytes() for path in (folder / "adapter").iterdir() if path.is_file()}
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]
    with pytest.raises(StorageError, match="cannot write"):
        save_adapter(folder / "adapter" / "adapter.json" / "inside", pipeline, base="tiny/base", base_sha256="0" * 64)


def test_lora_targets_that_are_no_layers_or_ports_are_refused(base):
    with pytest.raises(SettingsError, match="'to_z' is no linear layer"):
        add_lora(base.transformer, 4, 4.0, ["to_q", "to_z"])
    with pytest.raises(SettingsError, match="'proj' is a latent port"):
        add_lora(base.transformer, 2, 2.0, ["proj"])  # of the feed-forward layer, and of the position embedding
    with pytest.raises(SettingsError, match="'proj_out' is a latent port"):
        add_lora(base.transformer, 4, 4.0, ["proj_out"])
    with pytest.raises(SettingsError, match="rank=0"):
        add_lora(base.transformer, 0, 4.0, ["to_q"])


def test_an_adapter_leaves_out_the_bases_half_of_the_autoencoder(trained_layers, base, autoencoder):
    folder, _ = trained_layers
    names = load_file(folder / "adapter" / "vae" / "diffusion_pytorch_model.safetensors").keys()
    assert not [name for name in names if name.startswith(("base_encoder.", "base_quant_conv."))]

    loaded = load_autoencoder(folder / "adapter", base=base.vae)
    assert loaded.state_dict().keys() == autoencoder.state_dict().keys()
    assert all(torch.equal(tensor, autoencoder.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert {id(parameter) for parameter in loaded.detail_parameters()}.isdisjoint(
        map(id, loaded.base_encoder.parameters())
    )
    assert not loaded.base_encoder.training

    with torch.no_grad():
        next(loaded.base_encoder.parameters()).add_(1)

    assert torch.equal(next(base.vae.encoder.parameters()), next(autoencoder.base_encoder.parameters()))


def test_an_adapters_autoencoder_without_its_base_or_on_another_is_refused(trained_layers):
    folder, _ = trained_layers
    with pytest.raises(SettingsError, match="half an autoencoder"):
        load_autoencoder(folder / "adapter")
    with pytest.raises(CheckpointError, match=r"lacks the weights base_encoder.*give .*adapter and the base"):
        load_autoencoder(folder / "adapter" / "vae")

    other = tiny.tiny_sd3_pipeline().vae
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.1)

    with pytest.raises(CheckpointError, match="made from another base"):
        load_autoencoder(folder / "adapter", base=other)


def test_an_adapter_of_format_1_has_the_whole_autoencoder_and_is_read(trained_layers, autoencoder):
    folder, pipeline = trained_layers
    autoencoder.save_pretrained(folder / "adapter" / "vae")
    index = json.loads((folder / "adapter" / "adapter.json").read_text())
    del index["base_encoder_sha256"]
    (folder / "adapter" / "adapter.json").write_text(json.dumps({**index, "format_version": 1}))
    assert np.array_equal(generate(load_pipeline(folder / "base", adapter=folder / "adapter")), generate(pipeline))
    assert torch.equal(load_autoencoder(folder / "adapter").detail_std, autoencoder.detail_std)
