"""Trackers that show a run's metrics beside metrics.jsonl: TensorBoard, W&B, trackio, by way of accelerate."""

import hashlib
import importlib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from jaxtyping import UInt8
from torch import Tensor

from davae.errors import SettingsError

Notify = Callable[[], object]
"""Called after every validation."""

TRACKERS: dict[str, type[GeneralTracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "trackio": TrackioTracker,
}
"""By the name of the package, which is the name of davae's extra, too."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(f"--report-to {name}: allowed are {', '.join(TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SettingsError(f"--report-to {name}: {error}. Install it: pip install 'davae[{name}]'") from error


def start_trackers(names: Sequence[str], folder: Path, *, step: int) -> list[GeneralTracker]:
    """Trackers of the run in `folder`, which go on at `step` with what they were told before; for rank 0.

    TensorBoard's files go to `folder`/tensorboard; the others call the project "davae" and the run as its folder.
    """
    recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
    run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": folder, "purge_step": step},
        "wandb": {"run_name": "davae", "name": folder.name, "id": run, "resume": "allow", "dir": folder},
        "trackio": {"run_name": "davae", "name": folder.name, "resume": "allow"},
    }

    trackers: list[GeneralTracker] = []
    for name in names:
        tracker = TRACKERS[name](**settings[name])
        tracker.start()
        if name == "tensorboard":
            # As text: TensorBoard lists its table of hyper-parameters as another run.
            tracker.tracker.add_text("recipe", f"```toml\n{recipe}```", step)
        else:
            tracker.store_init_configuration(tomllib.loads(recipe))
        trackers.append(tracker)
    return trackers


def show_picture(trackers: Sequence[GeneralTracker], name: str, picture: UInt8[Tensor, "3 h w"], *, step: int) -> None:
    """Show a picture on the trackers that take pictures."""
    batch = picture.permute(1, 2, 0).unsqueeze(0).numpy()
    for tracker in trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if tracker.name in ("tensorboard", "wandb"):
            tracker.log_images({name: batch}, step=step, **layout)
