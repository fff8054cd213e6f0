"""Stage 2 on classes instead of captions: a tiny DiT with one prediction for each channel, as a velocity model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from PIL import Image
from torch import Tensor

from davae.backbones import BACKBONES, backbone_of
from davae.data.order import batch_indices
from davae.data.sources import open_pictures
from davae.data.split import heldout
from davae.errors import DataError, SettingsError
from davae.method.flow import interpolate, sample_timesteps
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.pipelines.saving import save_pipeline
from davae.pipelines.upgrade import upgrade
from davae.run.record import read_metrics
from davae.seeds import rand, randn, sample_generators
from davae.training.stage_two_inputs import cache_latents
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from scenes import scene
from tiny import tiny_vae

NAMES = ("ant", "bat", "cat")
NULL = 7
CHANNELS = 4


def condition(pipeline: DiTPipeline, labels: list[int]) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor(labels)}


def velocity(
    transformer: DiTTransformer2DModel, latents: Tensor, sigma: Tensor, condition: dict[str, Tensor]
) -> Tensor:
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()  # it would drop classes by itself
    return transformer(latents, timestep=1000 * sigma, **condition, return_dict=False)[0]


@pytest.fixture(autouse=True)
def flow_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT's row, filled in as a class-conditional flow model has it."""
    row = replace(
        BACKBONES["DiTTransformer2DModel"],
        condition=condition,
        velocity=velocity,
        noise=None,
        lora_targets=(),
    )
    monkeypatch.setitem(BACKBONES, "DiTTransformer2DModel", row)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base pipeline, an autoencoder of it, and pictures in three sub-folders, no caption anywhere."""
    root = tmp_path_factory.mktemp("classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=1,
            num_attention_heads=4,
            attention_head_dim=8,
            sample_size=8,
            num_embeds_ada_norm=NULL,
        )
        for parameter in transformer.parameters():  # a new model's output is zero
            torch.nn.init.normal_(parameter, std=0.1)
        save_pipeline(DiTPipeline(transformer, tiny_vae(), FlowMatchEulerDiscreteScheduler(shift=2.0)), root / "base")
        autoencoder = AutoencoderDA.from_base(tiny_vae(), detail_channels=12, linear_blocks=False).eval()

    for index in range(20):
        path = root / "pictures" / NAMES[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(index)).save(path)

    pictures = open_pictures(root / "pictures", size=64, classes=True)
    autoencoder.calibrate([pictures.batch(range(len(pictures)))])
    autoencoder.save_pretrained(root / "autoencoder")
    return root


@pytest.fixture
def recipe(folders: Path) -> FinetuneRecipe:
    return FinetuneRecipe(
        base=str(folders / "base"),
        autoencoder=str(folders / "autoencoder"),
        pictures=str(folders / "pictures"),
        size=64,
        trained="full",
        steps=1,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=0,
        detail_warmup_steps=10,
        ema_decay=0.8,
        precision="float32",
        seed=3,
    )


@torch.no_grad()
def errors(pipeline: DiTPipeline, latents: Tensor, labels: list[int]) -> Tensor:
    """Squared errors of a base or upgraded pipeline's velocity on the run's first batch, [8, its channels, h, w]."""
    random = sample_generators(3, "flow", range(8))
    clean = latents[batch_indices(len(latents), 8, seed=3, step=0)]
    noise = randn(clean.shape, random)
    sigma = torch.cat([sample_timesteps(1, shift=2.0, generator=own) for own in random])
    noisy, channels = interpolate(clean, noise, sigma), pipeline.transformer.config.in_channels
    made = pipeline.transformer(noisy[:, :channels], 1000 * sigma, torch.tensor(labels), return_dict=False)[0]
    return (made - (noise - clean)[:, :channels]).square()


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_the_first_loss_is_the_bases_own_on_the_classes_or_the_null_class(recipe, tmp_path, dropout) -> None:
    chosen = recipe.model_copy(update={"caption_dropout": dropout})
    finetune(chosen, tmp_path / "run")
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    pictures = open_pictures(Path(recipe.pictures), size=64, split="train", classes=True)
    assert all(
        NAMES[number] == key.partition("/")[0] for key, number in zip(pictures.keys, pictures.classes, strict=True)
    )

    read_latents = cache_latents(load_autoencoder(Path(recipe.autoencoder)), pictures, tmp_path / "cache")
    latents = read_latents(range(len(pictures)), 0)
    random = sample_generators(3, "flow", range(8))
    randn((8, 16, 8, 8), random)
    for own in random:
        sample_timesteps(1, shift=2.0, generator=own)
    kept = rand(random) >= dropout

    indices = batch_indices(len(pictures), 8, seed=3, step=0)
    labels = [pictures.classes[index] if keep else NULL for index, keep in zip(indices, kept.tolist(), strict=True)]

    base = load_pipeline(recipe.base)
    assert line["base_loss"] == pytest.approx(errors(base, latents, labels).mean().item(), rel=1e-5)
    others = [(label + 1) % NULL for label in labels]
    assert errors(base, latents, others).mean().item() != pytest.approx(line["base_loss"], rel=1e-4)
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == {"ant": 0, "bat": 1, "cat": 2}


@pytest.mark.parametrize("trained", ["full", "layers"])
def test_a_class_conditional_run_leaves_a_stock_pipeline(recipe, tmp_path, trained) -> None:
    targets = ("to_q", "to_v")
    folder = tmp_path / "run"
    finetune(recipe.model_copy(update={"trained": trained, "steps": 30, "lora_targets": targets}), folder)
    pipeline = load_pipeline(folder / "pipeline")
    assert type(pipeline) is DiTPipeline
    assert isinstance(pipeline.vae, AutoencoderDA)
    assert pipeline.transformer.config.in_channels == 16

    start = upgrade(load_pipeline(recipe.base), load_autoencoder(Path(recipe.autoencoder)))
    pictures = open_pictures(Path(recipe.pictures), size=64, split="train", classes=True)
    read_latents = cache_latents(load_autoencoder(Path(recipe.autoencoder)), pictures, folder / "cache")
    latents = read_latents(range(len(pictures)), 0)
    before, after = (errors(model, latents, [0] * 8)[:, CHANNELS:].mean() for model in (start, pipeline))
    assert after < 0.95 * before

    start, tensors = start.transformer.state_dict(), pipeline.transformer.state_dict()
    still = {name for name, tensor in start.items() if torch.equal(tensor, tensors[name])}
    changed = {name.rpartition(".")[0] for name in start.keys() - still}
    if trained == "full":
        assert not (folder / "adapter").exists()
        assert "transformer_blocks.0.attn1.to_q" in changed
        return

    ports = {"pos_embed.proj", "proj_out_2"}
    layers = {f"transformer_blocks.0.attn1.{name}" for name in targets}
    assert changed == ports | layers
    adapted = load_pipeline(recipe.base, adapter=folder / "adapter").transformer.state_dict()
    assert all(torch.equal(adapted[name], tensor) for name, tensor in tensors.items())


def test_a_class_that_the_transformer_has_not_is_refused(recipe, tmp_path) -> None:
    for index in range(12):
        Image.fromarray(scene(index)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.cls").write_text(str(NULL if index == 5 else index % NULL))
    assert not heldout("5")
    with pytest.raises(SettingsError, match=f"picture 5 has class {NULL}: allowed .* 0 to {NULL - 1}"):
        finetune(recipe.model_copy(update={"pictures": str(tmp_path)}), tmp_path / "run")


def test_pictures_of_classes_are_refused_before_anything_is_encoded(recipe, tmp_path) -> None:
    with pytest.raises(SettingsError, match="validation_every=2: pictures are drawn from captions"):
        finetune(recipe.model_copy(update={"validation_every": 2}), tmp_path)
    assert not (tmp_path / "cache").exists()


def test_captioned_pictures_have_no_classes(recipe, picture_folder, tmp_path) -> None:
    with pytest.raises(DataError, match="no class; put its number beside"):
        finetune(recipe.model_copy(update={"pictures": str(picture_folder)}), tmp_path)


def test_another_size_than_the_positions_fit_is_refused(recipe, tmp_path) -> None:
    with pytest.raises(
        SettingsError, match=r"size=32: this DiTTransformer2DModel's positions fit one size.* allowed is 64"
    ):
        finetune(recipe.model_copy(update={"size": 32}), tmp_path)
    pipeline = load_pipeline(recipe.base)
    side = backbone_of(pipeline.transformer).picture_side
    assert side(pipeline, None) == side(pipeline, 32) == 32


def test_lora_without_named_targets_is_refused(recipe, tmp_path) -> None:
    with pytest.raises(SettingsError, match="no default targets for a DiTTransformer2DModel"):
        finetune(recipe.model_copy(update={"trained": "lora"}), tmp_path)
