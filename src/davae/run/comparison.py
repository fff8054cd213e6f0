"""Run folders beside each other: how far each is, what it measured, and in what settings they differ."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from davae.errors import CheckpointError
from davae.run.markdown import markdown_table
from davae.run.record import is_locked, read_metrics
from davae.run.storage import read_json

HIDDEN = ("loss_hex", "learning_rate", "grad_norm", "detail_weight", "seconds", "step")
"""Of a line of metrics.jsonl: what is no result."""


@dataclass(frozen=True)
class RunSummary:
    """What one run folder says."""

    folder: str
    state: str
    """"finished", "running" (another process holds its lock) or "stopped"."""
    step: int
    """Steps that are done, as far as metrics.jsonl says."""
    steps: int | None
    """Of the whole run."""
    values: dict[str, float]
    """Of result.json; before there is one, the last of each name in metrics.jsonl."""
    settings: dict[str, Any]
    """Of recipe.toml, keys of tables with a dot."""
    started: str
    """The commit that it was last started with, or ""."""


def find_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """The runs in these folders, each a run's own or one with runs below it, in the order of their paths.

    Raises:
        CheckpointError: there is none, or a file of one is damaged.
    """
    found = sorted({path.parent for folder in folders for path in Path(folder).rglob("recipe.toml")})
    runs = [summary(folder) for folder in found if (folder / "environment.json").is_file()]
    if not runs:
        names = ", ".join(map(str, folders))
        raise CheckpointError(f"{names}: no run, which is a folder with recipe.toml and environment.json, is there")
    return runs


def summary(folder: Path) -> RunSummary:
    """What one run folder says.

    Raises:
        CheckpointError: a file of it is damaged.
    """
    try:
        recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: recipe.toml or metrics.jsonl cannot be read: {error}") from error
    finished = (folder / "result.json").is_file()
    values = {name: value for line in lines for name, value in line.items() if name not in HIDDEN}
    values = read_json(folder / "result.json")["values"] if finished else values
    return RunSummary(
        folder=str(folder),
        state="running" if is_locked(folder) else "finished" if finished else "stopped",
        step=recipe.get("steps", 0) if finished else max((line["step"] + 1 for line in lines), default=0),
        steps=recipe.get("steps"),
        values={name: value for name, value in values.items() if isinstance(value, int | float)},
        settings=_flat(recipe),
        started=read_json(folder / "environment.json").get("commit") or "",
    )


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, by key, with each run's value; None where it has none."""
    keys = {key: None for run in runs for key in run.settings}  # in their order
    found = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def to_text(runs: Sequence[RunSummary]) -> str:
    """Markdown tables: the runs with their values, and the settings in which they differ."""
    names = list({name: None for run in runs for name in run.values})
    rows = [
        [run.folder, run.state, f"{run.step}/{run.steps}", *(_number(run.values.get(name)) for name in names)]
        for run in runs
    ]
    text = markdown_table(["run", "state", "steps", *names], rows)
    if found := differences(runs):
        rows = [[key, *("" if value is None else json.dumps(value) for value in found[key])] for key in found]
        text += "\n\n" + markdown_table(["setting", *(run.folder for run in runs)], rows)
    return text


def to_json(runs: Sequence[RunSummary]) -> str:
    """The same and all settings, for programs."""
    return json.dumps([asdict(run) for run in runs], indent=2)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for key, item in recipe.items()
        for name, value in (
            {f"{key}.{inner}": value for inner, value in item.items()} if isinstance(item, dict) else {key: item}
        ).items()
    }
