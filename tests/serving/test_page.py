"""`davae serve --ui` in a real browser; skipped where there is none.

DAVAE_SCREENSHOTS names a folder for screenshots.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from server_process import ServerProcess, save_tiny_pair, traversal_probes

pytest.importorskip("gradio", reason="the extra `ui` is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
    pytest.mark.timeout(900),
]
SWITCHES = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
PATIENCE = 300
"""Seconds, for a busy machine."""
NOT_YET = (
    NoSuchElementException,
    StaleElementReferenceException,
    ElementNotInteractableException,
    ElementClickInterceptedException,
)
"""What a page says of a part that it still builds, or builds anew."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    base, upgraded = save_tiny_pair(tmp_path_factory.mktemp("pair"), sees_detail=True)
    settings = ["--prompt-tokens", "32", "--steps", "8", "--max-steps", "2000", "--port", "0", "--device", "cpu"]
    server = ServerProcess(str(upgraded), "--base", str(base), "--ui", *settings)
    yield server.wait_until_ready()
    assert server.end() == -signal.SIGTERM


@pytest.fixture(scope="module")
def browser(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    options = Options()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("chromium")
    for switch in [*SWITCHES.split(), "disable-component-update", "window-size=1280,1100", f"user-data-dir={folder}"]:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(PATIENCE)
    browser.set_script_timeout(PATIENCE)
    yield browser
    browser.quit()


@pytest.fixture(autouse=True)
def fresh_page(browser: WebDriver, server: ServerProcess) -> None:
    open_page(browser, server)


def open_page(browser: WebDriver, server: ServerProcess) -> None:
    browser.get(f"http://127.0.0.1:{server.port}/ui/")
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#prompt textarea, #prompt input"))


def wait(condition: Callable[[], object]) -> object:
    """What the condition gives, once it is true."""
    return WebDriverWait(None, PATIENCE, 0.05, NOT_YET).until(lambda _: condition(), "the page does not come to it")


def fill(browser: WebDriver, name: str, text: str) -> None:
    def filled() -> bool:
        field = browser.find_element(By.CSS_SELECTOR, f"#{name} textarea, #{name} input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)
        return field.get_attribute("value") == text

    wait(filled)


def click(browser: WebDriver, selector: str) -> None:
    wait(lambda: browser.find_element(By.CSS_SELECTOR, selector).click() is None)


def start(browser: WebDriver, prompt: str, seed: str, steps: str = "8") -> None:
    fill(browser, "prompt", prompt)
    fill(browser, "seed", seed)
    fill(browser, "steps", steps)
    click(browser, "#generate")


def statuses(browser: WebDriver) -> list[str]:
    """The lines of the open tab."""
    fields = browser.find_elements(By.CSS_SELECTOR, ".status textarea, .status input")
    return [str(field.get_attribute("value")) for field in fields if field.is_displayed()]


def all_say(browser: WebDriver, text: str) -> bool:
    """Whether all lines of the open tab have this text."""
    lines = statuses(browser)
    return bool(lines) and all(text in line for line in lines)


def sizes(browser: WebDriver) -> list[tuple[int, int]]:
    """Of the images in the open tab, once they are loaded; those of the comparison come last."""
    images = [image for image in browser.find_elements(By.CSS_SELECTOR, "img") if image.is_displayed()]
    return [(int(image.get_property("naturalWidth")), int(image.get_property("naturalHeight"))) for image in images]


def screenshot(browser: WebDriver, name: str) -> None:
    if folder := os.environ.get("DAVAE_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_type_generate_and_compare(browser: WebDriver) -> None:
    start(browser, "red apple", "7", steps="20")
    wait(lambda: all_say(browser, "seed 7"))
    assert [text.split(",")[0] for text in statuses(browser)] == ["32x32 px", "64x64 px"]
    wait(lambda: sizes(browser) == [(32, 32), (64, 64), (64, 64), (64, 64)])
    screenshot(browser, "generated")

    # Between the halves of the comparison is a handle that the pointer moves.
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    screenshot(browser, "compared")


def test_previews_come_before_the_images(browser: WebDriver) -> None:
    start(browser, "red apple", "", steps="1000")
    wait(lambda: (32, 32) in sizes(browser))  # by the base's decoder, at half the size
    screenshot(browser, "preview")
    assert not any("seed" in text for text in statuses(browser))
    click(browser, "#cancel")
    wait(lambda: all_say(browser, "cancelled"))


def test_cancelled_images_vanish(browser: WebDriver, server: ServerProcess) -> None:
    images = server.metric("davae_images_total")
    start(browser, "red apple", "1", steps="2000")
    wait(lambda: any("step" in text for text in statuses(browser)))
    click(browser, "#cancel")
    wait(lambda: all_say(browser, "cancelled"))
    wait(lambda: sizes(browser) == [])
    screenshot(browser, "cancelled")
    server.wait_for("davae_queue", 0)
    assert server.metric("davae_images_total") == images


def test_a_closed_page_cancels_its_images(browser: WebDriver, server: ServerProcess) -> None:
    stopped = server.metric("davae_stopped_batches_total")
    start(browser, "red apple", "1", steps="2000")
    wait(lambda: any("step" in text for text in statuses(browser)))
    browser.get("about:blank")
    wait(lambda: server.metric("davae_stopped_batches_total") > stopped)
    server.wait_for("davae_queue", 0)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [("seed", "seven", "seed 'seven'"), ("size", "63x64", "multiples of"), ("steps", "2001", "allows 2000")],
)
def test_what_is_not_allowed_is_said_where_the_images_would_be(
    browser: WebDriver, field: str, text: str, message: str
) -> None:
    fill(browser, "prompt", "red apple")
    fill(browser, field, text)
    click(browser, "#generate")
    wait(lambda: all_say(browser, message))


def test_markup_in_a_prompt_is_text(browser: WebDriver) -> None:
    start(browser, "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>", "3")
    wait(lambda: all_say(browser, "seed 3"))
    assert browser.execute_script("return window.hacked") is None


def test_two_users_at_once_see_their_own_images(browser: WebDriver, server: ServerProcess) -> None:
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        open_page(browser, server)
        start(browser, "a pear", "22", steps="20")
        browser.switch_to.window(first)
        start(browser, "red apple", "11", steps="20")
        wait(lambda: all_say(browser, "seed 11"))
        browser.switch_to.window(browser.window_handles[-1])
        wait(lambda: all_say(browser, "seed 22"))
    finally:
        browser.close()
        browser.switch_to.window(first)


def test_a_picture_is_reconstructed_and_a_bad_file_refused(browser: WebDriver, tmp_path: Path) -> None:
    def tab_is_open() -> bool:
        tabs = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        shown = [tab for tab in tabs if tab.is_displayed() and "Reconstruct" in tab.text]
        return bool(shown) and shown[0].click() is None

    wait(tab_is_open)
    bad, good = tmp_path / "bad.png", tmp_path / "good.png"
    bad.write_text("<script>no picture</script>")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)).save(good)

    upload(browser, bad)
    wait(lambda: any("not of a format" in text for text in statuses(browser)))
    screenshot(browser, "refused")
    click(browser, "#picture button[aria-label*='lear'], #picture button[aria-label*='emove']")
    upload(browser, good)
    wait(lambda: any("64x40 px" in text and "strength 1" in text for text in statuses(browser)))
    wait(lambda: sizes(browser) == [(64, 40)] * 4)
    screenshot(browser, "reconstructed")
    base, _, joint = shown_pixels(browser)
    assert base != joint

    # Without detail, both halves together show what the base half does.
    number = browser.find_element(By.CSS_SELECTOR, "#strength input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("0", Keys.TAB)
    wait(lambda: any("strength 0" in text for text in statuses(browser)))
    wait(lambda: shown_pixels(browser)[2] == base)


def shown_pixels(browser: WebDriver) -> list[list[int]]:
    """Of the last three images in the open tab: base half, detail, both."""
    images = [image for image in browser.find_elements(By.CSS_SELECTOR, "img") if image.is_displayed()]
    return [fetch(browser, str(image.get_attribute("src"))) for image in images[-3:]]


def upload(browser: WebDriver, path: Path) -> None:
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(path))


def fetch(browser: WebDriver, source: str) -> list[int]:
    """The pixels of an image as the browser has them."""
    program = """
    const [source, done] = arguments, image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
      [canvas.width, canvas.height] = [image.width, image.height];
      context.drawImage(image, 0, 0);
      done(Array.from(context.getImageData(0, 0, image.width, image.height).data));
    };
    image.src = source;
    """
    return browser.execute_async_script(program, source)


def test_the_page_asks_only_this_server(browser: WebDriver) -> None:
    """No fonts, counters or scripts of others; the log has all that was asked for since the last test read it."""
    asked = set()
    for line in browser.get_log("performance"):
        message = json.loads(line["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = urlsplit(message["params"]["request"]["url"])
            if address.scheme in ("http", "https", "ws", "wss"):
                asked.add(address.hostname)
    assert asked == {"127.0.0.1"}


def test_the_page_serves_no_files_but_its_own(server: ServerProcess) -> None:
    for probe in traversal_probes():
        for start in ("/ui", "/ui/gradio_api/file=", "/ui/static", "/ui/assets"):
            status, answer = server.get(f"{start}{probe}")
            assert status in (400, 403, 404, 405, 422) or b"<!doctype html>" in answer[:100].lower(), f"{start}{probe}"
            assert b"root:" not in answer, f"{start}{probe}"
            assert b"PATH=" not in answer, f"{start}{probe}"


def test_a_large_upload_is_refused(server: ServerProcess) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"x" * 21_000_000
    assert server.request("POST", "/ui/gradio_api/upload", body + b"\r\n--x--\r\n", headers)[0] == 413
