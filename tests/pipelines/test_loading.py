"""Pipelines and autoencoders out of their folders: whole, or refused."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from davae import assets
from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade
from tiny_adapters import generate


def test_a_pipeline_without_t5_loads_without_being_told(base, autoencoder, tmp_path):
    components = {**base.components, "text_encoder_3": None, "tokenizer_3": None}
    pipeline = upgrade(type(base)(**components), autoencoder)
    pipeline.save_pretrained(tmp_path)
    reloaded = load_pipeline(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert reloaded.text_encoder_3 is None
    assert reloaded.transformer.dtype == torch.bfloat16
    assert np.isfinite(generate(reloaded)).all()


def test_a_folder_that_is_no_pipeline_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no .*not_there on this machine"):
        load_pipeline(tmp_path / "not_there")
    with pytest.raises(CheckpointError, match="nobody/nothing cannot be loaded as a name on the Hub"):
        load_pipeline("nobody/nothing")

    base.save_pretrained(tmp_path)
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(CheckpointError, match="cannot be loaded as weights"):
        load_pipeline(tmp_path)


def test_components_are_left_out_by_name_and_names_that_are_none_are_refused(trained):
    folder, _ = trained
    assert load_pipeline(folder / "base", without="text_encoder_3").text_encoder_3 is None
    with pytest.raises(SettingsError, match=r"without=t5: no such part.* text_encoder_3"):
        load_pipeline(folder / "base", without=["t5"])
    for part in ("transformer", "vae"):
        with pytest.raises(SettingsError, match=f"has no {part}: it cannot be upgraded"):
            load_pipeline(folder / "base", adapter=folder / "adapter", without=part)


def test_a_folder_of_one_variant_is_found(base, autoencoder, tmp_path):
    upgraded = upgrade(base, autoencoder)
    upgraded.save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_pipeline(tmp_path / "half")
    assert np.array_equal(generate(loaded), generate(upgraded))
    assert torch.equal(load_autoencoder(tmp_path / "half" / "vae").detail_mean, upgraded.vae.detail_mean)

    base.save_pretrained(tmp_path / "base", variant="bf16")
    assert type(load_base_vae(str(tmp_path / "base"))) is type(base.vae)

    # Beside plain weights, a variant is loaded when it is asked for.
    both = tmp_path / "half"
    upgraded.vae.save_pretrained(both / "vae", variant="bf16")
    with pytest.raises(CheckpointError, match=r"the variants bf16, fp16: say which one"):
        load_autoencoder(both / "vae")
    upgraded.save_pretrained(both)
    with torch.no_grad():
        upgraded.transformer.proj_out.bias.add_(1)
    upgraded.transformer.save_pretrained(both / "transformer", variant="fp16")
    biases = [load_pipeline(both, variant=name).transformer.proj_out.bias for name in (None, "fp16")]
    assert torch.equal(biases[0] + 1, biases[1])


def test_a_pipeline_that_was_saved_in_half_precision_loads_in_float32_throughout(base, tmp_path):
    base.to(torch.float16).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    models = (loaded.transformer, loaded.vae, loaded.text_encoder, loaded.text_encoder_2, loaded.text_encoder_3)
    assert {model.dtype for model in models} == {torch.float32}
    assert np.isfinite(generate(loaded)).all()


@pytest.mark.parametrize("name", ["detail_mean", "detail_upsample.shortcut.weight"])
def test_an_autoencoder_without_some_of_its_weights_is_refused(autoencoder, tmp_path, name):
    autoencoder.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks the weights {name}"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_pipeline_without_some_of_its_weights_is_refused(base, tmp_path, part):
    base.save_pretrained(tmp_path)
    path = tmp_path / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})

    with pytest.raises(CheckpointError, match=name):
        load_pipeline(tmp_path)

    if part == "vae":
        with pytest.raises(CheckpointError, match=name):
            load_base_vae(str(tmp_path))


def test_pickled_weights_are_never_read(base, autoencoder, tmp_path):
    base.save_pretrained(tmp_path / "base", safe_serialization=False)
    autoencoder.save_pretrained(tmp_path / "autoencoder", safe_serialization=False)
    with pytest.raises(CheckpointError):
        load_pipeline(tmp_path / "base")
    with pytest.raises(CheckpointError):
        load_base_vae(str(tmp_path / "base"))
    with pytest.raises(CheckpointError):
        load_autoencoder(tmp_path / "autoencoder")


def test_a_config_without_the_bases_class_is_a_typed_refusal(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["base_config"]["_class_name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be loaded as an AutoencoderDA"):
        load_autoencoder(tmp_path)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json: give the folder of an AutoencoderDA"):
        load_autoencoder(Path("runs/autoencoder"))


def test_another_models_folder_is_a_typed_refusal(base, tmp_path):
    base.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a plain AutoencoderKL, not an AutoencoderDA"):
        load_autoencoder(tmp_path / "vae")

    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        load_pipeline(tmp_path)

    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(CheckpointError, match="cannot be loaded as a pipeline"):
        load_pipeline(tmp_path)


def test_an_adapters_autoencoder_is_loaded_without_advice_to_train_what_the_base_gives(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, "diffusers.models.modeling_utils")
    vae = load_base_vae(str(assets.base_pipeline()))
    load_autoencoder(assets.upgrade(), base=vae)
    assert "newly initialized" not in caplog.text
    AutoencoderDA.from_pretrained(assets.upgrade() / "vae")
    assert "newly initialized" in caplog.text  # what diffusers says without us
