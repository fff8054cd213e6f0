"""Settings of all tests (no network), and fixtures that take a moment to make: a tiny pair and its pictures, on disk.

Also `trials`, which some tests repeat with other random numbers: few in CI, many in `make soak`.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from trials import Trials

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--trials", type=int, default=None, help="Trials of each soak test, in place of its CI count.")
    parser.addoption("--part", type=float, default=1.0, help="Share of the trials of each soak test that is run.")
    parser.addoption("--trial", type=int, default=None, help="Replay the trial of this number alone.")
    parser.addoption("--seed", type=int, default=0, help="Seed of the trials' random choices.")
    parser.addoption("--soak", type=Path, default=None, help="Run the full counts, and write their table to this file.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--soak"):
        from trials import SoakTable

        config.pluginmanager.register(SoakTable(config))


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> "Trials":
    """The trials of a test that is marked `soak(promise, ci=..., full=...)`."""
    from trials import Trials

    return Trials(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    trials = getattr(item, "funcargs", {}).get("trials")
    if trials is not None and call.when == "call":
        report.user_properties += [("trials", trials.done), ("replay", trials.replay)]
        if report.failed:
            report.sections.append(("replay", trials.replay))
    if marker := item.get_closest_marker("soak"):
        report.user_properties.append(("promise", marker.args[0] if marker.args else ""))
    return report


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of 64 px to train on and 4 held out, captioned."""
    from scenes import fill_with_scenes

    return fill_with_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 pipeline: f4, 4 channels, 32 px, 16 tokens; wide enough to learn what a token holds."""
    import torch
    from diffusers import SD3Transformer2DModel

    from tiny import tiny_sd3_pipeline

    folder, pipeline = tmp_path_factory.mktemp("base"), tiny_sd3_pipeline()
    wider = {"num_attention_heads": 8, "caption_projection_dim": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        pipeline.transformer = SD3Transformer2DModel.from_config({**pipeline.transformer.config, **wider})
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, picture_folder: Path) -> Path:
    """An AutoencoderDA of that pipeline with 8 detail channels: the closed-form start, calibrated."""
    from davae.data.sources import open_pictures
    from davae.method.closed_form import fit_closed_form
    from davae.models.autoencoder_da import AutoencoderDA
    from davae.pipelines.autoencoders import load_base_vae

    folder = tmp_path_factory.mktemp("autoencoder")
    autoencoder = AutoencoderDA.from_base(load_base_vae(str(base_folder)), detail_channels=8).eval()
    pictures = open_pictures(picture_folder, size=64, split="train")
    images = pictures.batch(range(len(pictures)))
    fit_closed_form(autoencoder, images, metric_pictures=4)
    autoencoder.calibrate([images])
    autoencoder.save_pretrained(folder)
    return folder
