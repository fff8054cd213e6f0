"""What the verbs share: their common options, and how they print."""

import functools
import inspect
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from davae.errors import SettingsError

Verb = Callable[..., None]

_stdout = Console(soft_wrap=True, highlight=False)
_stderr = Console(soft_wrap=True, highlight=False, stderr=True)


def parse_size(text: str) -> int | tuple[int, int]:
    """The side, or width and height, in pixels: "256" or "320x192"."""
    # Up to six digits: larger numbers are typing errors.
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if match is None:
        raise typer.BadParameter(f"{text}: give a side in pixels, such as 256, or WIDTHxHEIGHT, such as 320x192")
    width, height = match.groups()
    return int(width) if height is None else (int(width), int(height))


# Where things are read and written.
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")]
PipelinePath = Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline's folder, or its name on the Hub.")]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the pipeline on the Hub; a folder here has none.")
]
AutoencoderPath = Annotated[
    Path, typer.Argument(metavar="AUTOENCODER", help="Folder of a trained AutoencoderDA, or of an adapter.")
]
ImageSource = Annotated[
    str,
    typer.Argument(
        metavar="PICTURES", help="A folder, shards here or at a URL, parquet files, datasets:NAME; see docs/data.md."
    ),
]
Adapter = Annotated[
    list[Path], typer.Option(help="An adapter folder, applied to the base pipeline. Repeatable: one upon the other.")
]
RunFolder = Annotated[
    Path | None, typer.Option(help="Folder of the run; by default runs/RECIPE, or runs/RECIPE/SECTION for a section.")
]
ResultFolder = Annotated[Path, typer.Option(help="Folder for the results and their page.")]

# Images and how they are sampled.
ImageSize = Annotated[
    Any,
    typer.Option(
        metavar="SIDE|WIDTHxHEIGHT", help="In pixels; by default the pipeline's own square.", parser=parse_size
    ),
]
Side = Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many images.")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
GuidanceScale = Annotated[float, typer.Option(min=0, help="Classifier-free guidance.")]
PromptTokens = Annotated[int, typer.Option(min=1, max=512, help="Length that T5 pads to.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random number of the run.")]

# The run itself.
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")]
Device = Annotated[str | None, typer.Option(help="Where it runs, such as cuda; by default a GPU if there is one.")]
RankTimeout = Annotated[float, typer.Option(min=1, help="Seconds that one rank waits for another.")]
ReportTo = Annotated[
    list[str], typer.Option(help="Trackers of metrics: wandb, trackio, none; by default TensorBoard if installed.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and leave.")]


def with_dry_run(verb: Verb) -> Verb:
    """Give a verb the option --dry-run: print its settings, and leave without calling it.

    Otherwise its OUT must be a folder that can be written, before the verb loads or makes anything.
    """

    @functools.wraps(verb)
    def run(*, dry_run: bool, **settings: Any) -> None:
        if dry_run:
            # Where the verb would run is no setting.
            return show({name: value for name, value in settings.items() if name not in ("device", "rank_timeout")})
        if "out" in settings:
            from davae.run.storage import check_writable

            check_writable(settings["out"])
        verb(**settings)

    # typer reads the options from the signature.
    signature = inspect.signature(verb)
    option = inspect.Parameter("dry_run", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DryRun)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def choose_device(name: str | None, rank_timeout: float = 1800.0) -> str:
    """The device of that name, or by default a GPU if there is one, for each rank its own; waits for the ranks."""
    import torch

    from davae.run.ranks import Ranks, join_ranks

    join_ranks(rank_timeout)
    gpu = torch.cuda.is_available()
    allowed = ["cpu", "cuda"] if gpu else ["cpu"]
    if name is not None and name.partition(":")[0] not in allowed:
        raise SettingsError(f"--device {name}: allowed here are {', '.join(allowed)}")
    return name or str(Ranks().device if gpu else "cpu")


def choose_trackers(names: list[str]) -> list[str]:
    """The trackers of `--report-to`: the named ones, or TensorBoard if it is installed."""
    # "none" wins over all others.
    if "none" in names:
        return []
    if not names and find_spec("tensorboard") is not None:
        return ["tensorboard"]
    return names


def quiet_libraries() -> None:
    """Keep notes on torchvision, casts and cut captions out of a run's progress; errors are still shown."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def is_first() -> bool:
    """Whether this is rank 0 of torchrun or `accelerate launch`, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def by_first(verb: Verb) -> Verb:
    """Let rank 0 run the verb as if it were the only process; the other ranks leave at once."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        if is_first():
            # Without these variables no library waits for the other ranks.
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
            verb(*args, **kwargs)

    return run


def make_printable(text: str) -> str:
    """Text with escapes for what a terminal would obey or could not show: names come from strangers' files."""
    printable = []
    for character in text:
        # Emoji are joined by U+200D.
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\n\t\u200d":
            character = ascii(character)[1:-1]
        printable.append(character)
    return "".join(printable)


class PrintableFormatter(logging.Formatter):
    """Log records as plain lines that a terminal only shows."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return make_printable(super().format(record))


def say(text: object) -> None:
    """Print a line to stdout, on rank 0 only."""
    if is_first():
        _stdout.print(make_printable(str(text)), markup=False)


def say_next(result: str, command: str) -> None:
    """End a verb with its result in words and what to type next; on stderr, so that stdout holds the result alone."""
    if is_first():
        with suppress(OSError):
            _stderr.print(make_printable(f"{result}\nnext: {command}"), markup=False)


def show(facts: dict[str, Any]) -> None:
    """Print facts as JSON."""
    say(json.dumps(facts, indent=2, default=str))
