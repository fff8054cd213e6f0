"""Saved pipelines: stock ones, which replace pipelines and nothing else."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusion3Img2ImgPipeline

from davae.backbones import backbone_of
from davae.errors import SettingsError
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from davae.serving.models import serving_copy
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


def test_an_offloaded_pipeline_is_not_saved_and_the_disk_is_not_blamed(base, autoencoder, tmp_path):
    upgraded = upgrade(base, autoencoder)
    cpu_offload(upgraded.transformer, execution_device="cpu")  # what `enable_sequential_cpu_offload` does
    with pytest.raises(SettingsError, match="the transformer's weights are offloaded: save the pipeline before"):
        save_pipeline(upgraded, tmp_path / "saved")
    upgraded.remove_all_hooks()

    settings = {"onload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path / "weights")}
    upgraded.vae.enable_group_offload(**settings, offload_type="leaf_level")
    with pytest.raises(SettingsError, match="the vae's weights are offloaded"):
        save_pipeline(upgraded, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_compiled_transformer_is_known_widened_and_saved(base, autoencoder, tmp_path):
    """torch.compile wraps a module without running it, so this compiles nothing."""
    plain, base.transformer = base.transformer, torch.compile(base.transformer, backend="eager")
    base.vae = torch.compile(base.vae, backend="eager")
    assert backbone_of(base.transformer) is backbone_of(plain)
    upgraded = upgrade(base, autoencoder)
    assert type(upgraded.transformer) is type(plain)

    upgraded.transformer = torch.compile(upgraded.transformer, backend="eager")
    save_pipeline(upgraded, tmp_path / "saved")
    names = load_pipeline(tmp_path / "saved").transformer.state_dict().keys()
    assert names == upgraded.transformer._orig_mod.state_dict().keys()

    inner = upgraded.transformer._orig_mod
    inner.proj_out = torch.compile(inner.proj_out, backend="eager")
    with pytest.raises(SettingsError, match="a layer of the transformer was replaced by torch"):
        save_pipeline(upgraded, tmp_path / "again")


def test_another_pipeline_of_the_same_parts_is_made_as_the_readme_says(base, autoencoder):
    upgraded = upgrade(base, autoencoder)
    call = {"prompt": "a", "image": torch.zeros(1, 3, 64, 64), "height": 64, "width": 64, "num_inference_steps": 2}
    made = (
        StableDiffusion3Img2ImgPipeline.from_pipe(upgraded, vae=upgraded.vae),
        AutoPipelineForImage2Image.from_pipe(upgraded),
    )
    images = []
    for pipeline in made:
        assert type(pipeline) is StableDiffusion3Img2ImgPipeline
        assert pipeline.vae is upgraded.vae
        assert pipeline.transformer is upgraded.transformer
        pipeline.set_progress_bar_config(disable=True)
        settings = {"generator": torch.Generator().manual_seed(0), "max_sequence_length": 8, "output_type": "np"}
        images.append(pipeline(**call, **settings).images)
    assert images[0].shape == (1, 64, 64, 3)
    assert np.array_equal(*images)


def test_calls_at_the_same_time_have_what_they_change_each_as_the_readme_says(base, autoencoder):
    upgraded = upgrade(base, autoencoder)

    def serve(seed: int) -> np.ndarray:
        copy = serving_copy(upgraded)
        settings = {"num_inference_steps": 3 + seed, "max_sequence_length": 8, "output_type": "np"}
        return copy("a", generator=torch.Generator().manual_seed(seed), **settings).images

    alone = [serve(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert all(map(np.array_equal, threads.map(serve, range(3)), alone))
