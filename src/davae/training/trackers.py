"""Where a run's metrics are shown beside metrics.jsonl: TensorBoard, W&B, trackio, all as accelerate speaks to them."""

import hashlib
import importlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from jaxtyping import UInt8
from torch import Tensor

from davae.errors import SettingsError

TRACKERS: dict[str, type[GeneralTracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "trackio": TrackioTracker,
}
"""By the name of the package, which is davae's extra, too."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there, before anything is done.

    Raises:
        SettingsError: an unknown one, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(f"--report-to {name}: allowed are {', '.join(TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SettingsError(f"--report-to {name}: {error}. Install it: pip install 'davae[{name}]'") from error


def start_trackers(names: Sequence[str], folder: Path, *, step: int) -> list[GeneralTracker]:
    """Trackers of the run in `folder`, which go on at `step` with what they were told at its earlier starts.

    Of several ranks only the first may have any.

    TensorBoard's files go to `folder`/tensorboard; the others call the project "davae" and the run as its folder.
    """
    check_trackers(names)
    text = (folder / "recipe.toml").read_text(encoding="utf-8") if (folder / "recipe.toml").is_file() else ""
    started: list[GeneralTracker] = []
    for name in names:
        run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        settings: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step},
            "wandb": {"run_name": "davae", "name": folder.name, "id": run, "resume": "allow", "dir": folder},
            "trackio": {"run_name": "davae", "name": folder.name, "resume": "allow"},
        }
        tracker = TRACKERS[name](**settings[name])
        tracker.start()
        if name == "tensorboard":  # its table of hyper-parameters is another run in its list
            tracker.tracker.add_text("recipe", f"```toml\n{text}```", step)
        else:
            tracker.store_init_configuration(tomllib.loads(text))
        started.append(tracker)
    return started


def show_picture(trackers: Sequence[GeneralTracker], name: str, picture: UInt8[Tensor, "3 h w"], *, step: int) -> None:
    """Show a picture to those trackers that take any."""
    batch = picture.permute(1, 2, 0).unsqueeze(0).numpy()
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: batch}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: batch}, step=step)
