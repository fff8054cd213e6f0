"""What the recipe of a run of stage 1 decides: noise, what trains, the target, the networks that judge."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from davae.data.order import batch_indices, random_crops
from davae.data.sources import PictureSet, open_pictures
from davae.evaluation.reconstruction import measure
from davae.evaluation.tokenizers import make_tokenizer
from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.run.ranks import Ranks
from davae.run.record import read_metrics
from davae.seeds import generator, randn, sample_generators
from davae.training.stage_one import base_reconstruction, choose_trained
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import heldout_metrics, train_autoencoder
from stages import stage_one_recipe
from tiny import tiny_taesd, tiny_vae


@pytest.fixture(scope="module")
def recipe(base_folder: Path, picture_folder: Path) -> AutoencoderRecipe:
    return stage_one_recipe(base_folder, picture_folder)


@pytest.fixture(scope="module")
def train_pictures(picture_folder: Path) -> PictureSet:
    return open_pictures(picture_folder, size=64, split="train")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS.alex()


def outcome(folder: Path) -> dict[str, object]:
    """What result.json says, without when and how."""
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("finished", "command", "commit")}


@pytest.fixture
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


def test_the_recipe_decides_the_latent_noise_of_a_run(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    first = {}
    for scale in (0.0, 1.0):
        update = {"latent_noise": scale, "steps": 1}
        train_autoencoder(recipe.model_copy(update=update), tmp_path / str(scale))
        lines = read_metrics(tmp_path / str(scale) / "metrics.jsonl")
        first[scale] = next(line for line in lines if "loss" in line)
    assert first[1.0]["l1"] != first[0.0]["l1"]  # an untrained decoder may gain or lose by it
    assert first[1.0]["alignment"] == first[0.0]["alignment"]


def test_heldout_numbers_are_those_of_the_evaluation(autoencoder, picture_folder, lpips) -> None:
    heldout = open_pictures(picture_folder, size=64, split="heldout")
    expected = measure(heldout, {"davae": make_tokenizer(autoencoder)}, lpips=lpips)["davae"]
    found = heldout_metrics(autoencoder, heldout, lpips, Ranks())
    assert found == pytest.approx({f"heldout_{name}": value for name, value in expected.items()})


def first_losses(folder: Path) -> dict[str, float]:
    return next(line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line)


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({}, ()),
        ({"frozen_trunk": True}, ("detail_encoder.", "detail_quant_conv.")),
        (
            {"decoder_only": True},
            ("detail_encoder.", "detail_quant_conv.", "detail_downsample.", "detail_from_base."),
        ),
    ],
    ids=["all", "frozen trunk", "decoder only"],
)
@pytest.mark.parametrize("quant", [False, True])
def test_what_trains_is_what_the_recipe_says(recipe, changes, still, quant) -> None:
    vae = AutoencoderKL.from_config({**tiny_vae().config, "use_quant_conv": quant, "use_post_quant_conv": quant})
    autoencoder = AutoencoderDA.from_base(vae, detail_channels=8, base_in_detail=True)
    trained = {id(p) for p in choose_trained(autoencoder, recipe.model_copy(update=changes))}
    for name, parameter in autoencoder.named_parameters():
        assert (id(parameter) in trained) == parameter.requires_grad == (not name.startswith(("base_", *still)))
    for name, module in autoencoder.named_children():
        assert module.training == (not f"{name}.".startswith(("base_encoder.", *still)))


def test_going_on_starts_where_the_other_stopped(recipe, autoencoder, autoencoder_folder, tmp_path) -> None:
    going_on = {"autoencoder": str(autoencoder_folder), "detail_channels": 8, "steps": 2, "frozen_trunk": True}
    end = load_autoencoder(train_autoencoder(recipe.model_copy(update=going_on), tmp_path))
    start = load_autoencoder(tmp_path / "start")
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), autoencoder.parameters(), strict=True))
    before, after = start.state_dict(), end.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    kept = {name for name in after if name.startswith(("base_", "detail_encoder."))}
    assert moved == set(after) - kept


def test_decoder_only_keeps_latents_and_statistics_bit_for_bit(
    recipe, autoencoder, autoencoder_folder, train_pictures, tmp_path
) -> None:
    refined = {"autoencoder": str(autoencoder_folder), "detail_channels": 8, "steps": 2, "decoder_only": True}
    refined |= {"calibration_pictures": 3}  # it was calibrated on all of them
    end = load_autoencoder(train_autoencoder(recipe.model_copy(update=refined), tmp_path))
    image = train_pictures.batch(range(4))
    with torch.no_grad():
        ours, theirs = (model.encode(image).latent_dist for model in (end, autoencoder))
        assert torch.equal(ours.parameters, theirs.parameters)
        assert not torch.equal(end(image).sample, autoencoder(image).sample)
    still = ("base_", "detail_encoder.", "detail_downsample.", "detail_mean", "detail_std")
    before = autoencoder.state_dict()
    moved = {name for name, tensor in end.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if not name.startswith(still)}


@pytest.mark.parametrize("make", [tiny_vae, tiny_taesd])
def test_the_base_reconstruction_is_that_of_the_base_itself(make, train_pictures) -> None:
    vae = make()
    autoencoder, image = AutoencoderDA.from_base(vae, detail_channels=8).eval(), train_pictures.batch([0, 1])
    with torch.no_grad():
        encoded = vae.encode(image)  # AutoencoderTiny's own `forward` rounds latents to bytes
        mode = encoded.latents if make is tiny_taesd else encoded.latent_dist.mode()
        expected = vae.decode(mode).sample.clamp(-1, 1)
    assert (vae(image).sample - image).abs().mean() > 0.1
    torch.testing.assert_close(base_reconstruction(autoencoder, vae, image), expected)


def test_the_target_of_a_run_is_what_the_recipe_says(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    one = recipe.model_copy(update={"target": "base reconstruction", "steps": 1})
    train_autoencoder(one, tmp_path)
    start, vae = load_autoencoder(tmp_path / "start"), load_base_vae(one.base)
    pictures = open_pictures(Path(one.pictures), size=64, split="train")
    images = pictures.batch(batch_indices(len(pictures), 4, seed=0, step=0))
    image = random_crops(images, 32, seed=0, samples=range(4))
    with torch.no_grad():
        mean, log_variance = start.encode_detail(image)
        noise = randn(mean.shape, sample_generators(0, "posterior", range(4)))
        made = start.reconstruct(start.encode_base(image), mean + (0.5 * log_variance).exp() * noise)
        expected = (made - vae(image).sample.clamp(-1, 1)).abs().mean().item()
    assert first_losses(tmp_path)["l1"] == pytest.approx(expected, rel=1e-5)


def test_vgg_is_for_the_loss_and_heldout_numbers_stay_alexnets(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    tensors, width = {}, 3
    for index, channels in enumerate([64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]):
        tensors[f"conv_{index}.weight"] = torch.full((channels, width, 3, 3), 1 / (9 * width)).half()
        tensors[f"conv_{index}.bias"] = torch.zeros(channels)
        width = channels
    tensors |= {f"head_{index}": torch.ones(channels) for index, channels in enumerate([64, 128, 256, 512, 512])}
    save_file(tensors, tmp_path / "vgg16.safetensors")
    lines = {}
    for weights in ("", str(tmp_path / "vgg16.safetensors")):
        loss = LossWeights(lpips_weights=weights)
        train_autoencoder(recipe.model_copy(update={"loss": loss, "steps": 1}), tmp_path / f"run{len(lines)}")
        lines[weights] = read_metrics(tmp_path / f"run{len(lines)}" / "metrics.jsonl")
    (before, step, _), (other_before, other_step, _) = lines.values()
    assert before["heldout_lpips"] == other_before["heldout_lpips"]
    assert step["l1"] == other_step["l1"]
    assert step["lpips"] != other_step["lpips"]


def test_the_discriminator_plays_from_its_first_step_on(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    loss = LossWeights(
        lpips=0, adversarial=0.5, adversarial_start=1, adversarial_ramp_steps=2, discriminator_learning_rate=1e-2
    )
    chosen = recipe.model_copy(update={"loss": loss, "steps": 3, "checkpoint_every": 1})
    train_autoencoder(chosen, tmp_path)
    saved = [load_file(path) for path in sorted((tmp_path / "checkpoints").rglob("discriminator.safetensors"))]
    counts = [int(tensors["main.3.num_batches_tracked"]) for tensors in saved]
    assert counts == [0, 3, 6]  # made, real, made, in each step that it plays in
    start = PatchDiscriminator(generator(0, "discriminator")).state_dict()
    assert all(torch.equal(saved[0][name], tensor) for name, tensor in start.items())
    assert not any(torch.equal(saved[1][name], saved[2][name]) for name in start)
    assert outcome(tmp_path)["counts"]["skipped_discriminator_steps"] == 0
    first, last = first_losses(tmp_path), read_metrics(tmp_path / "metrics.jsonl")[-2]
    assert "adversarial" not in first
    assert last["step"] == 2
    total = last["l1"] + 1e-6 * last["kl"] + 0.5 * last["alignment"] + 0.5 * last["adversarial"]
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    assert 0 < last["discriminator"] < 10
