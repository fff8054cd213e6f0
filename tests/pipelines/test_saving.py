"""Saved pipelines: stock ones, which replace pipelines and nothing else."""

import json

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from davae.errors import SettingsError
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from tiny_adapters import disturb, generate


def test_a_saved_upgrade_loads_as_a_stock_pipeline_with_the_same_image(base, autoencoder, tmp_path):
    pipeline = upgrade(base, autoencoder)
    disturb(pipeline.transformer.parameters())
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["davae", "AutoencoderDA"]
    for reloaded in (DiffusionPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert np.array_equal(generate(reloaded), generate(pipeline))


def test_a_pipeline_with_a_lora_apart_is_saved_once_it_is_fused(trained):
    folder, image = trained
    pipeline = load_pipeline(folder / "base", adapter=folder / "adapter", fuse=False)
    with pytest.raises(SettingsError, match="transformer has a LoRA beside its weights"):
        save_pipeline(pipeline, folder / "saved")
    assert not (folder / "saved").exists()
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    save_pipeline(pipeline, folder / "saved")
    assert np.allclose(generate(load_pipeline(folder / "saved")), image, atol=1e-4)


def test_a_saved_pipeline_replaces_a_pipeline_and_nothing_else(base, autoencoder, tmp_path):
    upgraded = upgrade(base, autoencoder)
    for _ in range(2):
        save_pipeline(upgraded, tmp_path / "upgraded")
    assert (tmp_path / "upgraded" / "model_index.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingsError, match="not davae's to replace"):
        save_pipeline(upgraded, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
