"""The command line: verbs parse, call and print. They import the rest of davae when called, so that --help is fast."""

import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from davae import __version__
from davae.cli import data, job, making, measuring, serve, training
from davae.cli.options import PrintableFormatter, by_first, make_printable, quiet_libraries, say, with_json
from davae.errors import DavaeError, StorageError

app = typer.Typer(
    name="davae",
    help="Double the resolution of a latent diffusion pipeline at the same token count.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# In the order of `davae --help`, in its two panels. Verbs that ranks cannot share are done by the first one alone.
USE, RESEARCH = "Use", "Research"
verbs: dict[str, dict[str, Callable[..., None]]] = {
    USE: {
        "try": by_first(making.try_),
        "demo": by_first(making.demo),
        "doctor": by_first(job.doctor),
        "init": by_first(job.init),
        "run": job.run,
        "recipes": by_first(job.recipes),
        "inspect": by_first(making.inspect),
        "train-autoencoder": training.train_autoencoder,
        "upgrade": by_first(making.upgrade),
        "finetune": training.finetune,
        "generate": making.generate,
        "evaluate": measuring.evaluate,
        "serve": by_first(serve.serve),
        "runs": by_first(training.runs),
    },
    RESEARCH: {
        "reconstruct": measuring.reconstruct,
        "latents": by_first(measuring.latents),
        "bench": by_first(measuring.bench),
        "import": by_first(making.import_),
    },
}
for panel, members in verbs.items():
    for name, verb in members.items():
        app.command(name=name, rich_help_panel=panel)(with_json(verb))
app.add_typer(data.app, name="data", rich_help_panel=USE)
app.add_typer(training.caches, name="cache", rich_help_panel=RESEARCH)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; a user's mistake becomes a message on stderr and an exit code, never a traceback."""
    stderr = Console(soft_wrap=True, highlight=False, stderr=True)

    # Any name can be shown, whatever the terminal's encoding, and none is obeyed as an escape sequence.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter())

    # Before torch is imported: OpenMP's threads sleep while they wait. Those that spin take the core that the last one
    # needs, as soon as another program is busy (benchmarks/waiting.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_libraries()

    try:
        with interrupts_kept():
            app(arguments, prog_name="davae")
    except DavaeError as error:
        with suppress(OSError):  # stderr may be full, too
            # A code above 128 is a signal, after which everything is saved: no error.
            if error.exit_code <= 128:
                stderr.print("[bold red]error[/]", end=" ")
            stderr.print(make_printable(str(error)), markup=False)
        sys.exit(error.exit_code)
    except OSError as error:  # of a place that no verb checks, such as stdout or the folder for temporary files
        with suppress(OSError):
            stderr.print("[bold red]error[/]", end=" ")
            stderr.print(f"the system says: {make_printable(str(error))}. Mend that, and run again", markup=False)
        sys.exit(StorageError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _give_up_full_streams()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Keep Ctrl+C what it is, whatever error a library makes of it.

    safetensors, for one, raises a ValueError where Python raised KeyboardInterrupt within its code, and the pipeline
    would be said to be damaged.
    """
    came = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(signum, frame)

    # Python allows handlers in the main thread only, and another program's own handler stays.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _give_up_full_streams() -> None:
    """Drop what is left for a stream that is full: Python would write it at its end, and fail with another code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        say(f"davae {__version__}")
        raise typer.Exit
