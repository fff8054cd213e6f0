"""What both stages say about pictures: buckets in training, and how many unreadable ones are too many."""

import hashlib
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_pipelines
from davae.backbones import backbone_of
from davae.data.sources import PictureSet, open_pictures
from davae.errors import DataError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.saving import save_pipeline
from davae.run.record import read_metrics
from davae.run.storage import write_json
from davae.training.devices import fastest_layout, lay_out
from davae.training.folders import open_training_pictures
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two import choose_objectives
from davae.training.stage_two_inputs import cache_latents, encode_latents
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune, load_upgraded_base
from scenes import caption, fill_with_scenes, keys, scene

SIDES = [(64, 64), (96, 64), (64, 96), (128, 128)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes and sizes, two of them too small, and square ones held out."""
    folder = fill_with_scenes(tmp_path_factory.mktemp("uneven"), train=0, held=2)
    for index, key in enumerate(keys(18, held=False)):
        width, height = SIDES[index % 4] if index < 16 else (40, 40)
        image = Image.fromarray(np.ascontiguousarray(scene(index, 128)[:height, :width]))
        image.save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(caption(index))
    return folder


def stage_one(base: Path, pictures: Path, **changes: object) -> AutoencoderRecipe:
    settings = {
        "base": str(base),
        "pictures": str(pictures),
        "size": 64,
        "aspect_ratios": ("1:1", "3:2", "2:3"),
        "sizes": (128,),
        "bucket_step": 16,
        "crop": 32,
        "detail_channels": 12,
        "fit_pictures": 8,
        "steps": 6,
        "batch_size": 3,
        "precision": "float32",
        "checkpoint_every": 3,
        "evaluate_every": 20,
        "heldout_pictures": 1,
        "calibration_pictures": 100,
    }
    return AutoencoderRecipe(**(settings | changes))


def test_a_recipe_that_names_no_pictures_is_refused(base_folder, tmp_path) -> None:
    for settings in ({}, {"pictures": ""}):
        with pytest.raises(SettingsError, match="`davae data avatars FOLDER` draws a set"):
            train_autoencoder(AutoencoderRecipe(base=str(base_folder), size=64, **settings), tmp_path / "run")


def test_stage_one_trains_on_buckets_and_resumes_as_if_undisturbed(base_folder, uneven, tmp_path) -> None:
    recipe = stage_one(base_folder, uneven)
    pictures = open_training_pictures(recipe, tmp_path)
    assert [bucket[:2] for bucket in pictures.buckets] == [(48, 80), (64, 64), (80, 48), (128, 128)]
    assert list(map(len, pictures.members)) == [4, 4, 4, 4]
    assert {tuple(pictures.batch(pictures.step_indices(3, seed=0, step=step)).shape[2:]) for step in range(6)} == {
        bucket[:2] for bucket in pictures.buckets
    }
    whole = train_autoencoder(recipe, tmp_path / "whole")
    # the same command again, from the checkpoint in the middle
    train_autoencoder(recipe, tmp_path / "cut")
    *earlier, latest = sorted((tmp_path / "cut/checkpoints").iterdir())
    assert earlier
    shutil.rmtree(latest)
    again = train_autoencoder(recipe, tmp_path / "cut")
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in line]
        for run in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    first, second = (load_autoencoder(folder).state_dict() for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def stage_two(base: Path, autoencoder: Path, pictures: Path, **changes: object) -> FinetuneRecipe:
    settings = {
        "base": str(base),
        "autoencoder": str(autoencoder),
        "pictures": str(pictures),
        "size": 64,
        "aspect_ratios": ("1:1", "3:2", "2:3"),
        "bucket_step": 16,
        "trained": "layers",
        "steps": 6,
        "batch_size": 3,
        "prompt_tokens": 8,
        "detail_warmup_steps": 0,
        "precision": "float32",
        "checkpoint_every": 3,
    }
    return FinetuneRecipe(**(settings | changes))


def logged(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_stage_two_trains_on_buckets_cached_or_encoded_anew(base_folder, autoencoder_folder, uneven, tmp_path) -> None:
    recipe = stage_two(base_folder, autoencoder_folder, uneven, cache=str(tmp_path / "cache"))
    finetune(recipe, tmp_path / "cached")
    pipeline, pictures = load_upgraded_base(recipe), open_training_pictures(recipe, tmp_path)
    lay_out(pipeline.vae, fastest_layout(pipeline.vae.device))  # as the run had it
    read_latents = cache_latents(pipeline.vae, pictures, tmp_path / "cache")
    for bucket, members in zip(pictures.buckets, pictures.members, strict=True):
        latents = read_latents(members, 0)
        assert latents.shape == (len(members), 12, bucket.height // 8, bucket.width // 8)
        assert torch.allclose(latents, encode_latents(pipeline.vae, pictures.batch(members)), atol=1e-5)
    finetune(recipe.model_copy(update={"online": True}), tmp_path / "online")
    assert logged(tmp_path / "cached") == pytest.approx(logged(tmp_path / "online"), rel=1e-4)
    assert len(logged(tmp_path / "cached")) >= 2


def test_a_backbone_whose_shift_depends_on_the_tokens_has_it_by_bucket(picture_folder, uneven, tmp_path) -> None:
    with torch.random.fork_rng(devices=[]):
        base = tiny_pipelines.flux()
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=tiny_pipelines.CHANNELS).eval()
        torch.nn.init.normal_(autoencoder.detail_downsample.shortcut.weight, std=0.3)
    autoencoder.calibrate([open_pictures(picture_folder, size=64).batch(range(4))])
    save_pipeline(base, tmp_path / "base")
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    recipe = stage_two(tmp_path / "base", tmp_path / "autoencoder", uneven, sizes=(128,), steps=4, trained="ports")
    pipeline, pictures = load_upgraded_base(recipe), open_training_pictures(recipe, tmp_path)
    objectives = choose_objectives(pipeline, recipe, pictures.buckets)
    assert sorted(objectives) == [60, 64, 256]  # 48x80 and 80x48 alike; 64x64; 128x128; 8 px each
    for positions, objective in objectives.items():
        assert objective.shift == backbone_of(pipeline.transformer).shift(pipeline, positions // 4)
    assert len({objective.shift for objective in objectives.values()}) == 3
    finetune(recipe, tmp_path / "run")
    assert all(math.isfinite(loss) for loss in logged(tmp_path / "run"))


def test_a_backbone_of_one_size_refuses_buckets(class_base, uneven, tmp_path) -> None:
    recipe = stage_two(class_base, tmp_path / "autoencoder", uneven)
    with pytest.raises(SettingsError, match=r"size=48.*positions fit one size, so allowed is 64"):
        finetune(recipe, tmp_path / "run")


@pytest.fixture
def class_base(tmp_path: Path) -> Path:
    """A DiT and the autoencoder for it, untrained."""
    with torch.random.fork_rng(devices=[]):
        base = tiny_pipelines.dit()
        autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=tiny_pipelines.CHANNELS)
    save_pipeline(base, tmp_path / "base")
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "base"


def test_what_fills_a_bucket_can_be_held_out(base_folder, tmp_path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for index, key in enumerate(keys(6, held=False) + keys(1, held=True)):
        Image.fromarray(np.ascontiguousarray(scene(index, 96)[:56])).save(wide / f"{key}.png")
    recipe = stage_one(base_folder, wide, sizes=(), aspect_ratios=("3:2",), steps=1)
    assert recipe.heldout_size == 48
    train_autoencoder(recipe, tmp_path / "run")
    assert any("heldout_psnr" in line for line in read_metrics(tmp_path / "run/metrics.jsonl"))
    assert stage_one(base_folder, wide, sizes=(), aspect_ratios=()).heldout_size == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bucket_step": 4}, "bucket_step=4.*multiples of 8"),
        ({"crop": 64}, "crop=64.*up to 48"),
        ({"aspect_ratios": ("3:0",)}, '"3:0"'),
        ({"sizes": (72,)}, "size=72.*multiples of 16"),
    ],
)
def test_buckets_that_do_not_fit_are_named(base_folder, uneven, tmp_path, changes, named) -> None:
    with pytest.raises(SettingsError, match=named):
        train_autoencoder(stage_one(base_folder, uneven, **changes), tmp_path)


LOSSES = [(3, 0.01, False), (4, 0.01, True), (4, 0.25, False), (1, 0.0, True)]


@pytest.mark.parametrize(("damaged", "allowed", "stops"), LOSSES)
def test_too_many_unreadable_pictures_stop_a_run_and_small_ones_do_not(
    uneven, tmp_path, damaged, allowed, stops
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in uneven.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for key in keys(damaged, held=False):
        (folder / f"{key}.png").write_bytes((folder / f"{key}.png").read_bytes()[:-300])
    recipe = FinetuneRecipe(pictures=str(folder), size=64, max_unreadable=allowed)
    if stops:
        words = f"{damaged} of 16 pictures cannot be read, more than the allowed {allowed:.1%}"
        with pytest.raises(DataError, match=re.escape(words)):
            open_training_pictures(recipe, tmp_path)
        assert len((tmp_path / "refused.json").read_text().splitlines()) == 2 + 2 + damaged
    else:
        pictures = open_training_pictures(recipe, tmp_path)
        assert len(pictures) == 16 - damaged
        assert len(pictures.refused) == 2 + damaged


def test_without_a_setting_any_number_may_be_unreadable(tmp_path) -> None:
    fill_with_scenes(tmp_path, train=2, held=0)
    key = keys(1, held=False)[0]
    (tmp_path / f"{key}.png").write_bytes((tmp_path / f"{key}.png").read_bytes()[:-300])
    assert len(open_pictures(tmp_path, size=64).sound()) == 1


def test_a_run_of_a_former_version_keeps_its_classes_and_its_split(tmp_path, caplog) -> None:
    names = ["0", "1", "10", "2"]
    for place, name in enumerate(names):
        fill_with_scenes(tmp_path / "set" / name, train=1, held=0, first=place)
    recipe = FinetuneRecipe(pictures=str(tmp_path / "set"), size=64)
    run = tmp_path / "run"

    def opened() -> PictureSet:
        return open_training_pictures(recipe, run, classes=True, begun=run)

    # A new run counts as people do, and holds one picture out.
    new = opened()
    assert (new.class_names, len(new)) == (["0", "1", "2", "10"], 3)

    # A former one had the order of text, and held none out.
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    everything = open_pictures(tmp_path / "set", size=64, classes=True).keys
    digest = hashlib.sha256("\n".join(everything).encode()).hexdigest()
    write_json(run / "pictures.json", {"count": 4, "sha256_of_names": digest})
    write_json(run / "classes.json", {name: number for number, name in enumerate(names)})
    caplog.clear()
    old = opened()
    assert (old.class_names, old.keys, old.classes) == (names, everything, [0, 1, 2, 3])
    assert "goes on so: it trains on all 4" in caplog.text

    # A class that came would renumber the others.
    fill_with_scenes(tmp_path / "set" / "3", train=1, held=0)
    with pytest.raises(DataError, match="not those that were recorded: 3 came or went"):
        opened()
