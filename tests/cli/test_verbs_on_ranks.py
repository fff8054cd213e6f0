"""Verbs that do not train, on two ranks: they leave and print what one process does, and none waits for the dead."""

import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from davae import cli
from davae.data.cache import read_caches
from davae.errors import RankError
from davae.run.ranks import Ranks
from forks import exit_code, forked, print_to
from hashes import digests
from rank_forks import run_ranks
from stages import finetune_recipe

NEEDS_EVAL = pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="needs davae[eval]")
VERBS = ["generate", pytest.param("evaluate", marks=NEEDS_EVAL), "reconstruct", "latents", "data", "cache"]


@pytest.fixture(params=VERBS)
def arguments(request, base_folder, autoencoder_folder, picture_folder, tmp_path) -> list[str]:
    pictures, quick = str(picture_folder), ["--steps", "1", "--prompt-tokens", "8"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(finetune_recipe(base_folder, autoencoder_folder, picture_folder).to_toml())

    small = ["--size", "64"]
    return {
        "generate": ["generate", str(base_folder), *(f"red ball {n}" for n in range(17)), *quick],  # two batches
        "evaluate": ["evaluate", str(base_folder), pictures, "--count", "17", *quick],
        "reconstruct": ["reconstruct", str(autoencoder_folder), pictures, *small],
        "latents": ["latents", str(autoencoder_folder), pictures, "--points", "16", *small],
        "data": ["data", "inspect", pictures, *small],
        "cache": ["cache", "build", str(recipe)],
    }[request.param]


def printing(arguments: list[str], folder: Path) -> Callable[[], None]:
    """The command as a program that leaves in `folder` what it makes, and beside it what it prints."""

    def program() -> None:
        print_to(folder.with_suffix(".printed"), folder.with_suffix(".errors"))
        cli.main([*arguments, "--out", str(folder)])

    return program


def test_two_ranks_leave_and_print_what_one_does(arguments: list[str], tmp_path: Path) -> None:
    assert exit_code(forked(printing(arguments, tmp_path / "one"))) == 0
    assert run_ranks(printing(arguments, tmp_path / "two"), 2) == [0, 0]

    one, two = tmp_path / "one", tmp_path / "two"
    if arguments[0] == "cache":  # which entries are together in a file is another matter
        entries = [[(cache.folder.name, cache.entries) for cache in read_caches(run / "cache")] for run in (one, two)]
        assert entries[0] == entries[1]
    else:
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        assert digests(one, "*.png") == digests(two, "*.png")
        assert digests(one, "*.html") == digests(two, "*.html")

    said = [run.with_suffix(".printed").read_text().replace(f"/{run.name}", "").splitlines() for run in (one, two)]
    assert [line for line in said[0] if "loader" not in line] == [line for line in said[1] if "loader" not in line]


@pytest.mark.parametrize("arguments", ["generate", "cache"], indirect=True)
def test_a_rank_that_dies_is_named(arguments: list[str], tmp_path: Path) -> None:
    def program() -> None:
        if os.environ["RANK"] == "1":
            Ranks()
            os.kill(os.getpid(), signal.SIGKILL)
        printing([*arguments, "--rank-timeout", "30"], tmp_path / "out")()

    assert run_ranks(program, 2) == [RankError.exit_code, -signal.SIGKILL]
    assert "rank 1 does not answer" in (tmp_path / "out.errors").read_text()
