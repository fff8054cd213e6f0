"""Portable pipelines: loaded in a process that cannot import davae, saved from there, and loaded again."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from davae import AutoencoderDA, load_pipeline, upgrade
from davae.errors import CheckpointError, SettingsError
from davae.method.slim_start import slimmed
from davae.pipelines.saving import MODULE, make_portable_source, save_pipeline
from tiny import tiny_class_pipeline, tiny_sd3_pipeline, tiny_taef2

WITHOUT_DAVAE = """
import sys
sys.modules["davae"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
settings = {"num_inference_steps": 2, "max_sequence_length": 8, "generator": torch.Generator().manual_seed(0)}
pipeline("a", **settings).images[0].save(sys.argv[2])
pipeline.save_pretrained(sys.argv[3])
"""


def upgraded():
    base = tiny_sd3_pipeline()
    torch.manual_seed(0)
    full = AutoencoderDA.from_base(base.vae, detail_channels=4, linear_blocks=False)
    return upgrade(base, slimmed(full, (4, 8, 16)))


def make_image(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a", num_inference_steps=2, max_sequence_length=8, generator=generator).images[0]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_it_loads_without_davae_and_what_is_saved_from_there_does_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline = upgraded()
    save_pipeline(pipeline, tmp_path / "first", portable=True)

    for name, following in (("first", "second"), ("second", "third")):
        folders = [str(tmp_path / part) for part in (name, f"{name}.png", following)]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_DAVAE, *folders], capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / following / "model_index.json").read_text())["vae"] == [MODULE, "AutoencoderDA"]
        with Image.open(tmp_path / f"{name}.png") as image:
            assert same(image, make_image(pipeline))

    codes = {(tmp_path / name / "vae" / f"{MODULE}.py").read_text() for name in ("first", "second", "third")}
    assert codes == {make_portable_source()}


def test_an_upgrade_of_an_upgrade_loads_without_davae(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    once = upgraded()
    pipeline = upgrade(once, AutoencoderDA.from_base(once.vae, detail_channels=8))
    save_pipeline(pipeline, tmp_path / "first", portable=True)
    folders = [str(tmp_path / part) for part in ("first", "made.png", "second")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DAVAE, *folders], capture_output=True, text=True, timeout=280, check=False
    )

    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "made.png") as image:
        assert image.size == (128, 128)
        assert same(image, make_image(pipeline))


def test_davae_loads_it_with_its_own_code(tmp_path: Path) -> None:
    pipeline = upgraded()
    save_pipeline(pipeline, tmp_path / "folder", portable=True)
    (tmp_path / "folder" / "vae" / f"{MODULE}.py").write_text("raise RuntimeError('this must not run')")
    loaded = load_pipeline(tmp_path / "folder")

    assert type(loaded.vae) is AutoencoderDA
    assert loaded.vae_scale_factor == pipeline.vae_scale_factor
    assert same(make_image(loaded), make_image(pipeline))
    assert load_pipeline(tmp_path / "folder", without=["vae"]).vae is None

    save_pipeline(loaded, tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["vae"] == ["davae", "AutoencoderDA"]

    (tmp_path / "folder" / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError):
        load_pipeline(tmp_path / "folder")


def test_the_file_imports_nothing_of_davae_and_knows_every_base() -> None:
    tree = ast.parse(make_portable_source())
    imported = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] == "davae"}

    space = {"__name__": "somewhere", "__file__": __file__}
    exec(compile(tree, MODULE, "exec"), space)
    autoencoder = space["AutoencoderDA"].from_base(
        space["AutoencoderTAEF2"].from_config(tiny_taef2().config), detail_channels=4
    )

    assert type(autoencoder).__module__ == MODULE
    with torch.no_grad():
        assert autoencoder.decode(torch.zeros(1, 8, 4, 4)).sample.shape == (1, 3, 32, 32)


def test_pipelines_that_cannot_be_portable_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    base = tiny_class_pipeline()
    own = upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4))
    for pipeline, named in (
        (tiny_sd3_pipeline(), "StableDiffusion3Pipeline with nothing"),
        (own, "with transformer, vae"),
    ):
        with pytest.raises(SettingsError, match=named):
            save_pipeline(pipeline, tmp_path / "folder", portable=True)
    assert list(tmp_path.iterdir()) == []
