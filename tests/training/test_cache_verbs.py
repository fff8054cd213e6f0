"""`davae cache`, and runs with a shared cache, with their own, or with none."""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from davae.backbones import backbone_of
from davae.cli import main
from davae.data.cache import prune_caches
from davae.data.sources import open_pictures
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.run.recipe import load_recipe
from davae.run.record import read_metrics
from davae.training.devices import fastest_layout, lay_out
from davae.training.stage_two_inputs import cache_conditions, cache_latents, encode_captions_online, encode_online
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import build_caches, finetune
from hashes import digests
from stages import finetune_recipe


@pytest.fixture(scope="module")
def recipe(base_folder: Path, autoencoder_folder: Path, picture_folder: Path) -> FinetuneRecipe:
    return finetune_recipe(base_folder, autoencoder_folder, picture_folder, steps=3, batch_size=4, precision="float32")


@pytest.fixture(scope="module")
def built(recipe: FinetuneRecipe, tmp_path_factory) -> Path:
    """The caches of `davae cache build`."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "r.toml").write_text(recipe.model_copy(update={"cache": str(folder / "cache")}).to_toml())
    main_returns(["cache", "build", str(folder / "r.toml"), "--out", str(folder / "run")], 0)
    return folder


@pytest.fixture
def caches(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built / "cache", tmp_path / "cache"))


def main_returns(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == code


def losses(folder: Path) -> list[str]:
    return [line["loss_hex"] for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_uses_what_was_built_and_trains_as_without(recipe, built, tmp_path) -> None:
    before = digests(built / "cache")
    assert len(before) == 2
    chosen = load_recipe(FinetuneRecipe, built / "r.toml")
    finetune(chosen, tmp_path / "shared")
    assert digests(built / "cache") == before
    assert not (tmp_path / "shared" / "cache").exists()
    finetune(recipe, tmp_path / "own")
    assert {Path(name).name for name in digests(tmp_path / "own" / "cache")} == {Path(name).name for name in before}
    assert losses(tmp_path / "own") == losses(tmp_path / "shared")
    for name in ("adapter", "pipeline", "checkpoints"):
        assert digests(tmp_path / "own" / name) == digests(tmp_path / "shared" / name) != {}


def test_verify_says_what_there_is_and_what_is_damaged(caches, capsys) -> None:
    main_returns(["cache", "verify", str(caches)], 0)
    said = capsys.readouterr().out
    assert ": 12 entries, " in said  # the pictures
    assert ": 13 entries, " in said  # their captions, and none
    assert len(said.splitlines()) == 2

    victim = next(caches.glob("latents-*/*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    main_returns(["cache", "verify", str(caches)], 4)
    found = capsys.readouterr()
    assert f"{victim.name} is damaged (its SHA-256 is not its name)" in found.out
    assert ": 0 entries, " in found.out
    assert "1 files are damaged: run again" in found.err


def test_prune_removes_damage_and_litter_and_with_days_old_caches(caches, capsys) -> None:
    latents, text = (next(caches.glob(f"{kind}-*")) for kind in ("latents", "text"))
    sound = digests(text)
    victim = next(latents.glob("*.safetensors"))
    size = victim.stat().st_size
    victim.write_bytes(bytes(size))
    (text / f"damaged-{64 * '0'}.safetensors").write_bytes(bytes(3 << 20))
    (text / f".{64 * '1'}.safetensors.tmp-17").write_bytes(b"half")

    main_returns(["cache", "prune", str(caches), "--dry-run"], 0)
    assert capsys.readouterr().out == f"{(size + (3 << 20) + 4) / 2**20:,.1f} MiB would be freed\n"
    assert victim.exists()

    main_returns(["cache", "prune", str(caches)], 0)
    assert capsys.readouterr().out == f"{(size + (3 << 20) + 4) / 2**20:,.1f} MiB freed\n"
    assert digests(text) == sound
    assert {path.name for path in text.iterdir()} == {".lock", "cache.json", *sound}
    assert not digests(latents)

    old = time.time() - 10 * 86400
    for path in caches.rglob("*"):
        os.utime(path, (old, old))
    prune_caches(caches, days=11.0)
    assert digests(text) == sound
    prune_caches(caches, days=9.0)
    assert not text.exists()
    assert not latents.exists(), "nothing was left in it"

    with pytest.raises(CheckpointError, match="holds no cache"):
        prune_caches(caches)


def test_prune_leaves_what_no_cache_wrote(caches, caplog) -> None:
    latents, text = (next(caches.glob(f"{kind}-*")) for kind in ("latents", "text"))

    # Other programs' folders, one of them with a cache's name; and other files in a cache.
    foreign = [caches / "browser", caches / "latents-0123456789abcdef", caches / "broken"]
    for folder, content in zip(foreign, ["{}", (latents / "cache.json").read_text(), "{"], strict=True):
        folder.mkdir()
        (folder / "cache.json").write_text(content)
        (folder / "damaged-photo.safetensors").write_text("mine")

    others = [text / name for name in ("notes.txt", "model.safetensors", "damaged-photo.safetensors", ".notes.tmp-1")]
    for path in others:
        path.write_text("mine")
    (text / "folder").mkdir()
    before = digests(caches)

    prune_caches(caches)
    prune_caches(caches, days=1.0)
    assert digests(caches) == before, "all of it was written a moment ago"
    assert "browser/cache.json is not of the cache that its folder is named after" in caplog.text

    # A cache that was begun a moment ago has no shard yet.
    for path in latents.glob("*.safetensors"):
        path.unlink()
    prune_caches(caches, days=1.0)
    assert latents.exists()

    prune_caches(caches, days=0.0)
    assert not latents.exists()
    assert sorted(path.name for path in text.iterdir()) == sorted(["folder", *(path.name for path in others)])
    assert all((folder / "damaged-photo.safetensors").exists() for folder in foreign)


def test_a_cache_that_is_written_to_is_not_pruned(caches) -> None:
    before = {path: path.read_bytes() for path in caches.rglob("*") if path.is_file()}
    with (next(caches.glob("text-*")) / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(SettingsError, match=r"a process is writing to .*text-"):
            prune_caches(caches, days=0.0)
    assert any(path.exists() for path in before if "text-" in str(path))
    assert all(path.read_bytes() == content for path, content in before.items() if "text-" in str(path))


def test_what_was_pruned_under_a_run_is_an_error_with_a_way_out(recipe, caches) -> None:
    autoencoder = load_autoencoder(Path(recipe.autoencoder))
    pictures = open_pictures(Path(recipe.pictures), size=64, split="train")
    latents = cache_latents(autoencoder, pictures, caches)
    shutil.rmtree(caches)
    with pytest.raises(CheckpointError, match=r"can no longer be read .*run again"):
        latents([0], 0)


def test_online_encodes_what_the_cache_holds(recipe, caches) -> None:
    pipeline = load_pipeline(recipe.base)
    autoencoder, backbone = load_autoencoder(Path(recipe.autoencoder)), backbone_of(pipeline.transformer)
    lay_out(autoencoder, fastest_layout(autoencoder.device))  # as the caches were built
    pictures = open_pictures(Path(recipe.pictures), size=64, split="train")
    settings = {"detail_noise": 0.3, "seed": 5}
    kept = cache_latents(autoencoder, pictures, caches, **settings)
    fresh = encode_online(autoencoder, pictures, flips=False, **settings)
    torch.testing.assert_close(fresh([3, 9], 1), kept([3, 9], 1), atol=1e-5, rtol=1e-5)
    texts = cache_conditions(pipeline, backbone, pictures, caches, tokens=8)([0, 5, 0])
    for name, values in encode_captions_online(pipeline, backbone, pictures, 8)([0, 5, 0]).items():
        torch.testing.assert_close(values, texts[name], atol=1e-5, rtol=1e-5)


def test_flips_mirror_half_of_the_pictures_anew_at_every_step(recipe) -> None:
    autoencoder = load_autoencoder(Path(recipe.autoencoder))
    pictures = open_pictures(Path(recipe.pictures), size=64, split="train")
    plain = encode_online(autoencoder, pictures, flips=False, detail_noise=0.0, seed=5)
    flipping = encode_online(autoencoder, pictures, flips=True, detail_noise=0.0, seed=5)
    straight, indices = plain(range(12), 0), range(12)
    base = autoencoder.encode_base(pictures.batch(indices).flip(-1))

    seen = []
    for step in (0, 1, 0):
        found = flipping(indices, step)
        mirrored = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(found, straight, strict=True)]
        for index in range(12):
            if mirrored[index]:
                torch.testing.assert_close(found[index, :4], base[index], atol=1e-5, rtol=1e-5)
        seen.append(mirrored)

    assert seen[0] == seen[2] != seen[1]
    assert 2 < sum(seen[0]) < 10


def test_an_online_run_keeps_nothing_and_learns_the_same(recipe, tmp_path) -> None:
    finetune(recipe, tmp_path / "cached")
    finetune(recipe.model_copy(update={"online": True}), tmp_path / "online")
    assert not (tmp_path / "online" / "cache").exists()
    first = [float.fromhex(losses(tmp_path / name)[0]) for name in ("cached", "online")]
    assert first[1] == pytest.approx(first[0], rel=1e-4)


@pytest.mark.parametrize("start", [finetune, build_caches])
def test_a_base_without_text_encoders_is_refused_by_its_index(start, recipe, tmp_path) -> None:
    """Nothing else of it is here: its weights would have been asked for next."""
    index = json.loads((Path(recipe.base) / "model_index.json").read_bytes())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(CheckpointError, match="has no text_encoder_2: its model_index"):
        start(recipe.model_copy(update={"base": str(tmp_path / "base")}), tmp_path / "run")


def test_what_does_not_go_together_is_refused(recipe, tmp_path) -> None:
    with pytest.raises(ValueError, match="flips = true: cached latents cannot be mirrored; add online = true"):
        FinetuneRecipe(flips=True)
    (tmp_path / "r.toml").write_text(recipe.model_copy(update={"online": True}).to_toml())
    main_returns(["cache", "build", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")], 2)
    assert not (tmp_path / "run").exists()
