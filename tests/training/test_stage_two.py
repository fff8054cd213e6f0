import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.backbones import backbone_of
from davae.data.order import batch_indices
from davae.data.sources import PictureSet, open_pictures
from davae.errors import CheckpointError, SettingsError
from davae.method.flow import detail_weight, interpolate, sample_timesteps
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter import digest_base
from davae.pipelines.adapter_index import read_index
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade
from davae.run.record import alone, read_metrics
from davae.seeds import generator, rand, randn, sample_generators
from davae.training.stage_two_inputs import cache_latents, encode_captions
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from forks import exit_code, forked
from hashes import digests

STEPS = 61
CHANNELS = 4
"""Of the base."""


@pytest.fixture(scope="module")
def recipe(long_recipe: FinetuneRecipe) -> FinetuneRecipe:
    return long_recipe


Run = tuple[Path, FinetuneRecipe]


@pytest.fixture(params=["lora", "layers", "full"])
def tuned(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def train_pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64, split="train")


@pytest.fixture(scope="module")
def latents(autoencoder_folder: Path, train_pictures: PictureSet, tmp_path_factory) -> Tensor:
    read_latents = cache_latents(load_autoencoder(autoencoder_folder), train_pictures, tmp_path_factory.mktemp("cache"))
    return read_latents(range(len(train_pictures)), 0)


def picture(pipeline: DiffusionPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 12, 8, 8, generator=generator(0, "test"))
    return pipeline(
        "red ball", latents=noise, num_inference_steps=3, max_sequence_length=8, output_type="pt"
    ).images.float()


@torch.no_grad()
def velocity_errors(pipeline: DiffusionPipeline, latents: Tensor, captions: list[str]) -> Tensor:
    """Squared errors of the velocity at fixed noise and four noise levels, all pictures, [pictures, channels, h, w]."""
    backbone = backbone_of(pipeline.transformer)
    condition = encode_captions(pipeline, backbone, captions, 8)
    noise = torch.randn(latents.shape, generator=generator(9, "test"))
    sigma = torch.tensor([0.2, 0.4, 0.6, 0.8]).repeat(3)
    velocity = backbone.velocity(pipeline.transformer, interpolate(latents, noise, sigma), sigma, condition)
    return (velocity - (noise - latents)).square()


# -------------------------------------------------------------------------------------------------------- warm start


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_the_first_loss_is_the_base_pipelines_own(recipe, train_pictures, latents, tmp_path, dropout) -> None:
    chosen = recipe.model_copy(update={"steps": 1, "caption_dropout": dropout, "seed": 3})
    finetune(chosen, tmp_path)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")

    base = load_pipeline(recipe.base)
    random = sample_generators(3, "flow", range(6))
    indices = batch_indices(len(latents), 6, seed=3, step=0)
    noise = randn(latents[indices].shape, random)
    sigma = torch.cat([sample_timesteps(1, shift=3.0, generator=own) for own in random])  # the tiny scheduler's
    kept = rand(random) >= dropout
    captions = [train_pictures.captions[index] if keep else "" for index, keep in zip(indices, kept, strict=True)]
    with torch.no_grad():
        embeds, _, pooled, _ = base.encode_prompt(captions, None, None, max_sequence_length=8)[:4]
        clean, noise = latents[indices][:, :CHANNELS], noise[:, :CHANNELS]
        noisy = interpolate(clean, noise, sigma)
        velocity = base.transformer(noisy, embeds, pooled, 1000 * sigma, return_dict=False)[0]
    assert line["base_loss"] == pytest.approx((velocity - (noise - clean)).square().mean().item(), rel=1e-5)
    assert line["detail_weight"] == 0
    assert line["loss"] == pytest.approx(line["base_loss"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------- a whole run


def test_the_detail_loss_falls_and_its_weight_rises(tuned: Run, latents, train_pictures) -> None:
    folder, recipe = tuned
    start = upgrade(load_pipeline(recipe.base), load_autoencoder(Path(recipe.autoencoder)))
    before = velocity_errors(start, latents, train_pictures.captions)
    after = velocity_errors(load_pipeline(folder / "pipeline"), latents, train_pictures.captions)
    assert after[:, CHANNELS:].mean() < 0.9 * before[:, CHANNELS:].mean()
    assert after[:, :CHANNELS].mean() < before[:, :CHANNELS].mean()

    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40, 50, 60]
    assert [line["detail_weight"] for line in lines] == [detail_weight(step, 20) for step in range(0, 61, 10)]
    assert [line["detail_weight"] for line in lines][:3] == pytest.approx([0, 0.5, 1])
    for line in lines:
        share = 8 * line["detail_weight"]
        total = (4 * line["base_loss"] + share * line["detail_loss"]) / (4 + share)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_the_base_pipelines_folder_is_not_touched(recipe, base_folder: Path, tmp_path: Path) -> None:
    before = digests(base_folder, "*")
    finetune(recipe.model_copy(update={"trained": "full", "steps": 2}), tmp_path)
    assert digests(base_folder, "*") == before


def test_the_same_command_again_returns_the_same_and_trains_nothing(tuned: Run) -> None:
    folder, recipe = tuned
    before = digests(folder)
    watched = [*(folder / "cache").rglob("*"), *(folder / "checkpoints").rglob("*")]
    inodes = [path.stat().st_ino for path in watched]
    finetune(recipe, folder)
    assert digests(folder) == before
    assert [path.stat().st_ino for path in watched] == inodes

    made = {"pipeline"} if recipe.trained == "full" else {"pipeline", "adapter"}
    files = {
        "recipe.toml",
        "environment.json",
        "pictures.json",
        "inputs.json",
        "metrics.jsonl",
        "cache",
        "checkpoints",
        ".lock",
    }
    assert {path.name for path in folder.iterdir()} == made | files | {"result.json"}

    result = json.loads((folder / "result.json").read_text())
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert result["values"] == {name: last[name] for name in ("loss", "base_loss", "detail_loss")}
    assert result["counts"] == {"pictures": 12, "batch_size": 6, "steps": STEPS, "skipped_steps": 0, "spikes": 0}
    assert result["recipe_digest"] == recipe.digest()


def test_another_recipe_in_the_same_folder_is_refused(tuned: Run) -> None:
    folder, recipe = tuned
    before = digests(folder, "*")
    with pytest.raises(CheckpointError, match=r"another.* where learning_rate = 0.01, limit = None\. .*new folder"):
        finetune(recipe.model_copy(update={"learning_rate": 1e-3, "limit": 3}), folder)
    assert digests(folder, "*") == before


@pytest.mark.parametrize("name", ["pipeline", "adapter"])
def test_somebodys_own_folder_is_refused_before_training(recipe: FinetuneRecipe, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SettingsError, match=f"{name} exists and has no "):
        finetune(recipe, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_plain_diffusers_loads_the_result_and_it_is_the_ema(tuned: Run) -> None:
    folder, _ = tuned
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    assert isinstance(pipeline.vae, AutoencoderDA)
    assert picture(pipeline).shape == (1, 3, 64, 64)
    shadows = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "ema.safetensors")
    ports = backbone_of(pipeline.transformer).ports
    saved = pipeline.transformer.state_dict()
    plain = [name for name in shadows if ".lora_" not in name]
    assert {f"transformer.{port}.weight" for port in (ports.input, ports.output)} <= set(plain)
    for name in plain:
        assert torch.equal(saved[name.removeprefix("transformer.")], shadows[name])


def test_each_result_has_a_card_with_its_recipe_and_its_losses(lora: Run) -> None:
    folder, recipe = lora
    loss = json.loads((folder / "result.json").read_text())["values"]["base_loss"]
    for result in ("pipeline", "adapter"):
        card = (folder / result / "README.md").read_text()
        assert re.search(rf"\| base loss +\| +{loss:.4g} +\|", card)
        assert f"lora_rank = {recipe.lora_rank}" in card
        assert "Counts: pictures 12, batch size 6." in card
        assert str(Path(recipe.base).parent) not in card


def test_full_finetuning_moves_every_weight(full: Run) -> None:
    folder, recipe = full
    start = upgrade(load_pipeline(recipe.base), load_autoencoder(Path(recipe.autoencoder))).transformer
    end = dict(load_pipeline(folder / "pipeline").transformer.named_parameters())
    still = {name for name, p in start.named_parameters() if torch.equal(p, end[name])}
    # The last block leaves the text stream, so nothing reads what its text asks for.
    assert all(
        name.startswith(("transformer_blocks.1.attn.add_q_", "transformer_blocks.1.attn.norm_added_q"))
        for name in still
    )
    assert len(still) == 3


def test_with_lora_nothing_but_its_layers_and_the_ports_differs_from_the_base(lora: Run) -> None:
    folder, recipe = lora
    base = load_pipeline(recipe.base).transformer
    end = load_pipeline(folder / "pipeline").transformer.state_dict()
    backbone = backbone_of(base)
    factors = load_file(folder / "adapter" / "transformer_lora.safetensors")
    scale = recipe.lora_alpha / recipe.lora_rank

    changed = set()
    for name, tensor in base.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer in (backbone.ports.input, backbone.ports.output):
            assert tensor.shape != end[name].shape or not torch.equal(tensor, end[name])
        elif not torch.equal(tensor, end[name]):
            product = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
            torch.testing.assert_close(end[name] - scale * product, tensor, atol=1e-6, rtol=0)
            changed.add(layer)

    assert {f"{layer}.lora_{half}.weight" for layer in changed for half in "AB"} == factors.keys()
    assert all(layer.endswith(backbone.lora_targets) for layer in changed)
    # The adapter's digest is of the live transformer after training, without LoRA and ports.
    assert read_index(folder / "adapter").base_sha256 == digest_base(base)


def test_with_lora_a_checkpoint_holds_what_is_trained_and_no_more(lora: Run) -> None:
    folder, _ = lora
    tensors = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "transformer.safetensors")
    parameters = {name for name in tensors if not name.endswith("pos_embed")}  # a buffer
    assert parameters
    assert all(".lora_" in name or name.startswith(("pos_embed.proj.", "proj_out.")) for name in parameters)


def test_only_the_layers_named_and_the_ports_are_trained(layers: Run) -> None:
    folder, recipe = layers
    start = upgrade(load_pipeline(recipe.base), load_autoencoder(Path(recipe.autoencoder))).transformer
    end = load_pipeline(folder / "pipeline").transformer.state_dict()
    changed = {name for name, tensor in start.state_dict().items() if not torch.equal(tensor, end[name])}
    ports = {f"{port}.{kind}" for port in ("pos_embed.proj", "proj_out") for kind in ("weight", "bias")}
    attentions = [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn")]
    targets = {f"{attention}.{name}.weight" for attention in attentions for name in ("to_q", "to_v")}
    assert changed == ports | targets
    saved = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "transformer.safetensors")
    assert saved.keys() == changed | {"pos_embed.pos_embed"}
    assert read_index(folder / "adapter").base_sha256 == digest_base(start)


@pytest.mark.parametrize("made", ["lora", "layers"])
def test_the_pipeline_is_the_base_with_the_adapter(made: str, request) -> None:
    folder, recipe = request.getfixturevalue(made)
    whole = picture(DiffusionPipeline.from_pretrained(folder / "pipeline"))
    base = picture(upgrade(load_pipeline(recipe.base), load_autoencoder(Path(recipe.autoencoder))))
    for fuse in (True, False):
        adapted = picture(load_pipeline(recipe.base, adapter=folder / "adapter", fuse=fuse))
        torch.testing.assert_close(whole, adapted, atol=1e-5, rtol=0)
    assert (whole - base).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize("size", [60, 56, 208])
def test_a_size_that_the_pipeline_cannot_make_is_refused(recipe, tmp_path, size) -> None:
    with pytest.raises(SettingsError, match=rf"size={size}.*multiples of 16"):
        finetune(recipe.model_copy(update={"size": size}), tmp_path)


def test_an_autoencoder_of_another_base_is_refused(recipe, tmp_path, base_folder) -> None:
    vae = load_base_vae(str(base_folder))
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.5)
    AutoencoderDA.from_base(vae, detail_channels=8).save_pretrained(tmp_path / "other")
    with pytest.raises(SettingsError, match="is not this pipeline's"):
        finetune(recipe.model_copy(update={"autoencoder": str(tmp_path / "other")}), tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ cached inputs


def test_cached_latents_are_in_the_transformers_units(latents: Tensor, train_pictures, autoencoder_folder) -> None:
    assert latents.shape == (len(train_pictures), 12, 8, 8)
    autoencoder = load_autoencoder(autoencoder_folder)
    base = autoencoder.encode_base(train_pictures.batch(range(len(train_pictures))))
    torch.testing.assert_close(latents[:, :CHANNELS], base, atol=1e-5, rtol=0)
    detail = latents[:, CHANNELS:]
    torch.testing.assert_close(detail.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(detail.std((0, 2, 3), correction=0), torch.ones(8), atol=1e-4, rtol=0)


def test_captions_are_as_long_as_the_stock_pipeline_makes_them() -> None:
    stock = inspect.signature(StableDiffusion3Pipeline.__call__).parameters["max_sequence_length"].default
    assert FinetuneRecipe().prompt_tokens == stock


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device here")
def test_pictures_and_captions_are_encoded_on_the_training_device(recipe, tmp_path) -> None:
    used = set()

    def note(module: nn.Module, _inputs: object, _output: object) -> None:
        used.update(parameter.device.type for parameter in module.parameters(recurse=False))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        finetune(recipe.model_copy(update={"steps": 1}), tmp_path)
    finally:
        handle.remove()
    assert used == {"cuda"}


def test_captions_are_encoded_in_batches_as_alone(base_folder: Path) -> None:
    pipeline = load_pipeline(base_folder)
    backbone = backbone_of(pipeline.transformer)
    captions = ["", *(f"red {'ball' if index % 2 else 'box'}" for index in range(69))]
    together = encode_captions(pipeline, backbone, captions, 8)
    assert {len(values) for values in together.values()} == {70}
    for index in (0, 1, 69):
        with torch.no_grad():
            alone = backbone.condition(pipeline, [captions[index]], max_sequence_length=8)
        for name, values in together.items():
            torch.testing.assert_close(values[index], alone[name][0], atol=1e-5, rtol=1e-5)
            assert not values.requires_grad


def test_two_runs_in_one_folder_at_once_are_refused(recipe, tmp_path) -> None:
    with alone(tmp_path):
        other = forked(lambda: finetune(recipe.model_copy(update={"steps": 1}), tmp_path))
        assert exit_code(other) == SettingsError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_gradient_checkpointing_computes_again_and_changes_nothing(recipe, trained, tmp_path, monkeypatch) -> None:
    again = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: again.append(1) or original(*a, **k))
    quick = recipe.model_copy(update={"steps": 3, "trained": trained})
    finetune(quick, tmp_path / "kept")
    assert not again
    finetune(quick.model_copy(update={"gradient_checkpointing": True}), tmp_path / "again")
    assert len(again) == 3 * 2  # both blocks, in every step
    for folder in ("pipeline/transformer", "checkpoints/step-00000003"):
        assert digests(tmp_path / "again" / folder) == digests(tmp_path / "kept" / folder)
