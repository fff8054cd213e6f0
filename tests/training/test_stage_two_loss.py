"""Stage 2's options: ports alone, the latents objective, the cosine term, noise on detail latents, accumulation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from davae.data.order import batch_indices
from davae.data.sources import PictureSet, open_pictures
from davae.errors import SettingsError
from davae.method.flow import detail_weight
from davae.pipelines.adapter import digest_base
from davae.pipelines.adapter_index import read_index
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.seeds import generator, randn, sample_generators
from davae.training.stage_two_inputs import cache_latents, expect_noise
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from davae.training.stage_two_transformer import choose_parameters

CHANNELS = 4
"""Of the base."""


@pytest.fixture(scope="module")
def recipe(base_folder: Path, autoencoder_folder: Path, picture_folder: Path) -> FinetuneRecipe:
    return FinetuneRecipe(
        base=str(base_folder),
        autoencoder=str(autoencoder_folder),
        pictures=str(picture_folder),
        size=64,
        lora_rank=2,
        steps=4,
        batch_size=3,
        learning_rate=1e-2,
        warmup_steps=0,
        detail_warmup_steps=8,
        prompt_tokens=8,
        ema_decay=0.8,
        precision="float32",
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def train_pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64, split="train")


def test_min_snr_without_the_latents_objective_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r'min_snr = 5\.0 weights the error of objective = "data"'):
        FinetuneRecipe(min_snr=5.0)
    path = tmp_path / "recipe.toml"
    path.write_text('objective = "velocity"\nmin_snr = 5.0\n')
    with pytest.raises(SettingsError, match=r'min_snr = 5\.0 weights the error of objective = "data"'):
        load_recipe(FinetuneRecipe, path)
    path.write_text('objective = "data"\nmin_snr = 5.0\ntrained = "ports"\n')
    assert load_recipe(FinetuneRecipe, path).min_snr == 5.0


# ------------------------------------------------------------------------------------------------------- ports alone


@pytest.fixture(scope="module")
def ports(recipe: FinetuneRecipe, tmp_path_factory) -> tuple[Path, FinetuneRecipe]:
    folder, chosen = tmp_path_factory.mktemp("ports"), recipe.model_copy(update={"trained": "ports"})
    finetune(chosen, folder)
    return folder, chosen


def test_with_ports_alone_nothing_else_changes(ports) -> None:
    folder, recipe = ports
    start = upgrade(load_pipeline(recipe.base), load_autoencoder(Path(recipe.autoencoder))).transformer
    end = load_pipeline(folder / "pipeline").transformer.state_dict()
    names = {f"{port}.{kind}" for port in ("pos_embed.proj", "proj_out") for kind in ("weight", "bias")}
    assert {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, end[name])} == names
    saved = load_file(folder / "checkpoints" / "step-00000004" / "ema.safetensors")
    assert saved.keys() == {f"transformer.{name}" for name in names}
    index = read_index(folder / "adapter")
    assert (index.lora, index.layers, index.base_sha256) == (None, (), digest_base(start))
    adapted = load_pipeline(recipe.base, adapter=folder / "adapter").transformer.state_dict()
    assert all(torch.equal(adapted[name], tensor) for name, tensor in end.items())


def test_ports_go_on_from_an_adapter_and_its_layers_become_the_bases(recipe, ports, tmp_path, caplog) -> None:
    folder, chosen = ports
    finetune(recipe.model_copy(update={"trained": "layers", "lora_targets": ("to_v",)}), tmp_path / "layers")
    for name, said in ((tmp_path / "layers", True), (folder, False)):
        caplog.clear()
        out = tmp_path / f"from-{name.name}"
        finetune(chosen.model_copy(update={"adapter": str(name / "adapter"), "steps": 0}), out)
        assert ("base's again" in caplog.text) == said

        before, after = (load_pipeline(path / "pipeline").transformer.state_dict() for path in (name, out))
        assert torch.equal(after["proj_out.weight"], before["proj_out.weight"])
        base = load_pipeline(recipe.base).transformer.state_dict()
        value = "transformer_blocks.0.attn.to_v.weight"
        assert torch.equal(after[value], base[value])
        assert torch.equal(before[value], base[value]) != said


# ------------------------------------------------------------------------------------------------- noise on latents


def test_noise_is_on_the_detail_latents_alone_and_their_variance_is_one(
    autoencoder_folder, train_pictures, tmp_path
) -> None:
    plain, noisy = load_autoencoder(autoencoder_folder), load_autoencoder(autoencoder_folder)
    folder = tmp_path / "cache"
    without = cache_latents(plain, train_pictures, folder)(range(12), 0)
    expect_noise(noisy, 0.5)
    latents = cache_latents(noisy, train_pictures, folder, detail_noise=0.5, seed=3)(range(12), 0)
    std = plain.detail_std.double().numpy()
    np.testing.assert_allclose(noisy.detail_std.numpy(), np.sqrt(std**2 + 0.25), rtol=1e-6)
    assert torch.equal(latents[:, :CHANNELS], without[:, :CHANNELS])

    wide = std[:, None, None]
    expected = [
        (detail.double().numpy() * wide + 0.5 * torch.randn(8, 8, 8, generator=random).numpy())
        / np.sqrt(wide**2 + 0.25)
        for index, detail in enumerate(without[:, CHANNELS:])
        for random in [generator(3, "noise on detail latents", index)]
    ]
    np.testing.assert_allclose(latents[:, CHANNELS:].numpy(), expected, atol=1e-5)
    assert latents[:, CHANNELS:].var((0, 2, 3)).numpy() == pytest.approx(1, abs=0.15)
    assert latents[:, CHANNELS:].var().item() == pytest.approx(1, abs=0.05)

    again = cache_latents(noisy, train_pictures, folder, detail_noise=0.5, seed=3)
    assert torch.equal(again([7, 2], 5), latents[[7, 2]]), "a picture's own, at every step"
    for other in ({"detail_noise": 0.5, "seed": 4}, {"detail_noise": 0.25, "seed": 3}, {}):
        assert not torch.allclose(cache_latents(noisy, train_pictures, folder, **other)(range(12), 0), latents)


@pytest.fixture(scope="module")
def optioned(recipe: FinetuneRecipe, tmp_path_factory) -> Path:
    """A run with every option at once."""
    losses = {"objective": "data", "min_snr": 5.0, "cosine_weight": 0.5, "detail_noise": 0.5}
    folder, update = tmp_path_factory.mktemp("options"), {"ema_warmup": True, "gradient_accumulation": 2, "steps": 11}
    finetune(recipe.model_copy(update={**losses, **update}), folder)
    return folder


def test_losses_are_logged_apart_and_add_up(optioned: Path) -> None:
    lines = read_metrics(optioned / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 10]
    for line in lines:
        weight = line["detail_weight"]
        assert weight == detail_weight(line["step"], 8)
        scheduled = (4 * line["base_loss"] + 8 * weight * line["detail_loss"]) / (4 + 8 * weight)
        assert line["loss"] == pytest.approx(scheduled + 0.5 * line["cosine_loss"], rel=1e-5)
        assert 0 < line["cosine_loss"] < 2
    result = json.loads((optioned / "result.json").read_text())
    assert set(result["values"]) == {"loss", "base_loss", "detail_loss", "cosine_loss"}


def test_a_pipeline_trained_on_noisy_latents_decodes_their_units(recipe: FinetuneRecipe, optioned: Path) -> None:
    before = load_autoencoder(Path(recipe.autoencoder))
    for folder in ("pipeline/vae", "adapter"):
        after = load_autoencoder(optioned / folder, base=load_base_vae(recipe.base))
        assert torch.allclose(after.detail_std, (before.detail_std.square() + 0.25).sqrt())

    base, detail = torch.randn(1, 12, 8, 8, generator=generator(0, "test")).split([4, 8], dim=1)
    detail = before.to_units(detail)
    ratio = (after.detail_std / before.detail_std)[:, None, None]
    with torch.no_grad():
        pictures = [
            autoencoder.decode(torch.cat([base, autoencoder.from_units(units)], dim=1)).sample
            for autoencoder, units in ((after, detail), (before, detail * ratio))
        ]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- accumulation


def first_line(recipe: FinetuneRecipe, folder: Path, **changes: object) -> dict:
    finetune(recipe.model_copy(update={"steps": 1, "detail_warmup_steps": 0, **changes}), folder)
    return read_metrics(folder / "metrics.jsonl")[0]


def test_a_step_of_four_batches_sees_every_picture_once_with_noise_of_its_own(
    recipe: FinetuneRecipe, train_pictures, autoencoder_folder, tmp_path
) -> None:
    """12 pictures in batches of 3: the loss is that of the widened base at warm start, computed here batch by batch."""
    chosen = recipe.model_copy(update={"trained": "ports", "caption_dropout": 1.0, "gradient_accumulation": 4})
    line = first_line(chosen, tmp_path / "four")
    at_once = first_line(chosen, tmp_path / "one", batch_size=12, gradient_accumulation=1)
    assert at_once["loss"] == pytest.approx(line["loss"], rel=1e-6)
    indices = [batch_indices(12, 3, seed=0, step=batch) for batch in range(4)]
    assert sorted(index for batch in indices for index in batch) == list(range(12))

    clean = cache_latents(load_autoencoder(autoencoder_folder), train_pictures, tmp_path / "cache")(range(12), 0)
    detail_errors = []
    for batch, chosen_ones in enumerate(indices):
        noise = randn((3, 12, 8, 8), sample_generators(0, "flow", range(3 * batch, 3 * batch + 3)))
        # A warm start predicts no detail velocity, so the error is the target itself.
        detail_errors.append(((noise - clean[chosen_ones])[:, CHANNELS:] ** 2).double().mean().item())
    assert len(set(detail_errors)) == 4
    assert line["detail_loss"] == pytest.approx(np.mean(detail_errors), rel=1e-5)
    assert line["loss"] == pytest.approx((4 * line["base_loss"] + 8 * line["detail_loss"]) / 12, rel=1e-5)


def test_a_backbone_without_default_targets_wants_some_named(recipe: FinetuneRecipe) -> None:
    transformer = load_pipeline(recipe.base).transformer
    for trained in ("lora", "layers"):
        with pytest.raises(SettingsError, match="no default targets for a SD3Transformer2DModel"):
            choose_parameters(transformer, recipe.model_copy(update={"trained": trained}), (), "")
