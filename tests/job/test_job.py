"""A whole job on a tiny base and a dozen drawn images: `davae init`, then `davae run`, killed twice on the way."""

import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from davae.errors import CheckpointError, SettingsError
from davae.job.recipe import load_job
from davae.job.run import run_job
from davae.job.start import start_job
from davae.job.steps import STEPS, choose_shown
from davae.run import faults
from davae.run.record import read_metrics
from forks import exit_code, forked

TINY = {
    **{f"autoencoder.{name}": value for name, value in {"steps": 4, "batch_size": 2, "evaluate_every": 2}.items()},
    **{"finetune.steps": 4, "finetune.batch_size": 2, "finetune.validation_every": 2, "finetune.validation_steps": 2},
    **{"results.count": 4, "results.steps": 2, "results.prompts": ["blue tree"]},
    **{"autoencoder.checkpoint_every": 1, "finetune.checkpoint_every": 1},
    **{"autoencoder.fit_pictures": 4, "finetune.prompt_tokens": 8, "finetune.pictures_licence": "CC0"},
}


class Page(HTMLParser):
    """The pictures, links and words of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def recipe_file(base_folder: Path, picture_folder: Path, tmp_path_factory) -> Path:
    """What `davae init` writes for random weights, which render nothing."""
    path = tmp_path_factory.mktemp("init") / "mine.toml"
    settings = {"memory": "24GB", "hours": None, "size": 64}
    with pytest.raises(SettingsError, match=r"own autoencoder cannot render these images: .* choose a base"):
        start_job(str(base_folder), str(picture_folder), path, **settings, force=False)
    assert not path.exists()

    start = start_job(str(base_folder), str(picture_folder), path, **settings, force=True)
    assert "16 usable, 12 of them to train on" in start.to_text()
    assert all(name in start.lines for name in ("base", "images", "autoencoder", "machine", "steps", "takes", "recipe"))
    assert any("cannot render" in warning for warning in start.warnings)
    with pytest.raises(SettingsError, match="is there already, and is not written over"):
        start_job(str(base_folder), str(picture_folder), path, **settings, force=True)
    return path


@pytest.fixture(scope="module")
def job_folder(recipe_file: Path, tmp_path_factory) -> Path:
    """Killed once in each stage, then run to the end by the same call."""
    folder = tmp_path_factory.mktemp("job") / "run"
    program = partial(run_job, load_job(recipe_file, folder, TINY), folder)

    def killed_at(fault: str) -> int:
        def run() -> None:
            faults.arm(fault)
            program()

        return exit_code(forked(run))

    # At a validation of stage 1, then at the third step of stage 2, whose trial is over.
    assert killed_at("eval:kill:2") == -9
    assert list(read_steps(folder)) == ["inspect"]
    assert "running" in Page(folder / "index.html").words
    assert killed_at("text:kill:5") == -9
    assert list(read_steps(folder)) == ["inspect", "stage 1", "caches", "upgrade"]
    assert (folder / "finetune" / "checkpoints").is_dir()

    assert program() == folder / "index.html"
    return folder


def read_steps(folder: Path) -> dict:
    return json.loads((folder / "job.json").read_text())["steps"]


def test_the_recipe_is_commented_and_holds_both_stages_with_validation(recipe_file: Path, tmp_path: Path) -> None:
    job = load_job(recipe_file, tmp_path)
    assert (job.stage_one.size, job.stage_two.size, job.results.size) == (64, 64, 64)
    assert job.stage_two.autoencoder == str(tmp_path / "autoencoder" / "autoencoder")
    assert job.stage_one.evaluate_every < job.stage_one.steps
    assert 0 < job.stage_two.validation_every < job.stage_two.steps
    text = recipe_file.read_text()
    assert text.count("  # ") > 10
    assert f"davae run {recipe_file}" in text


def test_a_job_ends_with_all_steps_done_in_their_order(job_folder: Path) -> None:
    assert list(read_steps(job_folder)) == list(STEPS)
    assert all((job_folder / step.leaves).exists() for step in STEPS.values())
    assert not (job_folder / "trial").exists()
    for stage in ("autoencoder", "finetune"):
        steps = [line["step"] for line in read_metrics(job_folder / stage / "metrics.jsonl") if "loss" in line]
        assert steps == sorted(set(steps))


@pytest.mark.parametrize("result", ["pipeline", "adapter"])
def test_the_card_shows_images_numbers_and_data(job_folder: Path, result: str) -> None:
    card = (job_folder / "finetune" / result / "README.md").read_text()
    assert "![The base enlarged with bicubic, and the upgrade" in card
    with Image.open(job_folder / "finetune" / result / "card.webp") as picture:
        assert picture.height > 3 * 64, "three rows of images"
    assert "Reconstructions of 4 held-out images." in card
    for row in ("base, enlarged", "upgrade", "base at full size"):
        assert f"| {row} " in card
    assert re.search(r"Data: \d+ pictures of \w+, licence CC0\.", card)
    assert 'load_pipeline("' in card
    assert "dtype=torch.bfloat16" in card


def test_the_page_shows_every_step_and_all_its_pictures_are_there(job_folder: Path) -> None:
    page = Page(job_folder / "index.html")
    assert all(f"{name}: {step.purpose}" in page.words for name, step in STEPS.items())
    assert "Finished" in page.words
    assert "dB on 4 held-out images" in page.words
    assert 'http-equiv="refresh"' not in (job_folder / "index.html").read_text()

    # Three of each stage's validations, five rows of base and upgrade, four real images.
    assert all(picture["alt"] for picture in page.pictures)
    names = [str(picture["src"]) for picture in page.pictures]
    assert sum("autoencoder/pictures" in name for name in names) == 3
    assert sum("finetune/pictures" in name for name in names) == 3
    assert [sum(f"-{kind}.png" in name for name in names) for kind in ("base", "upgrade", "real")] == [5, 5, 4]
    for link in page.links:
        assert (job_folder / link.partition("?")[0]).is_file(), link


def test_a_finished_job_is_not_done_again(recipe_file: Path, job_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in job_folder.rglob("*") if path.name != ".lock"}
    run_job(load_job(recipe_file, job_folder, TINY), job_folder)
    changed = [path.name for path, time in before.items() if path.is_file() and path.stat().st_mtime_ns != time]
    assert set(changed) <= {"job.json", "index.html"}


@pytest.mark.parametrize("change", [{"autoencoder.learning_rate": 1e-3}, {"finetune.lora_rank": 3}, {"seed": 1}])
def test_a_finished_job_is_not_replaced_by_another(recipe_file: Path, job_folder: Path, change: dict) -> None:
    before = (job_folder / "job.json").read_bytes()
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        run_job(load_job(recipe_file, job_folder, {**TINY, **change}), job_folder)
    assert (job_folder / "job.json").read_bytes() == before


def test_a_page_of_something_else_is_not_written_over(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(SettingsError, match="not of a job"):
        run_job(load_job(recipe_file, tmp_path, TINY), tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"


def test_a_step_whose_result_is_gone_is_done_again(recipe_file: Path, job_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(job_folder, tmp_path / "run", symlinks=True)
    (folder / "inspection.json").unlink()
    run_job(load_job(recipe_file, folder, TINY), folder)
    assert (folder / "inspection.json").is_file()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps = 3\n", {}, r"no section \[autoencoder\], and davae run goes through both stages"),
        ("[autoencoder]\n", {}, r"no section \[finetune\]"),
        ("[autoencoder]\n[finetune]\n[result]\n", {}, r"unknown section \[result\]: did you mean \[results\]"),
        ("[autoencoder]\n[finetune]\n[results]\ncount = 1\n", {}, "count"),
        ("[autoencoder]\n[finetune]\n", {"steps": 3}, r"--set steps: give \[SECTION.\]KEY"),
    ],
)
def test_mistakes_in_a_job_are_named(tmp_path: Path, text: str, overrides: dict, message: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_job(tmp_path / "job.toml", tmp_path, overrides)


def test_a_job_without_results_draws_as_its_validation(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('seed = 3\n[autoencoder]\n[finetune]\nvalidation_prompts = ["a"]\n')
    job = load_job(tmp_path / "job.toml", tmp_path, {"size": 128, "finetune.validation_steps": 5})
    assert (job.results.prompts, job.results.steps, job.results.seed, job.results.size) == (("a",), 5, 3, 128)
    assert job.stage_one.size == 128


def test_shown_images_are_spread_over_the_captions() -> None:
    assert choose_shown(4, 4) == [0, 1, 2, 3]
    assert choose_shown(18, 16) == [0, 2, 5, 8, 10, 13, 16, 17]
