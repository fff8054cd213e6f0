"""Run folders beside each other: how far each is, what it measured, and in which settings they differ."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from davae.errors import CheckpointError, DavaeError
from davae.run.markdown import markdown_table
from davae.run.recipe import read_toml
from davae.run.record import is_locked, read_metrics
from davae.run.storage import read_json

# Names in metrics.jsonl that are no results.
HIDDEN = ("loss_hex", "learning_rate", "grad_norm", "detail_weight", "seconds", "step")


@dataclass(frozen=True)
class RunSummary:
    """The state, the results and the settings of one run."""

    folder: str
    # "finished", "running" (another process holds its lock), "stopped" or "unreadable".
    state: str
    # Steps that are done, and of the whole run.
    step: int
    steps: int | None
    # From result.json; before there is one, the last of each name in metrics.jsonl.
    values: dict[str, float]
    # From recipe.toml; a key in a table is written with a dot.
    settings: dict[str, Any]
    # The commit that it was last started with, or "".
    started: str
    # Why it is unreadable, or "".
    problem: str = ""


def find_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """The runs in these folders, and in all folders below them, in the order of their paths.

    A run with a damaged file is "unreadable", and the others are read all the same.
    """
    run_folders: set[Path] = set()
    for folder in folders:
        for path in Path(folder).rglob("recipe.toml"):
            if (path.parent / "environment.json").is_file():
                run_folders.add(path.parent)
    if not run_folders:
        names = ", ".join(map(str, folders))
        raise CheckpointError(f"{names}: no run, which is a folder with recipe.toml and environment.json, is there")

    summaries = []
    for folder in sorted(run_folders):
        try:
            summaries.append(read_run(folder))
        except DavaeError as error:
            unreadable = RunSummary(str(folder), "unreadable", 0, None, {}, {}, "", problem=str(error))
            summaries.append(unreadable)
    return summaries


def read_run(folder: Path) -> RunSummary:
    """The summary of one run, or a DavaeError that names the damaged file."""
    recipe, start = read_toml(folder / "recipe.toml"), read_json(folder / "environment.json")
    lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []

    # The last of each value, until result.json has the final ones.
    state, step = "stopped", 0
    values: dict[str, Any] = {}
    for line in lines:
        values |= line
        step = max(step, line["step"] + 1)
    for name in HIDDEN:
        values.pop(name, None)
    if (folder / "result.json").is_file():
        result = read_json(folder / "result.json")
        if not isinstance(result.get("values"), dict) or not isinstance(result.get("counts", {}), dict):
            raise CheckpointError(f"{folder / 'result.json'} has no values: it is damaged")
        # It may be that of fewer steps, of a run that goes on.
        steps = recipe.get("steps", 0)
        if result.get("counts", {}).get("steps", steps) == steps:
            state, step, values = "finished", steps, result["values"]

    return RunSummary(
        folder=str(folder),
        state="running" if is_locked(folder) else state,
        step=step,
        steps=recipe.get("steps"),
        values={name: value for name, value in values.items() if isinstance(value, int | float)},
        settings=_flatten(recipe),
        started=start.get("commit") or "",
    )


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, by key, with each run's value; None where it has none."""
    different = {}
    for key in _names(run.settings for run in runs):
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            different[key] = values
    return different


def to_text(runs: Sequence[RunSummary]) -> str:
    """Markdown tables: the runs with their values, and the settings in which they differ."""
    names = _names(run.values for run in runs)
    rows = []
    for run in runs:
        numbers = [f"{run.values[name]:.5g}" if name in run.values else "" for name in names]
        steps = "" if run.problem else f"{run.step}/{run.steps}"
        rows.append([run.folder, run.state, steps, *numbers])
    text = markdown_table(["run", "state", "steps", *names], rows)

    # Why some have no values.
    for run in runs:
        if run.problem:
            text += f"\n\n{run.folder}: {run.problem}"

    # The settings, a column for each run.
    readable = [run for run in runs if not run.problem]
    rows = []
    for key, values in differences(readable).items():
        rows.append([key, *("" if value is None else json.dumps(value) for value in values)])
    if rows:
        text += "\n\n" + markdown_table(["setting", *(run.folder for run in readable)], rows)
    return text


def _names(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys of several tables, each once, in their order."""
    names: dict[str, None] = {}
    for table in tables:
        names |= dict.fromkeys(table)
    return list(names)


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            settings |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            settings[key] = value
    return settings
