"""Configs that do not fit their weights, and weights that are not finite: refused before they do harm."""

import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_pipelines
from davae.errors import CheckpointError, DavaeError
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sizes import is_finite

BOMBS = [
    ("transformer/config.json", "num_layers", 10**9),
    ("transformer/config.json", "num_layers", 10**6),
    ("transformer/config.json", "num_attention_heads", 10**7),
    ("transformer/config.json", "pos_embed_max_size", 10**6),
    ("transformer/config.json", "joint_attention_dim", 10**12),
    ("transformer/config.json", "num_layers", 1),
    ("transformer/config.json", "caption_projection_dim", "wide"),
    ("vae/config.json", "block_out_channels", [10**6, 10**6]),
    ("vae/config.json", "layers_per_block", 10**6),
    ("vae/config.json", "norm_num_groups", 0),
    ("text_encoder/config.json", "num_hidden_layers", 10**9),
    ("text_encoder/config.json", "max_position_embeddings", 10**7),
    ("text_encoder_3/config.json", "vocab_size", 10**7),
    ("text_encoder_3/config.json", "num_layers", 10**6),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
    ("tokenizer_3/tokenizer_config.json", "extra_ids", 10**9),
]


def edit(path: Path, key: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    tiny_pipelines.PIPELINES["sd3"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "key", "value"), BOMBS)
def test_a_config_that_its_weights_do_not_fit_is_refused_before_memory_is_taken(
    saved: Path, name: str, key: str, value: Any
) -> None:
    path = saved / name
    before = path.read_text()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit(path, key, value)
    try:
        with pytest.raises(CheckpointError):
            load_pipeline(saved)
    finally:
        path.write_text(before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000, "KiB"


def test_a_mutated_config_loads_or_is_a_typed_refusal(saved: Path) -> None:
    chance, refused = random.Random(0), 0
    paths = sorted(path for path in saved.rglob("*.json") if "config" in path.name or "index" in path.name)
    for _ in range(16):
        path = chance.choice(paths)
        before = path.read_text()
        key = chance.choice(sorted(json.loads(before)))
        edit(path, key, chance.choice([None, -1, 0, 3, 1e300, "x", [], [1, "x"], {}, {"a": []}, True, 10**12]))
        try:
            load_pipeline(saved)
        except DavaeError:
            refused += 1
        finally:
            path.write_text(before)
    assert 3 < refused < 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_3"])
def test_weights_that_are_not_finite_are_refused_by_name(saved: Path, part: str, value: float) -> None:
    (path,) = (saved / part).glob("*.safetensors")
    before = path.read_bytes()
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].flatten()[-1] = value
    save_file(tensors, path, {"format": "pt"})
    try:
        with pytest.raises(CheckpointError, match=f"the {part} of .* has numbers that are not finite in {name}"):
            load_pipeline(saved)
        if part == "vae":
            with pytest.raises(CheckpointError, match=f"not finite in {name}"):
                load_base_vae(str(saved))
    finally:
        path.write_bytes(before)


def test_an_autoencoder_and_an_adapter_that_are_not_finite_are_refused(autoencoder, trained, tmp_path: Path) -> None:
    with torch.no_grad():
        autoencoder.detail_std[0] = torch.inf
    autoencoder.save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"the AutoencoderDA of .* not finite in detail_std"):
        load_autoencoder(tmp_path / "own")

    folder, _ = trained
    path = folder / "adapter" / "transformer_ports.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"transformer_ports\.safetensors has numbers that are not finite"):
        load_pipeline(folder / "base", adapter=folder / "adapter")


def test_finite_numbers_of_every_kind() -> None:
    assert is_finite(torch.full((3,), 3e38))
    assert is_finite(torch.full((4,), 60_000.0, dtype=torch.float16)), "their sum is not"
    assert is_finite(torch.zeros(2).to(torch.float8_e4m3fn))
    assert is_finite(torch.zeros(0))
    assert not is_finite(torch.tensor([0.0, torch.nan, 1.0], dtype=torch.bfloat16))
