"""The verb that looks at runs."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import say


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Run folders, or folders with such; runs/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With all settings, for programs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same: nothing is ever changed.")] = False,
) -> None:
    """List runs: how far they are, what they measured, and the settings in which they differ."""
    from davae.run.comparison import find_runs, to_json, to_text

    found = find_runs(folders or [Path("runs")])
    say(to_json(found) if as_json else to_text(found))
