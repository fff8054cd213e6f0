"""Model cards: read back as the Hub reads them."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from davae import assets
from davae.pipelines.publishing import CardPicture, find_licence, make_model_card, make_upgrade_card, write_card
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import write_cards
from hub_server import serving

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
    write_card(tmp_path, make_model_card(recipe, base=recipe.base, licence=find_licence(recipe.base), **FACTS))
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
    card = ModelCard(make_model_card(FinetuneRecipe(base="someone/kites"), base="someone/kites", licence={}, **FACTS))
    assert card.data.base_model == "someone/kites"
    assert card.data.license is None
    assert "Licence: see the base model" in card.text
    assert 'base = "someone/kites"' in card.text


@pytest.mark.parametrize(("card", "licence"), [(None, {}), ("without", {}), ("mit", {"license": "mit"})])
def test_the_licence_is_that_of_the_bases_card(card: str | None, licence: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    if card is not None:
        line = "" if card == "without" else f"license: {card}\n"
        (tmp_path / "base" / "README.md").write_text(f"---\ntags:\n- a\n{line}---\n# A base\n")
    assert find_licence(str(tmp_path / "base")) == licence


def test_a_licence_of_another_name_keeps_its_name_and_no_link_that_leads_nowhere(tmp_path: Path) -> None:
    card_in(tmp_path / "base", "other\nlicense_name: kite-community\nlicense_link: LICENSE.md")
    assert find_licence(str(tmp_path / "base")) == {"license": "other", "license_name": "kite-community"}
    card = ModelCard(make_upgrade_card(str(tmp_path / "base"), portable=False))
    assert (card.data.license, card.data.license_name) == ("other", "kite-community")
    assert "Licence: kite-community, the base model's." in card.text


def test_a_damaged_card_of_the_base_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [\n---\n")
    with caplog.at_level(logging.WARNING, logger="davae"):
        assert find_licence(str(tmp_path / "base")) == {}
    assert "the model card points to the base model" in caplog.text


def test_the_shipped_base_says_its_licence() -> None:
    assert find_licence(str(assets.base_pipeline())) == {"license": "apache-2.0"}


class Hub(BaseHTTPRequestHandler):
    """A Hub with one repository, which holds one card."""

    card = b"---\nlicense: other\nlicense_name: kite-community\nlicense_link: LICENSE.md\n---\n# Kites\n"
    commit = "0123456789012345678901234567890123456789"

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, *, with_content: bool) -> None:
        content = self.card
        if "/tree/" in self.path:
            content = json.dumps([{"type": "file", "path": "README.md", "size": len(self.card), "oid": "1"}]).encode()
        elif self.path.startswith("/api/models/"):
            facts = {"id": "someone/kites", "sha": self.commit, "siblings": [{"rfilename": "README.md"}]}
            content = json.dumps(facts).encode()
        is_there = "someone/kites" in self.path
        self.send_response(200 if is_there else 404)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", '"card"')
        self.send_header("Content-Length", str(len(content)) if is_there else "0")
        self.end_headers()
        if is_there and with_content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}"


def test_the_hub_is_asked_for_the_licence_of_a_base(hub: str, tmp_path: Path) -> None:
    code = """
import json
from davae.pipelines.publishing import find_licence
print(json.dumps([find_licence("someone/kites"), find_licence("someone/nothing")]))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    link = "https://huggingface.co/someone/kites/blob/main/LICENSE.md"
    expected = {"license": "other", "license_name": "kite-community", "license_link": link}
    assert json.loads(done.stdout) == [expected, {}]


def test_each_result_gets_its_own_card(tmp_path: Path) -> None:
    index = {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    recipe = FinetuneRecipe(pictures="data/kites", pictures_licence="CC0", size=64, validation_prompts=("red kite",))
    facts = {"base": "someone/kites", "metrics": {"base_loss": 0.5}, "counts": {"pictures": 3}}
    write_cards(tmp_path, recipe, **facts)

    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    (tmp_path / "adapter").mkdir()
    write_cards(tmp_path, recipe, **facts)
    pipeline, adapter = ((tmp_path / name / "README.md").read_text() for name in ("pipeline", "adapter"))

    assert 'load_pipeline("this folder", dtype=torch.bfloat16, device="cuda")' in pipeline
    assert 'load_pipeline("someone/kites", adapter="this folder", dtype=torch.bfloat16, device="cuda")' in adapter
    assert 'pipe("red kite", height=64, width=64).images[0]' in adapter
    assert "Data: 3 pictures of kites, licence CC0." in adapter
    assert "![" not in adapter


@pytest.mark.parametrize(
    ("transformer", "parts"),
    [
        ("DiTTransformer2DModel", ["pipe([0]).images[0]"]),
        ("ZImageTransformer2DModel", ['pipe("a prompt", height=256, width=256)', "# call it with height and width"]),
    ],
)
def test_the_call_in_a_card_is_that_of_the_backbone(transformer: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", transformer]}))
    write_cards(tmp_path, FinetuneRecipe(), base="someone/kites", metrics={}, counts={"pictures": 3})
    assert all(part in (tmp_path / "pipeline" / "README.md").read_text() for part in parts)


def test_a_picture_lies_beside_its_card(tmp_path: Path) -> None:
    Image.new("RGB", (5000, 10), (200, 30, 30)).save(tmp_path / "strip.png")
    picture = CardPicture(tmp_path / "strip.png", "Six kites")
    (tmp_path / "out").mkdir()
    facts = {**FACTS, "base": "someone/kites", "licence": {}, "picture": picture}
    text = make_model_card(FinetuneRecipe(), evaluation="| LPIPS |", **facts)
    write_card(tmp_path / "out", text, picture)

    assert "![Six kites](card.webp)" in text
    assert "## Evaluation\n\n| LPIPS |\n" in text
    with Image.open(tmp_path / "out" / "card.webp") as image:
        assert image.size == (4096, 8)
