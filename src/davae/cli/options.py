"""What the verbs share: their common options, and how they print."""

import json
import os
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
RunFolder = Annotated[
    Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE; of a section, runs/RECIPE/SECTION.")
]
PipelinePath = Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline's folder, or its name on the Hub.")]
AutoencoderPath = Annotated[
    Path, typer.Argument(metavar="AUTOENCODER", help="Folder of a trained AutoencoderDA, or of an adapter.")
]
Adapter = Annotated[Path | None, typer.Option(help="An adapter folder, to apply to the (base) pipeline.")]
RankTimeout = Annotated[float, typer.Option(min=1, help="Seconds that a process of several waits for another.")]
Device = Annotated[str | None, typer.Option(help="Where it runs, such as cuda; by default a GPU if there is one.")]
PromptTokens = Annotated[int, typer.Option(min=1, max=512, help="Length that T5 pads to.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the pictures in pixels; by default the pipeline's.")]
Pictures = Annotated[Path, typer.Argument(metavar="PICTURES", help="A folder of pictures, or WebDataset shards.")]


def device_of(name: str | None) -> str:
    """The device of that name, or the best one here: of several ranks each has its own."""
    import torch

    from davae.ranks import Ranks

    allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if name is not None and name.partition(":")[0] not in allowed:
        raise SettingsError(f"--device {name}: allowed here are {', '.join(allowed)}")
    return name or str(Ranks().device if torch.cuda.is_available() else allowed[-1])


def quiet() -> None:
    """Keep the libraries' notes on torchvision, casts and cut captions out of a run's progress; errors are shown."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def say(text: object) -> None:
    """Print a line for the user, or for a script, to stdout."""
    _stdout.print(str(text), markup=False)


def show(facts: dict[str, Any]) -> None:
    """Print facts as JSON."""
    say(json.dumps(facts, indent=2, default=str))
