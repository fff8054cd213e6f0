"""The command line: verbs that parse, call and print. What they do is in the modules that they import when called."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.console import Console

from davae import __version__
from davae.cli import cache, data, making, measuring, runs, training
from davae.cli.options import by_first, is_first, say
from davae.errors import DavaeError

app = typer.Typer(
    name="davae",
    help="Double the resolution of a latent diffusion pipeline at the same token count.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
verbs: dict[str, Callable[..., None]] = {  # in the order of `davae --help`
    "demo": by_first(making.demo),
    "inspect": by_first(making.inspect),
    "train-autoencoder": training.train_autoencoder,
    "upgrade": by_first(making.upgrade),
    "import": by_first(making.import_),
    "finetune": training.finetune,
    "generate": making.generate,
    "reconstruct": measuring.reconstruct,
    "latents": by_first(measuring.latents),
    "evaluate": measuring.evaluate,
    "bench": by_first(measuring.bench),
    "runs": by_first(runs.runs),
}
for name, verb in verbs.items():
    app.command(name=name)(verb)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; a user's mistake is its message on stderr and the error's exit code, never a traceback."""
    stderr = Console(soft_wrap=True, highlight=False, stderr=True)
    if not is_first():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress, which the first process shows
    try:
        app(arguments)
    except DavaeError as error:
        stopped = error.exit_code > 128  # by a signal, with everything saved
        if not stopped:
            stderr.print("[bold red]error[/]", end=" ")
        stderr.print(str(error), markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        say(f"davae {__version__}")
        raise typer.Exit
