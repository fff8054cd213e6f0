"""What the verbs share: their common options, and how they print."""

import functools
import json
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from davae.errors import SettingsError

_stdout = Console(soft_wrap=True, highlight=False)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, as resolved, and leave.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random number of the run.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's setting.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")]
ReportTo = Annotated[
    list[str],
    typer.Option(help="Where metrics are shown, too: wandb, trackio, none; or TensorBoard, if it is installed."),
]
RunFolder = Annotated[
    Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE; of a section, runs/RECIPE/SECTION.")
]
PipelinePath = Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline's folder, or its name on the Hub.")]
AutoencoderPath = Annotated[
    Path, typer.Argument(metavar="AUTOENCODER", help="Folder of a trained AutoencoderDA, or of an adapter.")
]
Adapter = Annotated[
    list[Path], typer.Option(help="An adapter folder, to apply to the (base) pipeline. Repeatable: one upon the other.")
]
RankTimeout = Annotated[float, typer.Option(min=1, help="Seconds that a process of several waits for another.")]
Device = Annotated[str | None, typer.Option(help="Where it runs, such as cuda; by default a GPU if there is one.")]
PromptTokens = Annotated[int, typer.Option(min=1, max=512, help="Length that T5 pads to.")]
PictureSize = Annotated[
    str | None, typer.Option(metavar="SIDE|WIDTHxHEIGHT", help="In pixels; by default the pipeline's own square.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the pictures in pixels; by default the pipeline's.")]
Pictures = Annotated[
    str,
    typer.Argument(
        metavar="PICTURES", help="A folder, shards here or at a URL, parquet files, datasets:NAME; see docs/data.md."
    ),
]


def device_of(name: str | None) -> str:
    """The device of that name, or the best one here: of several ranks each has its own."""
    import torch

    from davae.run.ranks import Ranks

    allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name is not None and name.partition(":")[0] not in allowed:
        raise SettingsError(f"--device {name}: allowed here are {', '.join(allowed)}")
    return name or str(Ranks().device if torch.cuda.is_available() else allowed[-1])


def trackers_of(names: list[str]) -> list[str]:
    """The trackers that `--report-to` means: those named, or else TensorBoard, if it is installed."""
    if "none" in names:
        return []
    return names or ["tensorboard"] * (find_spec("tensorboard") is not None)


def size_of(text: str | None) -> int | tuple[int, int] | None:
    """A side, or width and height, in pixels, of "256" or "320x192"."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if found is None:
        raise SettingsError(f"--size {text}: give a side in pixels, such as 256, or WIDTHxHEIGHT, such as 320x192")
    width, height = found.groups()
    return int(width) if height is None else (int(width), int(height))


def quiet() -> None:
    """Keep the libraries' notes on torchvision, casts and cut captions out of a run's progress; errors are shown."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun or `accelerate launch` has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def by_first(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, done by the first of several processes as if it were the only one; the others are done at once."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        if is_first():
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
            verb(*args, **kwargs)

    return run


def say(text: object) -> None:
    """Print a line for the user, or for a script, to stdout; of several processes the first does."""
    if is_first():
        _stdout.print(str(text), markup=False)


def show(facts: dict[str, Any]) -> None:
    """Print facts as JSON."""
    say(json.dumps(facts, indent=2, default=str))
