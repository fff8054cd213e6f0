"""Stage 2 trained further from an adapter."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from davae.errors import CheckpointError, SettingsError
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.run.record import read_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune, load_upgraded_base

Run = tuple[Path, FinetuneRecipe]


def test_training_goes_on_from_an_adapter(lora: Run, tmp_path) -> None:
    folder, recipe = lora
    update = {"adapter": str(folder / "adapter"), "detail_warmup_steps": 0}
    finetune(recipe.model_copy(update={**update, "steps": 0}), tmp_path / "same")
    for name in ("transformer_lora.safetensors", "transformer_ports.safetensors"):
        before, after = (load_file(path / "adapter" / name) for path in (folder, tmp_path / "same"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

    finetune(recipe.model_copy(update={**update, "steps": 2}), tmp_path / "on")
    fresh, gone_on = (
        next(line["detail_loss"] for line in read_metrics(path / "metrics.jsonl") if line["step"] == 0)
        for path in (folder, tmp_path / "on")
    )
    assert gone_on < fresh  # the same pictures, noise and timesteps
    ports = load_file(tmp_path / "on" / "adapter" / "transformer_ports.safetensors")
    assert not any(torch.equal(ports[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("made", ["lora", "layers"])
@pytest.mark.parametrize("trained", ["layers", "full"])
def test_the_layers_themselves_go_on_from_an_adapter(request, tmp_path, made, trained, caplog) -> None:
    folder, recipe = request.getfixturevalue(made)
    update = {"adapter": str(folder / "adapter"), "detail_warmup_steps": 0, "trained": trained}
    caplog.clear()
    finetune(recipe.model_copy(update={**update, "steps": 0}), tmp_path / "same")
    before, after = (load_pipeline(path / "pipeline").transformer.state_dict() for path in (folder, tmp_path / "same"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    assert "base's again" not in caplog.text

    finetune(recipe.model_copy(update={**update, "steps": 2}), tmp_path / "on")
    after = load_pipeline(tmp_path / "on" / "pipeline").transformer.state_dict()
    layer = "transformer_blocks.0.attn.to_q"
    assert (after[f"{layer}.weight"] - before[f"{layer}.weight"]).abs().max() > 1e-4
    assert torch.equal(after[f"{layer}.bias"], before[f"{layer}.bias"]) == (trained == "layers")


@pytest.mark.parametrize("made", ["lora", "layers"])
def test_layers_that_are_trained_no_longer_become_the_bases_again(request, tmp_path, made, caplog) -> None:
    folder, recipe = request.getfixturevalue(made)
    update = {"adapter": str(folder / "adapter"), "trained": "layers", "lora_targets": ("to_v",), "steps": 0}
    finetune(recipe.model_copy(update=update), tmp_path)
    base = load_pipeline(recipe.base).transformer.state_dict()
    before, after = (load_pipeline(path / "pipeline").transformer.state_dict() for path in (folder, tmp_path))
    adapted = load_pipeline(recipe.base, adapter=tmp_path / "adapter").transformer.state_dict()

    for block in (0, 1):
        query, value = (f"transformer_blocks.{block}.attn.{name}.weight" for name in ("to_q", "to_v"))
        assert torch.equal(after[query], base[query])
        assert not torch.equal(after[query], before[query])
        torch.testing.assert_close(after[value], before[value], atol=1e-6, rtol=0)
        assert query.removesuffix(".weight") in caplog.text
    assert all(torch.equal(adapted[name], tensor) for name, tensor in after.items())


def test_an_adapter_of_other_latents_goes_on_with_a_warning(lora: Run, tmp_path, caplog) -> None:
    folder, recipe = lora
    recipe = recipe.model_copy(update={"adapter": str(folder / "adapter")})
    load_upgraded_base(recipe)
    assert not caplog.text
    other = load_autoencoder(Path(recipe.autoencoder))
    with torch.no_grad():
        other.detail_downsample.conv.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    load_upgraded_base(recipe.model_copy(update={"autoencoder": str(tmp_path / "other")}))
    assert "which differs in weights of the encoders" in caplog.text


def test_lora_does_not_go_on_from_trained_layers(layers: Run, tmp_path) -> None:
    folder, recipe = layers
    update = {"adapter": str(folder / "adapter"), "trained": "lora"}
    with pytest.raises(SettingsError, match='allowed is trained="layers", "full" or "ports"'):
        finetune(recipe.model_copy(update=update), tmp_path / "run")


def test_an_adapter_of_another_rank_is_refused(lora: Run, tmp_path) -> None:
    folder, recipe = lora
    with pytest.raises(CheckpointError, match="does not fit"):
        finetune(recipe.model_copy(update={"adapter": str(folder / "adapter"), "lora_rank": 3}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"alpha 4\.0, and 2\.0 was asked for"):
        finetune(recipe.model_copy(update={"adapter": str(folder / "adapter"), "lora_alpha": 2.0}), tmp_path / "run")


def test_an_adapter_of_another_base_is_refused(lora: Run, tmp_path) -> None:
    folder, recipe = lora
    other = load_pipeline(recipe.base)
    with torch.no_grad():
        next(other.transformer.transformer_blocks[0].parameters()).add_(0.1)
    other.save_pretrained(tmp_path / "other")
    update = {"adapter": str(folder / "adapter"), "base": str(tmp_path / "other")}
    with pytest.raises(CheckpointError, match="trained on another base"):
        finetune(recipe.model_copy(update=update), tmp_path / "run")
