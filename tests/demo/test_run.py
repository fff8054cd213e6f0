from dataclasses import asdict
from pathlib import Path

import pytest

from davae import assets
from davae.demo.page import ENLARGED, FULL, SHIPPED
from davae.demo.plan import PLANS, stage_one_recipe, stage_two_recipe
from davae.demo.prompts import SIZE
from davae.demo.run import _check_settings, _once, load_ways, run_demo
from davae.errors import SettingsError
from davae.pipelines.autoencoders import load_autoencoder, load_base_vae
from davae.run.recipe import load_recipe
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe

PLAN = PLANS["tiny"]


@pytest.mark.parametrize("name", PLANS)
def test_a_budget_is_enough_for_what_the_page_shows(name: str) -> None:
    plan = PLANS[name]
    assert 0 < plan.shown <= plan.heldout
    assert plan.heldout >= 4  # the error of KID is taken over halves, and four are shown in the gallery
    assert min(value for name, value in asdict(plan).items() if name != "stage_one_steps") > 0


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan.stage_one_steps])
def test_recipes_are_valid_and_follow_budget_and_seed(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    places = (tmp_path / "images", tmp_path / "base")
    one, two = stage_one_recipe(plan, 5, *places), stage_two_recipe(plan, 5, *places, tmp_path / "autoencoder")
    for recipe, cls in ((one, AutoencoderRecipe), (two, FinetuneRecipe)):
        (tmp_path / "recipe.toml").write_text(recipe.to_toml())
        assert load_recipe(cls, tmp_path / "recipe.toml") == recipe
        assert recipe.seed == 5
        assert recipe.size == SIZE
        assert (recipe.pictures, recipe.base) == tuple(map(str, places))

    assert (one.steps, two.steps) == (plan.stage_one_steps, plan.stage_two_steps)
    assert one.crop % 16 == 0
    assert one.start == "closed form"
    assert two.autoencoder == str(tmp_path / "autoencoder")
    assert 0 < two.detail_warmup_steps < two.steps, "the detail loss gets its full weight within the run"


def test_without_a_stage_1_stage_2_trains_on_the_shipped_autoencoder(tmp_path: Path) -> None:
    recipe = stage_two_recipe(PLANS["short"], 0, tmp_path, assets.base_pipeline(), assets.upgrade())
    assert load_autoencoder(Path(recipe.autoencoder), base=load_base_vae(recipe.base)).detail_mean.numel() > 0
    ways = load_ways(assets.base_pipeline(), tmp_path / "stage1", assets.upgrade())
    assert list(ways) == [ENLARGED, SHIPPED, FULL]


def test_an_unknown_budget_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"budget='huge': allowed are tiny, short, both"):
        run_demo(tmp_path / "run", "huge")
    assert not (tmp_path / "run").exists()


def test_a_folder_goes_on_with_its_own_settings_and_refuses_others(tmp_path: Path) -> None:
    settings = {"budget": "tiny", **asdict(PLAN), "seed": 0}
    _check_settings(tmp_path / "run", settings)
    before = (tmp_path / "run" / "settings.json").read_bytes()
    _check_settings(tmp_path / "run", dict(settings))

    for changes in ({"seed": 1}, {"budget": "short"}, {"heldout": 9}):
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
