"""Model cards: read back as the Hub reads them."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from davae import assets
from davae.pipelines.publishing import make_model_card, read_licence, write_card
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import write_cards

FACTS = {
    "usage": 'load_pipeline("this folder")',
    "data": "12 pictures of kites",
    "metrics": {"base_loss": 0.123456, "detail_loss": None},
    "counts": {"pictures": 12},
}


def card_in(base: Path, licence: str | None) -> None:
    base.mkdir()
    said = "" if licence is None else f"license: {licence}\n"
    (base / "README.md").write_text(f"---\ntags:\n- a\n{said}---\n# A base\n")


def test_a_card_says_what_the_result_was_made_from_and_with(tmp_path: Path) -> None:
    card_in(tmp_path / "kite-base", "openrail++")
    recipe = FinetuneRecipe(base=str(tmp_path / "kite-base"), pictures=str(tmp_path / "kites"), lora_rank=7)
    write_card(tmp_path, make_model_card(recipe, base=recipe.base, **FACTS))
    card = ModelCard.load(tmp_path / "README.md")

    assert card.data.license == "openrail++"
    assert card.data.library_name == "diffusers"
    assert card.data.base_model is None, "a folder of this machine is no model of the Hub"

    text = re.sub(" +", " ", card.text)  # tables are aligned
    parts = ("Base model: kite-base.", "openrail++", "12 pictures of kites", "lora_rank = 7", "Command: `")
    for part in (*parts, "| base loss | 0.1235 |", "| detail loss | - |"):
        assert part in text
    assert str(tmp_path) not in card.content


def test_a_base_on_the_hub_is_named_and_its_licence_left_to_it() -> None:
    card = ModelCard(make_model_card(FinetuneRecipe(base="someone/kites"), base="someone/kites", **FACTS))
    assert card.data.base_model == "someone/kites"
    assert card.data.license is None
    assert "Licence: see the base model" in card.text
    assert 'base = "someone/kites"' in card.text


@pytest.mark.parametrize(("card", "licence"), [(None, None), ("without", None), ("mit", "mit")])
def test_the_licence_is_that_of_the_bases_card(card: str | None, licence: str | None, tmp_path: Path) -> None:
    if card is not None:
        card_in(tmp_path / "base", licence)
    assert read_licence(tmp_path / "base") == licence


def test_the_shipped_base_says_its_licence() -> None:
    assert read_licence(assets.base_pipeline()) == "apache-2.0"


def test_each_result_gets_its_own_card(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    facts = {"base": "someone/kites", "metrics": {"base_loss": 0.5}, "counts": {"pictures": 3}}
    write_cards(tmp_path, FinetuneRecipe(), **facts)

    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    (tmp_path / "adapter").mkdir()
    write_cards(tmp_path, FinetuneRecipe(), **facts)
    pipeline, adapter = ((tmp_path / name / "README.md").read_text() for name in ("pipeline", "adapter"))

    assert 'load_pipeline("this folder")' in pipeline
    assert 'load_pipeline("someone/kites", adapter="this folder")' in adapter
    assert "3 pictures of the set that davae ships" in adapter
