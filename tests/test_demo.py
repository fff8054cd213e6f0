import json
import re
from dataclasses import asdict
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import Tensor

from davae.data.sources import open_pictures
from davae.demo import (
    BASE,
    CLOSED_FORM,
    ENLARGED,
    FULL,
    NATIVE,
    PLANS,
    SHIPPED,
    SIZE,
    THIS_RUN,
    _check_settings,
    _once,
    enlarge,
    make_figure,
    make_page,
    run_demo,
    stage_one_recipe,
    stage_two_recipe,
)
from davae.errors import SettingsError
from davae.evaluation.report import ImageGrid, write_page
from davae.run.recipe import load_recipe
from davae.run.storage import write_json
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe
from scenes import fill_with_scenes, scene

PLAN = PLANS["tiny"]
NASTY = "<script>alert('red & \"ball\"')</script>"

# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", PLANS)
def test_a_budget_is_enough_for_what_the_page_shows(name: str) -> None:
    plan = PLANS[name]
    assert 0 < plan.shown <= plan.generated
    assert plan.generated >= 4  # the error of KID is taken over halves
    assert plan.heldout >= 4  # shown in the gallery
    assert min(asdict(plan).values()) > 0


@pytest.mark.parametrize("name", PLANS)
def test_recipes_are_valid_and_follow_budget_and_seed(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    one, two = stage_one_recipe(plan, 5), stage_two_recipe(plan, 5, tmp_path / "autoencoder")
    for recipe, cls in ((one, AutoencoderRecipe), (two, FinetuneRecipe)):
        (tmp_path / "recipe.toml").write_text(recipe.to_toml())
        assert load_recipe(cls, tmp_path / "recipe.toml") == recipe
        assert recipe.seed == 5
        assert recipe.size == SIZE

    assert (one.steps, two.steps) == (plan.stage_one_steps, plan.stage_two_steps)
    assert one.crop % 16 == 0
    assert one.start == "closed form"
    assert two.autoencoder == str(tmp_path / "autoencoder")
    assert 0 < two.detail_warmup_steps < two.steps, "the detail loss gets its full weight within the run"


def test_an_unknown_budget_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"budget='huge': allowed are tiny, short"):
        run_demo(tmp_path / "run", "huge")
    assert not (tmp_path / "run").exists()


def test_a_folder_goes_on_with_its_own_settings_and_refuses_others(tmp_path: Path) -> None:
    settings = {"budget": "tiny", **asdict(PLAN), "seed": 0}
    _check_settings(tmp_path / "run", settings)
    before = (tmp_path / "run" / "settings.json").read_bytes()
    _check_settings(tmp_path / "run", dict(settings))

    for changes in ({"seed": 1}, {"budget": "short"}, {"generated": 9}):
        with pytest.raises(SettingsError, match="remove it or give another --out") as caught:
            _check_settings(tmp_path / "run", settings | changes)
        assert all(repr(value) in str(caught.value) for value in changes.values())
    with pytest.raises(SettingsError):
        run_demo(tmp_path / "run", "tiny", seed=1)
    assert (tmp_path / "run" / "settings.json").read_bytes() == before


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, int]:
        calls.append(1)
        return {"n": len(calls)}

    assert _once(tmp_path / "a.json", make) == {"n": 1}
    assert _once(tmp_path / "a.json", make) == {"n": 1}
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------------------------- parts


def test_a_base_picture_is_enlarged_smoothly() -> None:
    flat = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(enlarge(flat), torch.full((3, 8, 8), 77, dtype=torch.uint8))

    steep = torch.zeros(3, 4, 4, dtype=torch.uint8)
    steep[..., 2:] = 255
    row = enlarge(steep)[0, 4].int()
    assert (row.shape, row.min(), row.max()) == ((8,), 0, 255)
    assert len(set(row.tolist())) > 2, "no nearest neighbours"


def test_the_figure_has_one_row_for_each_prompt(tmp_path: Path) -> None:
    real = open_pictures(fill_with_scenes(tmp_path, train=6, held=2), size=64)
    made = {name: [shade(10 * index + place) for index in range(8)] for place, name in enumerate(MADE)}
    figure = make_figure(made, real, 4)
    assert list(figure.columns) == [ENLARGED, THIS_RUN, SHIPPED, "real image"]
    assert list(figure.rows) == [real.captions[index] for index in (0, 2, 4, 6)]
    for row, index in zip(figure.cells, (0, 2, 4, 6), strict=True):
        assert [int(cell[0, 0, 0]) for cell in row[:3]] == [
            10 * index + MADE.index(name) for name in figure.columns[:3]
        ]
        assert torch.equal(row[3], real.image(index))


# ---------------------------------------------------------------------------------------------------------------- page

MADE = [THIS_RUN, SHIPPED, ENLARGED]


def shade(value: int) -> Tensor:
    return torch.full((3, 16, 16), value, dtype=torch.uint8)


def facts(*, kid: bool = True) -> dict[str, dict]:
    """Made-up numbers, each one of its own."""
    ways = (ENLARGED, CLOSED_FORM, THIS_RUN, SHIPPED, FULL)
    speed = {
        BASE: {"tokens": 64, "parameters": 14_010_000, "seconds_per_picture": 1.25, "step_milliseconds": 31.0},
        SHIPPED: {"tokens": 64, "parameters": 14_020_000, "seconds_per_picture": 1.5, "step_milliseconds": 32.0},
        NATIVE: {"tokens": 256, "parameters": 14_010_000, "seconds_per_picture": 6.0, "step_milliseconds": 133.0},
    }
    return {
        "reconstruction": {
            name: {"psnr": 20.5 + i, "ssim": 0.8 + i / 50, "lpips": 0.3 - i / 20} for i, name in enumerate(ways)
        },
        "kid": {name: [0.0101 * (i + 1), 0.0011] for i, name in enumerate(MADE)} if kid else {},
        "speed": speed,
    }


def grid(label: str) -> ImageGrid:
    return ImageGrid(
        columns=["a", "b"], rows=[label], cells=[[torch.from_numpy(scene(1, 16)).permute(2, 0, 1), shade(9)]]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with the metrics of both stages."""
    for stage, names in (("stage1", ("l1", "lpips", "alignment")), ("stage2", ("base_loss", "detail_loss"))):
        lines = [{"step": step, **{name: 1.0 / (step + 1) for name in names}, "seconds": 0.1} for step in range(6)]
        lines.insert(0, {"step": 0, "heldout_psnr": 21.0})
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def page_of(folder: Path, known: dict[str, dict]) -> str:
    write_page(folder / "index.html", make_page(known, grid("red ball"), grid(NASTY), folder, PLAN, 7))
    return (folder / "index.html").read_text()


def test_the_page_says_every_number_with_its_count_and_seed(folder: Path) -> None:
    text = unescape(page_of(folder, facts()))
    assert f"{PLAN.stage_one_steps} steps of stage 1 and {PLAN.stage_two_steps} of stage 2" in text
    assert "+2.00 dB over base + bicubic" in text
    assert "4.0 times the speed of the base at 256 px" in text

    for expected in ("20.50", "24.50", "0.8800", "0.1000"):  # reconstruction
        assert expected in text
    for expected in ("14.02 M", "256</td>", "133</td>", "6.00</td>", "30.3 +- 1.1", "10.1 +- 1.1"):  # cost
        assert expected in text

    assert f"Means over {PLAN.heldout} held-out images at 256 px" in text
    assert f"KID (EfficientNet-Lite0) of {PLAN.generated} images" in text
    assert "seed 7" in text
    assert text.count("<svg") == 2  # one for each stage
    assert text.count('<table class="images"') == 2


def test_the_page_escapes_captions_and_runs_nothing(folder: Path) -> None:
    page = page_of(folder, facts())
    assert page.count("<script") == 1, "the viewer of images"
    assert "&lt;script&gt;alert(" in page
    assert NASTY in unescape(page)
    links = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)


def test_the_page_does_without_kid_where_the_extra_is_missing(folder: Path) -> None:
    text = page_of(folder, facts(kid=False))
    assert "+-" not in text
    assert "<td>-</td>" in text


def test_facts_survive_their_json(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", facts())
    assert page_of(folder, json.loads((tmp_path / "facts.json").read_text())) == page_of(folder, facts())
