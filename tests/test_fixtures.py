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
from davae.pipelines.adapter_index import FORMAT_VERSION
from davae.pipelines.autoencoders import load_autoencoder

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
settings = {"prompt_embeds": torch.ones(1, 2, 8), "pooled_prompt_embeds": torch.ones(1, 8), "guidance_scale": 1.0}
image = pipeline(**settings, num_inference_steps=2, output_type="pt", generator=random).images
torch.save(image, sys.argv[2])
"""


def make_image(pipeline: DiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"prompt_embeds": torch.ones(1, 2, 8), "pooled_prompt_embeds": torch.ones(1, 8), "guidance_scale": 1.0}
    random = torch.Generator().manual_seed(0)
    return pipeline(**settings, num_inference_steps=2, output_type="pt", generator=random).images


def check_image(image: Tensor) -> None:
    assert image.shape == (1, 3, 16, 16)  # the base makes 8 px
    assert image.isfinite().all()
    assert image.std() > 0.01


def describe_layout(folder: Path) -> dict[str, object]:
    """Of every file: names, shapes and dtypes of its tensors, or the keys of davae's own JSON; else nothing.

    A key for null is none: a setting that a later version has means by null what its absence meant.
    """
    layouts: dict[str, object] = {}

    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        layouts[name] = None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                layouts[name] = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        elif path.name == "adapter.json" or "autoencoders" in path.parts or name.endswith("vae/config.json"):
            layouts[name] = sorted(key for key, value in json.loads(path.read_text()).items() if value is not None)
        elif path.name == "model_index.json":
            layouts[name] = json.loads(path.read_text())["vae"]

    return layouts


def test_what_is_written_today_is_laid_out_as_the_fixtures_are(tmp_path: Path) -> None:
    """A difference is a new format: a fixture beside the old one, and an entry under Formats in the changelog."""
    spec = spec_from_file_location("make_fixtures", FIXTURES / "make.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(tmp_path / "made")
    assert describe_layout(tmp_path / "made") == describe_layout(KEPT)


def test_an_upgraded_pipeline() -> None:
    stock = DiffusionPipeline.from_pretrained(KEPT / "upgraded", **NO_TEXTS)
    assert type(stock.vae) is AutoencoderDA
    check_image(make_image(stock))
    assert torch.equal(make_image(load_pipeline(KEPT / "upgraded")), make_image(stock))


def test_a_portable_folder_in_a_process_without_davae(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", RUN, str(KEPT / "portable"), str(tmp_path / "image.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image = torch.load(tmp_path / "image.pt", weights_only=True)
    check_image(image)
    torch.testing.assert_close(image, make_image(load_pipeline(KEPT / "portable")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["adapter_lora", "adapter_layers"])
def test_an_adapter(form: str) -> None:
    base = load_pipeline(KEPT / "base")
    pipeline = load_pipeline(KEPT / "base", adapter=KEPT / form)
    check_image(make_image(pipeline))

    kept = {}
    for name in ("ports", "layers"):
        if (path := KEPT / form / f"transformer_{name}.safetensors").is_file():
            kept |= load_file(path)
    tensors, before = pipeline.transformer.state_dict(), base.transformer.state_dict()

    assert all(torch.equal(tensors[name], tensor.float()) for name, tensor in kept.items())
    changed = {name for name in tensors if not torch.equal(tensors[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"proj", "proj_out", "to_q", "to_v"}

    apart = load_pipeline(KEPT / "base", adapter=KEPT / form, fuse=False)
    torch.testing.assert_close(make_image(apart), make_image(pipeline), atol=1e-4, rtol=1e-4)


def test_a_fused_transformer_is_a_stock_one() -> None:
    fused = SD3Transformer2DModel.from_pretrained(KEPT / "fused_transformer")
    pipeline = load_pipeline(KEPT / "base", adapter=KEPT / "adapter_lora")
    for name, tensor in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)  # it was saved in float16
    pipeline.transformer = fused
    check_image(make_image(pipeline))


def test_an_attention_lora_is_loaded_by_the_stock_pipeline() -> None:
    apart = load_pipeline(KEPT / "base", adapter=KEPT / "adapter_lora", fuse=False)
    expected = make_image(apart)
    apart.unload_lora_weights()
    assert not torch.equal(make_image(apart), expected)
    apart.load_lora_weights(KEPT / "attention_lora", weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(make_image(apart), expected)


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
    random = torch.Generator().manual_seed(0)
    images = pipeline([0, 2], num_inference_steps=2, output_type="pt", generator=random).images
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()


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
