"""Folders that ask for code, or for weights that are pickled or lie elsewhere: refused, and none of it runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from davae.cost.geometry import build
from davae.errors import CheckpointError
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.base_lora import load_base_lora
from davae.pipelines.loading import load_pipeline

CANARY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass X: pass\nAutoencoderKL = X\n"


def edit(path: Path, **changes: Any) -> None:
    """Change some entries of a JSON file."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def edit_index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **changes)


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def shards(name: str) -> Callable[[Path], None]:
    index = {"weight_map": {"encoder.conv_in.weight": name}}
    return put("vae/diffusion_pytorch_model.safetensors.index.json", json.dumps(index))


@pytest.mark.parametrize(
    "attack",
    [
        edit_index(vae=["evil", "X"]),
        edit_index(vae=["os", "system"]),
        edit_index(vae=["diffusers.utils", "X"]),
        edit_index(vae=["transformers", "pipeline"]),
        edit_index(text_encoder=["transformers", "AutoModel"]),
        edit_index(text_encoder=["diffusers", "OnnxRuntimeModel"]),
        edit_index(vae={"evil": 1, "X": 2}),
        edit_index(vae="ab"),
        edit_index(vae=["diffusers"]),
        edit_index(**{"../evil": ["diffusers", "AutoencoderKL"]}),
        edit_index(_class_name=["evil", "X"]),
        edit_index(_class_name="KandinskyCombinedPipeline"),
        edit_index(_class_name="AutoencoderKL"),
        put("vae/diffusers.py", CANARY),  # older versions of diffusers prefer it to the library
        put("text_encoder/transformers.py", CANARY),
        put("text_encoder/adapter_config.json", json.dumps({"base_model_name_or_path": "someone/else"})),
        shards("x.bin"),
        shards("../../x.safetensors"),
        shards("/etc/x.safetensors"),
        shards("text_encoder/model.safetensors"),
        lambda folder: edit(folder / "text_encoder" / "config.json", attn_implementation="someone/kernel"),
    ],
)
def test_a_folder_that_asks_for_code_or_for_other_weights_is_refused(
    base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Callable[[Path], None]
) -> None:
    folder = tmp_path / "base"
    base.save_pretrained(folder)
    for place in (folder, folder / "vae"):
        (place / "evil.py").write_text(CANARY)
    monkeypatch.syspath_prepend(folder)
    attack(folder)

    with pytest.raises(CheckpointError):
        load_pipeline(folder)
    assert not list(folder.rglob("ran"))


def test_the_bases_autoencoder_alone_and_a_geometry_are_behind_the_same_door(base, autoencoder, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    shards("x.bin")(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"names 'x\.bin'; allowed are \.safetensors files beside it"):
        load_base_vae(str(tmp_path / "base"))

    autoencoder.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "davae.py").write_text(CANARY)
    with pytest.raises(CheckpointError, match="is code beside weights, which is never run"):
        load_autoencoder(tmp_path / "own")

    edit(tmp_path / "base" / "model_index.json", scheduler=["evil", "X"])
    with pytest.raises(CheckpointError, match=r"the scheduler of .* would be loaded as 'evil', 'X': allowed are"):
        build(str(tmp_path / "base"), layers=None, text=False, dtype=torch.float32, device=torch.device("cpu"))


def test_a_pickled_lora_is_never_read(base, tmp_path: Path) -> None:
    torch.save({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_lora_weights\.bin is no \.safetensors file"):
        load_base_lora(base, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load_base_lora(base, tmp_path, weight_name="pytorch_lora_weights.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded as a LoRA"):
        load_base_lora(base, tmp_path)
