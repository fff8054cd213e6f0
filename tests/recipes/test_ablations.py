"""The ablations run, at a tiny size, and their figure is drawn."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from davae.errors import SettingsError
from scenes import fill_with_scenes
from tiny import tiny_sd3_pipeline, tiny_vae

FOLDER = Path(__file__).parents[2] / "recipes/ablations"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The numbers of two arms of stage 2, and of their autoencoders."""
    folder = tmp_path_factory.mktemp("ablations")
    tiny_sd3_pipeline(vae=tiny_vae(16)).save_pretrained(folder / "base")
    images = fill_with_scenes(folder / "images", train=12, held=6)
    main = runpy.run_path(str(FOLDER / "run.py"), run_name="imported")["main"]
    steps = {"stage_one_steps": 1, "stage_two_steps": 2}
    main(folder / "run", images, base=folder / "base", size=64, seeds=1, arm=["residual", "no schedule"], **steps)
    return folder / "run/result.json"


def test_the_arms_have_numbers(result: Path) -> None:
    rows = json.loads(result.read_text())
    assert [row["arm"] for row in rows["stage_one_after"]] == ["reference", "residual"]
    assert [row["arm"] for row in rows["stage_two"]] == ["base + bicubic", "reference", "no schedule", "residual"]
    assert rows["stage_two"][1]["kid_difference"] == [0, 0]
    assert rows["stage_two"][3]["kid"][0] > 0
    assert rows["curves"].keys() == {"reference", "no schedule", "residual"}


def test_the_figure_is_drawn(result: Path, tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "figure.py"), run_name="imported")["main"](result, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 500


def test_an_unknown_arm_is_refused() -> None:
    choose = runpy.run_path(str(FOLDER / "run.py"), run_name="imported")["choose_arms"]
    assert choose(["unit variance"]) == {"reference", "unit variance"}
    assert "residual, alignment 0" in choose([])
    with pytest.raises(SettingsError, match="--arm none: allowed are reference, alignment 0"):
        choose(["none"])
