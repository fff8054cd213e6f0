"""What the verbs share: their common options, and how they print."""

import functools
import inspect
import json
import logging
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from rich.console import Console

from davae.cli.checks import check_device, check_settings

Verb = Callable[..., None]

_stdout = Console(soft_wrap=True, highlight=False)
_stderr = Console(soft_wrap=True, highlight=False, stderr=True)
_facts_to: ContextVar[TextIO | None] = ContextVar("facts_to", default=None)  # stdout after --json


def parse_size(text: str) -> int | tuple[int, int]:
    """The side, or width and height, in pixels: "256" or "320x192"."""
    # Up to six digits: larger numbers are typing errors.
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if match is None:
        raise typer.BadParameter(f"{text}: give a side in pixels, such as 256, or WIDTHxHEIGHT, such as 320x192")
    width, height = match.groups()
    return int(width) if height is None else (int(width), int(height))


def parse_lora(text: str) -> tuple[str, float]:
    """A LoRA and its weight: "style.safetensors", or "style.safetensors:0.7"."""
    place, colon, weight = text.rpartition(":")
    try:
        return (place, float(weight)) if colon and place else (text, 1.0)
    except ValueError:
        raise typer.BadParameter(f"{text}: the weight {weight!r} is no number; give it as FILE:0.7") from None


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
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Images that are made at once.")]
Negative = Annotated[str, typer.Option(metavar="TEXT", help="Text that guidance leads away from.")]
Lora = Annotated[
    list[Any],  # of `parse_lora`
    typer.Option(
        metavar="LORA[:WEIGHT]",
        help="A LoRA of the base or this model: file, folder or name; by default with weight 1. Repeatable.",
        parser=parse_lora,
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the weights; by default bfloat16 on a GPU, float32 on a CPU."),
]
Offload = Annotated[
    Literal["model", "sequential", "group"] | None,
    typer.Option(help="Keep weights in the computer's memory: a model, a layer or a group of layers at a time."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks; for many images.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random number of the run.")]

# The run itself.
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="gpu|cuda|cuda:N|mps|cpu", help="Where it runs; by default on CUDA if it is there."),
]
# Only processes that were launched together see it in --help.
RankTimeout = Annotated[
    float,
    typer.Option(
        min=1,
        help="Seconds that one rank waits for another.",
        hidden=os.environ.get("WORLD_SIZE", "1") == "1",
    ),
]
ReportTo = Annotated[
    list[str], typer.Option(help="Trackers of metrics: wandb, trackio, none; by default TensorBoard if installed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and leave.")]


def with_dry_run(verb: Verb) -> Verb:
    """Give a verb the option --dry-run: print its settings, and leave without calling it.

    Otherwise its OUT must be a folder that can be written, and its other arguments are checked, before anything is
    loaded or made.
    """

    @functools.wraps(verb)
    def run(*, dry_run: bool, **settings: Any) -> None:
        if dry_run:
            # Where the verb would run is no setting.
            return show({name: value for name, value in settings.items() if name not in ("device", "rank_timeout")})
        if "out" in settings:
            from davae.run.storage import check_writable

            check_writable(settings["out"])
        check_settings(settings)
        verb(**settings)

    return _with_option(verb, run, "dry_run", DryRun)


def with_json(verb: Verb) -> Verb:
    """Give a verb the option --json: its facts are one JSON object on stdout, and its words are not printed.

    What a library prints meanwhile goes to stderr.
    """

    @functools.wraps(verb)
    def run(*args: Any, as_json: bool, **settings: Any) -> None:
        if not as_json:
            return verb(*args, **settings)
        token = _facts_to.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                return verb(*args, **settings)
        finally:
            _facts_to.reset(token)

    return _with_option(verb, run, "as_json", AsJson)


def _with_option(verb: Verb, run: Verb, name: str, annotation: Any) -> Verb:
    """`run` with the signature of `verb` and one option more: typer reads the options from there."""
    signature = inspect.signature(verb)
    option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def choose_device(name: str | None, rank_timeout: float = 1800.0) -> str:
    """The device of that name, or by default a GPU if there is one, for each rank its own; waits for the ranks."""
    if name is not None:
        check_device(name)
    import torch

    from davae.run.ranks import Ranks, join_ranks

    join_ranks(rank_timeout)
    gpu = torch.cuda.is_available()
    if name is None or (name == "gpu" and gpu):
        return str(Ranks().device if gpu else "cpu")
    return "mps" if name == "gpu" else name


def choose_trackers(names: list[str]) -> list[str]:
    """The trackers of `--report-to`: the named ones, or TensorBoard if it is installed."""
    # "none" wins over all others.
    if "none" in names:
        return []
    if not names and find_spec("tensorboard") is not None:
        return ["tensorboard"]
    return names


def quiet_libraries() -> None:
    """Keep libraries' notes, warnings and bars for loading out of a verb's output; errors and downloads are shown."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


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
    """Print a line to stdout, on rank 0 only; nothing after --json."""
    if is_first() and _facts_to.get() is None:
        _stdout.print(make_printable(str(text)), markup=False)


def say_next(result: str, command: str) -> None:
    """End a verb with its result in words and what to type next; on stderr, so that stdout holds the result alone."""
    if is_first():
        with suppress(OSError):
            _stderr.print(make_printable(f"{result}\nnext: {command}"), markup=False)


def give(facts: Mapping[str, Any]) -> None:
    """Print a verb's facts after --json, on rank 0 only: the result that `say` tells in words without it."""
    stream = _facts_to.get()
    if is_first() and stream is not None:
        print(_to_json(facts), file=stream, flush=True)


def show(facts: Mapping[str, Any]) -> None:
    """Print facts as JSON, with --json and without."""
    say(_to_json(facts))
    give(facts)


def _to_json(facts: Mapping[str, Any]) -> str:
    from davae.run.storage import finite

    return json.dumps(finite(dict(facts)), indent=2, default=str)


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a folder; empty where nothing reads it, without --json or on another rank than the first."""
    from davae.run.storage import read_json

    return read_json(folder / "result.json") if is_first() and _facts_to.get() is not None else {}


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Print facts in two columns, names and values."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name.ljust(width)}  {value}")


def say_result(page: Path, sentence: str, facts: Mapping[str, Any] | None = None) -> None:
    """Print what a verb made: its page, or its facts, by default those of its result.json; and what to do with it."""
    say(page)
    give({"page": page, **(read_result(page.parent) if facts is None else facts)})
    say_next(sentence, f"open {page} in a browser")
