"""Pages in a real browser: wide and narrow, light and dark; contrast, texts for images, the viewer by keyboard."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from browser import CHROMIUM, Browser, browser
from davae.data.pictures import write_png
from davae.evaluation.report import Curves, Gallery, GalleryItem, ImageGrid, Report, Section, Series, Table, write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

SCREENS = {"wide": 1280, "phone": 390}
CONTRAST = """
(() => {
  const numbers = (colour) => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = numbers(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("svg, script, option")) continue;
    const [first, second] = [light(numbers(getComputedStyle(element).color)), light(behind(element))];
    const ratio = (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 80)}`);
  }
  return poor;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one of everything."""
    folder = tmp_path_factory.mktemp("page")
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    items = []
    for index, image in enumerate(images):
        write_png(folder / f"{index}.png", image)
        items.append(GalleryItem(image, f"prompt {index}", "seed 0", f"davae generate {index}", Path(f"{index}.png")))
    grid = ImageGrid(
        ["base", "made", "real"], ["a ball", "a box"], [list(images), list(images.flip(0))], caption="Rows."
    )
    wide = Table(["", *"abcdefgh"], [["a long name of a row", *["12.34 +- 0.56"] * 8]], "Numbers.")
    curves = Curves([Series("loss", [0, 1, 2], [3.0, 2.0, 1.0])])
    contents = {"Numbers": wide, "Images": grid, "Gallery": Gallery(items), "Curves": curves}
    sections = [Section(heading, "Words.", content) for heading, content in contents.items()]
    write_page(folder / "index.html", Report("Title", "Lead.", sections, footer="Made by davae."))
    return folder / "index.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_can_be_read(screen: str, dark: bool, tab: Browser, page: Path) -> None:
    width = SCREENS[screen]
    tab.show(page, width=width, dark=dark)
    assert tab.run(CONTRAST) == []
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("[...document.querySelectorAll('main img')].filter(image => !image.alt).length") == 0
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 22, 21)" if dark else "rgb(255, 255, 255)")

    # All images are there once they are seen, and a phone shows one in a row.
    loaded = (
        "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.src && i.decode(); })).then(() => 1)"
    )
    assert tab.run(loaded) == 1
    lefts = tab.run("[...document.querySelectorAll('main img')].map(i => Math.round(i.getBoundingClientRect().left))")
    assert len(lefts) == 9
    assert (len(set(lefts)) == 1) == (screen == "phone")
    if screen == "phone":
        small = (
            "[...document.querySelectorAll('button')].filter(b => b.checkVisibility() && b.offsetHeight < 40).length"
        )
        assert tab.run(small) == 0


def test_the_viewer_compares_by_keyboard(tab: Browser, page: Path) -> None:
    tab.show(page, width=1280)
    tab.run("document.querySelector('.compare').click()")
    assert tab.run("document.querySelector('.viewer').open")
    assert tab.run("document.querySelector('.names').textContent") == "made | real"
    assert tab.run("document.activeElement.type") == "range"
    before = tab.run("getComputedStyle(document.querySelector('.over')).clipPath")
    tab.press("ArrowRight")
    assert tab.run("document.querySelector('.cut input').value") == "51"
    assert tab.run("getComputedStyle(document.querySelector('.over')).clipPath") != before

    # 1:1 is one pixel of the image for each of the screen, of both images at once.
    tab.press("z")
    widths = tab.run("[...document.querySelectorAll('.stack img')].map(image => image.getBoundingClientRect().width)")
    assert widths == [96, 96]
    assert tab.run("document.querySelector('.zoom').getAttribute('aria-pressed')") == "true"
    assert tab.run(CONTRAST) == []
    tab.press("Escape")
    assert not tab.run("document.querySelector('.viewer').open")


def test_a_click_shows_an_image_at_full_size_and_copies_are_whole(tab: Browser, page: Path) -> None:
    tab.show(page, width=1280)
    tab.run("document.querySelector('.gallery .full').click()")
    assert tab.run("document.querySelector('.over').src").endswith("/0.png")
    assert not tab.run("document.querySelector('.cut').checkVisibility()")
    texts = tab.run("[...document.querySelectorAll('.copy')].map(button => button.dataset.text)")
    assert texts[:2] == ["prompt 0", "davae generate 0"]


def test_nothing_but_the_viewer_runs(tab: Browser, page: Path, tmp_path: Path) -> None:
    """A text that gets past the escaping would still not run."""
    hostile = page.read_text().replace(
        "Lead.", "<script>document.title = 'owned'</script><img src=x onerror=\"owned()\">"
    )
    (tmp_path / "hostile.html").write_text(hostile)
    tab.show(tmp_path / "hostile.html", width=1280)
    assert tab.run("document.title") == "Title"
