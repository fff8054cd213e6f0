import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from davae.data.order import batch_indices, random_crops
from davae.data.pictures import read_png
from davae.data.sources import PictureSet, open_pictures
from davae.errors import CheckpointError, DataError, NumericsError, SettingsError
from davae.evaluation.reconstruction import measure
from davae.evaluation.tokenizers import make_tokenizer
from davae.method.discriminator import PatchDiscriminator
from davae.method.perceptual import LPIPS
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_autoencoder, load_base_vae
from davae.run.ranks import Ranks
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.seeds import generator, randn, sample_generators
from davae.training.stage_one import base_reconstruction, choose_trained
from davae.training.stage_one_recipe import AutoencoderRecipe, LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_one_start import start_autoencoder
from davae.training.stage_one_validation import heldout_metrics
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from hashes import digests
from scenes import fill_with_scenes
from tiny import tiny_taesd, tiny_vae

STEPS = 41


def recipe_for(base: Path, pictures: Path, **changes: object) -> AutoencoderRecipe:
    settings = {
        "base": str(base),
        "pictures": str(pictures),
        "size": 64,
        "crop": 32,
        "detail_channels": 12,
        "fit_pictures": 8,
        "steps": STEPS,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "ema_decay": 0.8,
        "precision": "float32",
        "checkpoint_every": 20,
        "evaluate_every": 20,
        "heldout_pictures": 3,
        "calibration_pictures": 100,
    }
    return AutoencoderRecipe(**(settings | changes))


@pytest.fixture(scope="module")
def recipe(base_folder: Path, picture_folder: Path) -> AutoencoderRecipe:
    return recipe_for(base_folder, picture_folder)


@pytest.fixture(scope="module", params=["closed form", "random"])
def trained(request: pytest.FixtureRequest, recipe: AutoencoderRecipe, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run from either start."""
    folder = tmp_path_factory.mktemp("stage1")
    made = train_autoencoder(recipe.model_copy(update={"start": request.param}), folder)
    assert made == folder / "autoencoder"
    return folder, request.param


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


# ------------------------------------------------------------------------------------------------------- a whole run


def test_the_loss_falls_and_heldout_pictures_profit(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    lines = read_metrics(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])
    heldout = [line["heldout_psnr"] for line in lines if "heldout_psnr" in line]
    drawn = sorted((folder / "pictures").iterdir())
    assert len(drawn) == len(heldout)
    originals, reconstructions = read_png(drawn[-1]).chunk(2, dim=1)
    assert originals.shape == reconstructions.shape == (3, 64, 64 * 3)  # as many as are held out
    assert 0 < (originals.float() - reconstructions.float()).abs().mean() < 80  # noise: 85 or more
    assert len(heldout) == 4  # before steps 0, 20, 40, and at the end
    assert heldout[-1] > heldout[0] + 0.5


def test_the_result_is_the_last_heldout_numbers(trained: tuple[Path, str], recipe: AutoencoderRecipe) -> None:
    folder, start = trained
    result, last = outcome(folder), read_metrics(folder / "metrics.jsonl")[-1]
    numbers = {name: value for name, value in last.items() if name.startswith("heldout_")}
    assert result["values"] == {**numbers, "autoencoder": "autoencoder"}
    assert result["counts"] == {"pictures": 12, "heldout_pictures": 3, "steps": STEPS, "skipped_steps": 0, "spikes": 0}
    assert result["recipe_digest"] == recipe.model_copy(update={"start": start}).digest()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["precision"] == "float32"


def test_the_base_encoder_stays_bit_for_bit_and_everything_else_moves(
    trained: tuple[Path, str], base_folder: Path
) -> None:
    start, end = (AutoencoderDA.from_pretrained(trained[0] / name) for name in ("start", "autoencoder"))
    base = load_base_vae(str(base_folder)).encoder.state_dict()
    assert all(torch.equal(tensor, end.base_encoder.state_dict()[name]) for name, tensor in base.items())
    before = {id(p): q for p, q in zip(end.parameters(), start.parameters(), strict=True)}
    moved = end.detail_parameters()
    still = [p for p in end.parameters() if not p.requires_grad]
    assert len(moved) > len(still) > 0
    assert not any(torch.equal(p, before[id(p)]) for p in moved)
    assert all(torch.equal(p, before[id(p)]) for p in still)


def test_either_start_is_what_its_name_says(trained: tuple[Path, str], base_folder: Path) -> None:
    folder, start = trained
    autoencoder = AutoencoderDA.from_pretrained(folder / "start")
    assert autoencoder.config.linear_blocks == (start == "closed form")
    convolution = autoencoder.detail_downsample.conv.weight
    assert bool(convolution.any()) == (start == "random")
    base = load_base_vae(str(base_folder))
    for ours, theirs in ((autoencoder.detail_encoder, base.encoder), (autoencoder.joint_decoder, base.decoder)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


@pytest.mark.parametrize("start", ["closed form", "random"])
def test_the_start_is_a_function_of_the_seed(recipe, train_pictures, tmp_path, start) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        chosen = recipe.model_copy(update={"start": start, "seed": seed})
        start_autoencoder(chosen, train_pictures, tmp_path / name)
        weights.append(digests(tmp_path / name))
    assert weights[0] == weights[1] != weights[2]


def test_what_is_saved_is_the_ema_and_it_is_calibrated(trained: tuple[Path, str], train_pictures: PictureSet) -> None:
    folder, _ = trained
    autoencoder = AutoencoderDA.from_pretrained(folder / "autoencoder").eval()
    shadows = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "ema.safetensors")
    live = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "autoencoder.safetensors")
    for name, parameter in autoencoder.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, shadows[f"autoencoder.{name}"])
    assert any(not torch.equal(live[name.removeprefix("autoencoder.")], shadow) for name, shadow in shadows.items())
    with torch.no_grad():
        latents = autoencoder.encode(train_pictures.batch(range(len(train_pictures)))).latent_dist.mode()
    detail = autoencoder.split(autoencoder.to_units(latents))[1].double()
    assert detail.mean((0, 2, 3)) == pytest.approx(torch.zeros(12), abs=1e-4)
    assert detail.std((0, 2, 3), correction=0) == pytest.approx(torch.ones(12), abs=1e-4)


def test_the_same_command_again_returns_the_same_and_trains_nothing(
    trained: tuple[Path, str], recipe: AutoencoderRecipe
) -> None:
    folder, start = trained
    before, lines, result = digests(folder), read_metrics(folder / "metrics.jsonl"), outcome(folder)
    inodes = {path: path.stat().st_ino for path in (folder / "checkpoints").rglob("*")}
    train_autoencoder(recipe.model_copy(update={"start": start}), folder)
    assert digests(folder) == before
    assert {path: path.stat().st_ino for path in (folder / "checkpoints").rglob("*")} == inodes
    after = read_metrics(folder / "metrics.jsonl")
    assert outcome(folder) == result
    without_time = [[{k: v for k, v in line.items() if k != "seconds"} for line in run] for run in (lines, after)]
    assert without_time[0] == without_time[1]
    assert {path.name for path in folder.iterdir()} == {
        *(
            "recipe.toml",
            "environment.json",
            "pictures.json",
            "metrics.jsonl",
            "result.json",
            "checkpoints",
            "start",
            "autoencoder",
            "pictures",
            ".lock",
        )
    }


def test_another_recipe_in_the_same_folder_is_refused(trained: tuple[Path, str], recipe: AutoencoderRecipe) -> None:
    folder, start = trained
    before = digests(folder, "*")
    with pytest.raises(CheckpointError, match="another recipe"):
        train_autoencoder(recipe.model_copy(update={"start": start, "learning_rate": 1e-3}), folder)
    assert digests(folder, "*") == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_with_other_pictures(
    recipe: AutoencoderRecipe, picture_folder: Path, tmp_path: Path, finished: bool
) -> None:
    pictures, run = shutil.copytree(picture_folder, tmp_path / "pictures"), tmp_path / "run"
    recipe = recipe.model_copy(update={"pictures": str(pictures), "steps": 1})
    train_autoencoder(recipe, run)
    if not finished:
        (run / "result.json").unlink()
    first = open_pictures(pictures, size=64, split="train").keys[0]
    (pictures / f"{first}.png").rename(tmp_path / "aside.png")
    with pytest.raises(CheckpointError, match=r"has trained on \d+ pictures, and there are \d+ now"):
        train_autoencoder(recipe, run)
    (tmp_path / "aside.png").rename(pictures / f"{first}.png")
    train_autoencoder(recipe, run)


def test_a_folder_of_the_other_stage_is_refused(trained: tuple[Path, str]) -> None:
    with pytest.raises(CheckpointError, match="of the other stage"):
        finetune(FinetuneRecipe(), trained[0])


def test_somebodys_own_folder_is_not_replaced(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    (tmp_path / "autoencoder").mkdir()
    with pytest.raises(SettingsError, match=r"autoencoder exists and has no config\.json"):
        train_autoencoder(recipe, tmp_path)


def test_another_recipe_is_refused_even_before_the_first_checkpoint(
    trained: tuple[Path, str], recipe: AutoencoderRecipe, tmp_path: Path
) -> None:
    folder, start = trained
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "autoencoder"))
    with pytest.raises(CheckpointError, match="another recipe"):
        train_autoencoder(recipe.model_copy(update={"start": start, "detail_channels": 4}), tmp_path / "run")


def test_a_run_without_steps_is_the_start_calibrated(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    folder = train_autoencoder(recipe.model_copy(update={"steps": 0}), tmp_path)
    start, end = load_autoencoder(tmp_path / "start"), load_autoencoder(folder)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), end.parameters(), strict=True))
    assert not torch.equal(start.detail_std, end.detail_std)


# ------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 60, "crop": 32}, r"size=60.*multiples of 8"),
        ({"crop": 36}, r"crop=36.*multiples of 8.*size=64"),
        ({"crop": 72}, r"crop=72.*size=64"),
        ({"crop": 24}, r"crop=24.*from 32, which LPIPS needs"),
        ({"detail_channels": 6}, r"detail_channels=6 must be a positive multiple of base_channels=4"),
        ({"detail_channels": 8, "start": "random"}, r"in_channels=12 must divide .* Choose detail_channels"),
        (
            {"crop": 16, "loss": LossWeights(lpips=0, adversarial=0.1)},
            r"crop=16.*from 24, which the discriminator needs",
        ),
        ({"loss": LossWeights(lpips_patch=48)}, r"lpips_patch=48: allowed are 32 to crop=32"),
        ({"loss": LossWeights(lpips_patch=24)}, r"lpips_patch=24: allowed are 32 to crop=32"),
        ({"loss": LossWeights(lpips_patch=32, lpips_stride=33)}, r"lpips_stride=33: .* lpips_patch, which is 32"),
        ({"loss": LossWeights(lpips_stride=16)}, r"lpips_stride=16: .* lpips_patch, which is not given"),
        ({"decoder_only": True, "frozen_trunk": True}, r"decoder_only trains less"),
        (
            {"decoder_only": True, "loss": LossWeights(adaptive_alignment=True)},
            r"adaptive_alignment with decoder_only",
        ),
    ],
    ids=[
        "size",
        "crop",
        "crop above size",
        "crop below LPIPS",
        "channels",
        "channels of the random start",
        "crop below the discriminator",
        "patch above crop",
        "patch below LPIPS",
        "stride above patch",
        "stride without patch",
        "frozen twice",
        "alignment of what is frozen",
    ],
)
def test_settings_that_do_not_fit_are_named(
    recipe: AutoencoderRecipe, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(SettingsError, match=named):
        train_autoencoder(recipe.model_copy(update=changes), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_crop_below_lpips_is_fine_without_it(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    chosen = recipe.model_copy(update={"crop": 24, "loss": LossWeights(lpips=0), "steps": 1})
    assert (train_autoencoder(chosen, tmp_path) / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"detail_channels": 12}, r"detail_channels=12, but .* has 8"),
        ({"base_downsample": "bicubic"}, r"base_downsample='bicubic', but .* has 'bicubic-antialias'"),
        ({"base": ""}, r"frozen base encoder is not this pipeline's"),  # the shipped base is not the tiny one
    ],
    ids=["channels", "filter", "base"],
)
def test_an_autoencoder_to_go_on_from_must_be_what_the_recipe_says(
    recipe: AutoencoderRecipe, autoencoder_folder: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    update = {"autoencoder": str(autoencoder_folder), "detail_channels": 8, "target": "base reconstruction", **changes}
    with pytest.raises(SettingsError, match=named):
        train_autoencoder(recipe.model_copy(update=update), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_missing_weights_of_lpips_or_an_autoencoder_lock_no_folder(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for update in ({"loss": LossWeights(lpips_weights=absent)}, {"autoencoder": absent}):
        with pytest.raises(CheckpointError, match="absent"):
            train_autoencoder(recipe.model_copy(update=update), tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_detail_latents_that_came_to_nothing_are_no_result(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    chosen = recipe.model_copy(update={"steps": 0})
    train_autoencoder(chosen, tmp_path)
    path = tmp_path / "start" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.startswith("detail_")}
    save_file({**tensors, **zeros, "detail_std": tensors["detail_std"]}, path)
    with pytest.raises(NumericsError, match=r"do not vary, or are not finite.*KL"):
        train_autoencoder(chosen, tmp_path)


def test_a_refused_recipe_can_be_mended_in_the_same_folder(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="detail_channels=17"):
        train_autoencoder(recipe.model_copy(update={"detail_channels": 17, "steps": 0}), tmp_path)
    train_autoencoder(recipe.model_copy(update={"steps": 0}), tmp_path)
    assert load_recipe(AutoencoderRecipe, tmp_path / "recipe.toml").detail_channels == recipe.detail_channels


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[-0.1, 0.9]"])
def test_betas_outside_their_range_are_refused(tmp_path: Path, betas: str) -> None:
    (tmp_path / "recipe.toml").write_text(f"betas = {betas}\n")
    with pytest.raises(SettingsError, match=r'key "betas\.[01]"'):
        load_recipe(AutoencoderRecipe, tmp_path / "recipe.toml")


def test_pictures_without_a_heldout_one_are_a_data_error(recipe: AutoencoderRecipe, tmp_path: Path) -> None:
    pictures = fill_with_scenes(tmp_path / "pictures", train=2, held=0)
    with pytest.raises(DataError, match="heldout"):
        train_autoencoder(recipe.model_copy(update={"pictures": str(pictures)}), tmp_path / "run")


def test_a_damaged_heldout_picture_is_left_out_and_said(recipe: AutoencoderRecipe, tmp_path: Path, caplog) -> None:
    pictures = fill_with_scenes(tmp_path / "pictures", held=2)
    damaged = pictures / f"{open_pictures(pictures, size=64, split='heldout').keys[0]}.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    train_autoencoder(recipe.model_copy(update={"pictures": str(pictures), "steps": 1}), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
    assert [message for message in caplog.messages if f"1 refused: {damaged.name}: damaged" in message]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").rglob("stage1*.toml")), ids=str)
def test_shipped_recipes_fit(path: Path) -> None:
    recipe = load_recipe(AutoencoderRecipe, path)
    assert recipe.crop <= recipe.size
    assert recipe.crop % 16 == recipe.size % 16 == 0


# ------------------------------------------------------------------------------------------ what a recipe decides


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
