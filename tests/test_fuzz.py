"""Recipes, manifests and tensor files with bytes changed at random: read as they are, or refused by a typed error."""

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from davae.errors import DavaeError
from davae.run.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from davae.run.recipe import load_recipe
from davae.run.storage import read_json
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe
from trials import Trials

ROOT = Path(__file__).parents[1]
PIECES = (
    *(b"nan", b"inf", b"1e999", b"-1", b"9" * 5000, b"null", b"true", b'""', b"{}", b"[]", b"[" * 2000, b'"\\ud800"'),
    *(b"../", b"/etc/passwd", b"\x00", b"\xff\xfe", b"__proto__", b"[loss]\n", b"steps = 0\n", b'":', b",", b"#"),
)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with up to three changes: bits, cuts, repeats, and pieces that parsers stumble over."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randint(0, len(content))
        end = min(len(content), start + chance.randint(0, 20))
        part = content[start:end]
        new = chance.choice([b"", part * 2, chance.choice(PIECES), chance.randbytes(3), bytes(b ^ 1 for b in part)])
        content = content[:start] + new + content[end:]
    return content


def reseal(folder: Path) -> None:
    """Let the manifest fit the files, so that what is in them gets as far as the parsers."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    canonical = lambda: json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()  # noqa: E731
    manifest["digest"] = hashlib.sha256(canonical()).hexdigest()
    (folder / "manifest.json").write_bytes(canonical())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"model": {"weight": torch.ones(3, 2), "bias": torch.ones(2)}}
    save_checkpoint(tmp_path / "run", Checkpoint(1, tensors, {"skipped": 0}), recipe_digest="d", keep=1)
    return tmp_path / "run" / "step-00000001"


def refused_or_read(read: Callable[[], object]) -> bool:
    """Whether it was refused by a typed error, within 2 seconds of processor time."""
    began = time.process_time()
    try:
        read()
    except DavaeError:
        return True
    finally:
        assert time.process_time() - began < 2
    return False


@pytest.mark.soak("R10", ci=8000, full=800_000)
def test_recipes(trials: Trials, tmp_path: Path) -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.toml"))
    path, refused = tmp_path / "recipe.toml", 0
    for chance in trials:
        path.write_bytes(mutated(chance.choice(recipes).read_bytes(), chance))
        cls = chance.choice([AutoencoderRecipe, FinetuneRecipe])
        refused += refused_or_read(lambda cls=cls: load_recipe(cls, path))
    assert 0 < refused <= trials.done


@pytest.mark.soak("R10", ci=4000, full=400_000)
def test_checkpoints(trials: Trials, checkpoint: Path, tmp_path: Path) -> None:
    """Tensor files and values behind a manifest that fits them; manifests themselves; nothing else is touched."""
    sound = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for chance in trials:
        for name, content in sound.items():
            (checkpoint / name).write_bytes(content)
        victim = checkpoint / chance.choice(sorted(sound))
        victim.write_bytes(mutated(sound[victim.name], chance))
        if victim.name != "manifest.json":
            reseal(checkpoint)

        refused = refused_or_read(lambda: load_checkpoint(checkpoint, recipe_digest="d"))
        assert refused or victim.read_bytes() == sound[victim.name] or victim.name != "manifest.json"
        refused_or_read(lambda victim=victim: read_json(victim))

        if chance.random() < 0.1:
            refused_or_read(lambda: latest_checkpoint(checkpoint.parent))
            for path in checkpoint.parent.glob("damaged-*"):
                path.rename(checkpoint)

        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert sorted(path.name for path in checkpoint.iterdir()) == sorted(sound)
