"""Every example runs, on a tiny pipeline of stock classes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from davae import AutoencoderDA
from tiny import tiny_sd3_pipeline, tiny_vae

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: Path | str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_sd3_pipeline(vae=tiny_vae(16)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_examples_are_short() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) > 40} == set()


def test_upgrade_then_generate(base: Path, tmp_path: Path) -> None:
    assert "StableDiffusion3Pipeline" in run("upgrade_pipeline.py", base, tmp_path / "upgraded")
    run("generate.py", tmp_path / "upgraded", tmp_path / "apple.png", "red apple", "2")
    with Image.open(tmp_path / "apple.png") as apple:
        assert apple.size == (64, 64)


def test_preview(base: Path, tmp_path: Path) -> None:
    run("upgrade_pipeline.py", base, tmp_path / "upgraded")
    told = run("preview.py", tmp_path / "upgraded", base, tmp_path / "watched", "red apple", "6")
    assert told.splitlines() == ["step 4: 32 x 32 px", "step 5: 32 x 32 px", "picture: 64 x 64 px"]
    assert {path.name for path in (tmp_path / "watched").iterdir()} == {"step-04.png", "step-05.png", "picture.png"}


def test_warm_start(base: Path) -> None:
    lines = run("warm_start.py", base).splitlines()
    assert [float(line.split()[-1]) for line in lines] == [0.0, 0.0]


def test_look_at_latents(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderDA.from_base(tiny_vae(), detail_channels=8).save_pretrained(tmp_path / "autoencoder")
    Image.linear_gradient("L").resize((70, 50)).convert("RGB").save(tmp_path / "picture.png")
    told = run("look_at_latents.py", tmp_path / "autoencoder", tmp_path / "picture.png")
    assert "base (1, 4, 6, 8), detail (1, 8, 6, 8)" in told


def test_sample_classes(tmp_path: Path) -> None:
    assert "64 x 64 px" in run("sample_classes.py", tmp_path / "grid.png", "", "2")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (128, 128)
