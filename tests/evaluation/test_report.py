"""The page: safe whatever the texts say, needs nothing beside it, shows the pictures bit for bit."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from davae.errors import StorageError
from davae.evaluation.report import Curves, ImageGrid, Report, Section, Series, Table, write_figure, write_page

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"


def picture(seed: int, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)


def hostile_report() -> Report:
    grid = ImageGrid([HOSTILE, "b"], [HOSTILE], [[picture(0), picture(1)]], notes=[HOSTILE, ""], caption=HOSTILE)
    curve = Curves([Series(HOSTILE, [0, 1, 2], [3.0, 2.0, 1.0])])
    contents = [grid, Table([HOSTILE, "n"], [[HOSTILE, HOSTILE]], HOSTILE), curve, None]
    return Report(HOSTILE, HOSTILE, [Section(HOSTILE, HOSTILE, content) for content in contents], footer=HOSTILE)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        if tag not in {"meta", "img", "br", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_texts_are_escaped_and_tags_balance(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", hostile_report())
    text = (tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert text.count("<script>") == 1, "the page's own viewer"
    digest = base64.b64encode(
        hashlib.sha256(text.split("<script>")[1].split("</script>")[0].encode()).digest()
    ).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "&lt;script&gt;" in text


def test_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", hostile_report())
    tags = Tags()
    tags.feed((tmp_path / "page.html").read_text())
    sources = [value for name, value in tags.attributes if name in {"src", "href", "srcset"}]
    assert sources
    assert all(value.startswith(("data:image/", "#")) for value in sources)


def test_pictures_are_shown_bit_for_bit(tmp_path: Path) -> None:
    shown = [picture(1, 32), picture(2, 16)]
    write_page(tmp_path / "page.html", Report("t", "l", [Section("s", "", ImageGrid(["a", "b"], ["r"], [shown]))]))
    urls = re.findall(r'src="data:image/webp;base64,([^"]+)"', (tmp_path / "page.html").read_text())
    assert len(urls) == 2
    for data, original in zip(urls, shown, strict=True):
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        assert torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), original)


def test_large_pictures_are_embedded_at_quality_90_and_files_are_linked(tmp_path: Path) -> None:
    large = picture(1, 520)
    grid = ImageGrid(["a b", "c"], ["r"], [[large, large]], files=[[Path("my pictures/0#.png"), None]])
    write_page(tmp_path / "page.html", Report("t", "l", [Section("s", "", grid)]))
    text = (tmp_path / "page.html").read_text()
    assert text.count('href="my%20pictures/0%23.png"') == text.count('src="my%20pictures/0%23.png"') == 1
    (data,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    assert pixels.shape == (520, 520, 3)
    assert not torch.equal(torch.from_numpy(pixels).permute(2, 0, 1), large)
    assert len(data) < large.numel()


def test_a_page_without_pictures_runs_nothing(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", Report("t", "l", [Section("s", "", Table(["a"], [["b"]]))]))
    assert "script" not in (tmp_path / "page.html").read_text()


def test_figure_contains_the_pictures_pixel_for_pixel(tmp_path: Path) -> None:
    big, small = picture(3, 32), picture(4, 16)
    write_figure(tmp_path / "figure.png", ImageGrid(["a", "b"], ["r"], [[big, small]]), title="title")
    figure = torch.from_numpy(np.array(Image.open(tmp_path / "figure.png"))).permute(2, 0, 1)
    doubled = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for expected in (big, doubled):
        windows = figure.unfold(1, 32, 1).unfold(2, 32, 1)  # [3, y, x, 32, 32]
        assert (windows == expected[:, None, None]).all(-1).all(-1).all(0).any()


def test_same_report_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page(tmp_path / name, hostile_report())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_curves_survive_few_points(tmp_path: Path) -> None:
    series = [Series("none", [], []), Series("one", [0], [1.0]), Series("same", [0, 1], [1.0, 1.0])]
    write_page(tmp_path / "page.html", Report("t", "l", [Section("s", "", Curves(series, smoothing=20))]))
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ImageGrid(["a", "b"], ["r"], [[picture(0)]])


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()  # a folder where the file should be
    with pytest.raises(StorageError, match=r"page\.html"):
        write_page(tmp_path / "page.html", hostile_report())
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
