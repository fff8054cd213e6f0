import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import Tensor

from davae.data.sources import open_pictures
from davae.demo.page import BASE, CLOSED_FORM, ENLARGED, FULL, NATIVE, SHIPPED, THIS_RUN, make_figure, make_page
from davae.demo.plan import PLANS
from davae.evaluation.report import ImageGrid, write_page
from davae.run.storage import write_json
from scenes import fill_with_scenes, scene

PLAN = PLANS["tiny"]
NASTY = "<script>alert('red & \"ball\"')</script>"

MADE = [THIS_RUN, SHIPPED, ENLARGED]


def shade(value: int) -> Tensor:
    return torch.full((3, 16, 16), value, dtype=torch.uint8)


def facts() -> dict[str, dict]:
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
        "generation": {
            name: {
                "kid": [0.0101 * (i + 1), 0.0011],
                "psnr": 21.25 + i,
                "ssim": 0.7,
                "lpips": 0.06 * (i + 1),
                "attributes": {"hair": 1.0, "skin": 0.75 + i / 10},
            }
            for i, name in enumerate(MADE)
        },
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
    assert f"{PLAN.stage_one_steps} steps of stage 1 and {PLAN.stage_two_steps} steps of stage 2" in text
    assert "KID 67 % below base + bicubic, LPIPS to the exact image 0.060 instead of 0.180" in text
    assert "4.0 times the speed of the base at 256 px" in text

    for expected in ("20.50", "24.50", "0.8800", "0.1000"):  # reconstruction
        assert expected in text
    for expected in ("256</td>", "133</td>", "6.00</td>", "30.3 +- 1.1", "10.1 +- 1.1"):  # cost, KID
        assert expected in text

    for expected in ("0.060", "21.25", "0.875", "0.925"):  # distances, and the mean share of attributes
        assert f"<td>{expected}</td>" in text

    assert f"Means over {PLAN.heldout} held-out images at 256 px" in text
    assert f"KID (EfficientNet-Lite0), LPIPS and PSNR of {PLAN.heldout} images" in text
    assert "seed 7" in text
    assert text.count("<svg") == 2  # one for each stage
    assert text.count('<table class="images"') == 2


def test_the_page_of_stage_2_alone_says_so_and_has_no_stage_1(folder: Path) -> None:
    known = facts()
    for name in (CLOSED_FORM, THIS_RUN):
        del known["reconstruction"][name]
    shutil.rmtree(folder / "stage1")
    plan = PLANS["short"]
    write_page(folder / "index.html", make_page(known, grid("red ball"), grid(NASTY), folder, plan, 7))
    text = unescape((folder / "index.html").read_text())
    assert f"{plan.stage_two_steps} steps of stage 2, with the autoencoder of the shipped upgrade, on this" in text
    assert "stage 1" not in text.lower()
    assert text.count("<svg") == 1


def test_the_page_escapes_captions_and_runs_nothing(folder: Path) -> None:
    page = page_of(folder, facts())
    assert page.count("<script") == 1, "the viewer of images"
    assert "&lt;script&gt;alert(" in page
    assert NASTY in unescape(page)
    links = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)


def test_facts_survive_their_json(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", facts())
    assert page_of(folder, json.loads((tmp_path / "facts.json").read_text())) == page_of(folder, facts())


def test_the_figure_has_one_row_for_each_prompt(tmp_path: Path) -> None:
    real = open_pictures(fill_with_scenes(tmp_path, train=6, held=2), size=64)
    made = {name: [shade(10 * index + place) for index in range(8)] for place, name in enumerate(MADE)}
    figure = make_figure(made, real, 4)
    assert list(figure.columns) == [ENLARGED, THIS_RUN, SHIPPED, "what the caption says"]
    assert list(figure.rows) == [real.captions[index] for index in (0, 2, 4, 6)]
    for row, index in zip(figure.cells, (0, 2, 4, 6), strict=True):
        assert [int(cell[0, 0, 0]) for cell in row[:3]] == [
            10 * index + MADE.index(name) for name in figure.columns[:3]
        ]
        assert torch.equal(row[3], real.image(index))
