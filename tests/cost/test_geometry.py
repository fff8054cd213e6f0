"""Pipelines of a given size with random weights, from configs alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_pipelines
from davae import assets
from davae.cost.geometry import GEOMETRIES, build, read_geometry
from davae.errors import SettingsError
from tiny import tiny_class_pipeline, tiny_sd3_pipeline

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The following part of your input was truncated")


def configs(pipeline, folder: Path) -> Path:
    """The folder of a pipeline without its weights and tokenizers."""
    pipeline.save_pretrained(folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in {"model_index.json", "config.json", "scheduler_config.json"}:
            path.unlink()
    return folder


@pytest.mark.parametrize("make", [tiny_sd3_pipeline, tiny_class_pipeline])
def test_it_is_the_pipeline_that_the_configs_describe_and_it_runs(make, tmp_path: Path) -> None:
    given = make()
    folder = configs(given, tmp_path)
    made = build(str(folder), layers=None, text=True, dtype=torch.float32, device=CPU)
    assert type(made) is type(given)

    for name, component in given.components.items():
        assert type(made.components[name]) is type(component)
        if isinstance(component, nn.Module):
            shapes = {key: tensor.shape for key, tensor in component.state_dict().items()}
            assert {key: tensor.shape for key, tensor in made.components[name].state_dict().items()} == shapes
            assert all(parameter.any() for parameter in made.components[name].parameters()), "zeros are fast"

    prompts = ["red apple"] if make is tiny_sd3_pipeline else [3]
    assert made(prompts, num_inference_steps=1).images[0].size == (32, 32)


def test_weights_are_of_the_dtype_and_layers_are_cut_everywhere(tmp_path: Path) -> None:
    folder = configs(tiny_sd3_pipeline(), tmp_path)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "dual_attention_layers": [0, 1]}))
    made = build(str(folder), layers=1, text=True, dtype=torch.bfloat16, device=CPU)
    modules = [part for part in made.components.values() if isinstance(part, nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}
    assert len(made.transformer.transformer_blocks) == 1
    assert made.transformer.config.dual_attention_layers == [0]
    assert made.text_encoder.config.num_hidden_layers == made.text_encoder_3.config.num_layers == 1
    assert len(made.vae.encoder.down_blocks) == 3


def test_text_encoders_that_are_not_timed_are_not_built(tmp_path: Path) -> None:
    made = build(str(configs(tiny_sd3_pipeline(), tmp_path)), layers=None, text=False, dtype=torch.float32, device=CPU)
    assert [name for name, part in made.components.items() if name.startswith(("text", "token")) and part] == []


def test_building_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    folder = configs(tiny_class_pipeline(), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(str(folder), layers=None, text=False, dtype=torch.float32, device=CPU)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "parameters", "ports"),
    [("flux", 11_901_408_320, (64, 64)), ("sana", 1_604_462_752, (32, 32))],
)
def test_the_named_geometry_has_the_published_counts(name: str, parameters: int, ports: tuple[int, int]) -> None:
    transformer = read_geometry(GEOMETRIES[name], Path("nowhere/recipe.toml")).transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
    assert (transformer.config.in_channels, transformer.proj_out.weight.shape[0]) == ports


@pytest.mark.parametrize("kind", ["num_layers", "num_single_layers"])
def test_blocks_of_each_kind_are_cut(tmp_path: Path, kind: str) -> None:
    folder = configs(tiny_pipelines.flux(), tmp_path)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, kind: 3}))
    made = build(str(folder), layers=1, text=False, dtype=torch.float32, device=CPU).transformer
    assert (len(made.transformer_blocks), len(made.single_transformer_blocks)) == (1, 1)


def test_what_is_refused(tmp_path: Path) -> None:
    settings = {"text": True, "dtype": torch.float32, "device": CPU}
    with pytest.raises(
        SettingsError, match=r"geometry 'sd99': allowed are sd35m, flux, sana, lightningdit-xl, or a folder"
    ):
        build("sd99", layers=None, **settings)
    folder = configs(tiny_class_pipeline(), tmp_path / "tiny")
    with pytest.raises(SettingsError, match=r"layers=3: tiny's transformer has 1 to 2"):
        build(str(folder), layers=3, **settings)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_named_geometry_is_shipped(name: str) -> None:
    found = read_geometry(GEOMETRIES[name], Path("nowhere/recipe.toml"))
    assert found.source == str(assets.geometry() / GEOMETRIES[name])
