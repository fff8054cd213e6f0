"""Saved results of every form, made by an earlier version and kept in tests/fixtures: each still loads and runs."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from davae import AutoencoderDA, load_pipeline
from davae.errors import CheckpointError
from davae.pipelines.adapter import FORMAT_VERSION
from davae.pipelines.loading import load_autoencoder

FIXTURES = Path(__file__).parent / "fixtures"
KEPT = FIXTURES / "0.1.0"
NO_TEXTS = {f"{part}{end}": None for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")}

RUN = """
import sys, torch
from diffusers import DiffusionPipeline
sys.modules["davae"] = None  # as if it were not installed
texts = {f"{part}{end}": None for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")}
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, **texts)
random = torch.Generator().manual_seed(0)
told = {"prompt_embeds": torch.ones(1, 2, 8), "pooled_prompt_embeds": torch.ones(1, 8), "guidance_scale": 1.0}
picture = pipeline(**told, num_inference_steps=2, output_type="pt", generator=random).images
torch.save(picture, sys.argv[2])
"""


def picture(pipeline: DiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    told = {"prompt_embeds": torch.ones(1, 2, 8), "pooled_prompt_embeds": torch.ones(1, 8), "guidance_scale": 1.0}
    random = torch.Generator().manual_seed(0)
    return pipeline(**told, num_inference_steps=2, output_type="pt", generator=random).images


def check_picture(made: Tensor) -> None:
    assert made.shape == (1, 3, 16, 16)  # the base's are 8 px
    assert made.isfinite().all()
    assert made.std() > 0.01


def layout(folder: Path) -> dict[str, object]:
    """Of every file: names, shapes and dtypes of its tensors, or the keys of davae's own JSON; else nothing.

    A key for null is none: a setting that a later version has means by null what its absence meant.
    """
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        found[name] = None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                found[name] = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        elif path.name == "adapter.json" or "autoencoders" in path.parts or name.endswith("vae/config.json"):
            found[name] = sorted(key for key, value in json.loads(path.read_text()).items() if value is not None)
        elif path.name == "model_index.json":
            found[name] = json.loads(path.read_text())["vae"]
    return found


def test_what_is_written_today_is_laid_out_as_the_fixtures_are(tmp_path: Path) -> None:
    """A difference is a new format: a fixture beside the old one, and an entry under Formats in the changelog."""
    spec = spec_from_file_location("make_fixtures", FIXTURES / "make.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(tmp_path / "made")
    assert layout(tmp_path / "made") == layout(KEPT)


def test_an_upgraded_pipeline() -> None:
    stock = DiffusionPipeline.from_pretrained(KEPT / "upgraded", **NO_TEXTS)
    assert type(stock.vae) is AutoencoderDA
    check_picture(picture(stock))
    assert torch.equal(picture(load_pipeline(KEPT / "upgraded")), picture(stock))


def test_a_portable_folder_in_a_process_without_davae(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", RUN, str(KEPT / "portable"), str(tmp_path / "picture.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = torch.load(tmp_path / "picture.pt", weights_only=True)
    check_picture(made)
    torch.testing.assert_close(made, picture(load_pipeline(KEPT / "portable")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["adapter_lora", "adapter_layers"])
def test_an_adapter(form: str) -> None:
    base = load_pipeline(KEPT / "base")
    pipeline = load_pipeline(KEPT / "base", adapter=KEPT / form)
    check_picture(picture(pipeline))
    kept = {}
    for name in ("ports", "layers"):
        if (path := KEPT / form / f"transformer_{name}.safetensors").is_file():
            kept |= load_file(path)
    tensors, before = pipeline.transformer.state_dict(), base.transformer.state_dict()
    assert all(torch.equal(tensors[name], tensor.float()) for name, tensor in kept.items())
    changed = {name for name in tensors if not torch.equal(tensors[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"proj", "proj_out", "to_q", "to_v"}
    apart = load_pipeline(KEPT / "base", adapter=KEPT / form, fuse=False)
    torch.testing.assert_close(picture(apart), picture(pipeline), atol=1e-4, rtol=1e-4)


def test_a_fused_transformer_is_a_stock_one() -> None:
    fused = SD3Transformer2DModel.from_pretrained(KEPT / "fused_transformer")
    pipeline = load_pipeline(KEPT / "base", adapter=KEPT / "adapter_lora")
    for name, tensor in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)  # it was saved in float16
    pipeline.transformer = fused
    check_picture(picture(pipeline))


def test_an_attention_lora_is_loaded_by_the_stock_pipeline() -> None:
    apart = load_pipeline(KEPT / "base", adapter=KEPT / "adapter_lora", fuse=False)
    expected = picture(apart)
    apart.unload_lora_weights()
    assert not torch.equal(picture(apart), expected)
    apart.load_lora_weights(KEPT / "attention_lora", weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(picture(apart), expected)


@pytest.mark.parametrize("name", sorted(path.name for path in (KEPT / "autoencoders").iterdir()))
def test_an_autoencoder_of_each_base(name: str) -> None:
    folder = KEPT / "autoencoders" / name
    autoencoder = load_autoencoder(folder)
    kept = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors = autoencoder.state_dict()
    assert tensors.keys() == kept.keys()
    assert all(torch.equal(tensors[key], tensor.to(tensors[key].dtype)) for key, tensor in kept.items())
    assert torch.equal(autoencoder.detail_mean, torch.full((4,), 0.25))
    side = 4 * autoencoder.downsample_factor
    image = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    with torch.no_grad():
        latents = autoencoder.encode(image).latent_dist.mode()
        decoded = autoencoder.decode(latents).sample
    assert latents.shape == (1, 8, 4, 4)
    assert decoded.squeeze(2).shape == image.shape
    assert decoded.isfinite().all()


def test_a_class_conditional_pipeline() -> None:
    pipeline = load_pipeline(KEPT / "class_conditional")
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([0, 2], num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert made.shape == (2, 3, 16, 16)
    assert made.isfinite().all()


def test_a_newer_adapter_is_refused(tmp_path: Path) -> None:
    shutil.copytree(KEPT / "adapter_lora", tmp_path / "adapter")
    index = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    newer = {**index, "format_version": FORMAT_VERSION + 1, "something": "new"}
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(newer))
    with pytest.raises(CheckpointError, match=r"has format version 3, davae reads up to 2: update davae"):
        load_pipeline(KEPT / "base", adapter=tmp_path / "adapter")
    del newer["format_version"]
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(newer))
    with pytest.raises(CheckpointError, match=r"damaged: it has no format_version"):
        load_pipeline(KEPT / "base", adapter=tmp_path / "adapter")


def test_a_newer_autoencoder_is_refused_wherever_it_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(KEPT / "upgraded", tmp_path / "newer")
    path = tmp_path / "newer" / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "another_filter": "sharp"}))
    for load in (load_pipeline, lambda folder: load_autoencoder(folder / "vae")):
        with pytest.raises(CheckpointError, match=r"saved by a newer davae: its config has another_filter"):
            load(tmp_path / "newer")
    with pytest.raises(ValueError, match=r"saved by a newer davae"):
        DiffusionPipeline.from_pretrained(tmp_path / "newer", **NO_TEXTS)
