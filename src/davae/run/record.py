"""The files that a run leaves in its folder: recipe.toml, environment.json, metrics.jsonl and result.json."""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from davae.errors import CheckpointError, SettingsError
from davae.run.recipe import Recipe
from davae.run.storage import (
    change_leaves,
    check_writable,
    finite,
    fsync,
    storage_errors,
    try_lock,
    write_atomically,
    write_json,
)

PACKAGES = ("davae", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")

logger = logging.getLogger(__name__)

# The locks that are held, by PID and folder: a fork inherits the set, but not the locks.
_held: set[tuple[int, Path]] = set()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, or raise a SettingsError if another process does; in one process it nests."""
    folder = Path(folder).resolve()
    mine = os.getpid(), folder
    if mine in _held:
        yield
        return

    check_writable(folder)
    with storage_errors(folder / ".lock"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")

    with lock:
        if not try_lock(lock):
            raise SettingsError(f"another process trains in {folder}: wait for it, or give another folder")
        _held.add(mine)
        try:
            yield
        finally:
            _held.discard(mine)


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of `alone`."""
    if not (folder / ".lock").is_file():
        return False
    with (folder / ".lock").open("rb") as lock:
        return not try_lock(lock, shared=True)


class RunRecord:
    """The record of one run in `folder`, which is created; what cannot be written is a StorageError."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.metrics_path = self.folder / "metrics.jsonl"
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, recipe: Recipe, *, device: str, precision: str) -> None:
        """Write recipe.toml (readable by `load_recipe`) and environment.json (machine, versions, commit, command)."""
        write_atomically(self.folder / "recipe.toml", recipe.to_toml().encode())
        write_json(self.folder / "environment.json", {**environment(), "device": device, "precision": precision})

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        line = (json.dumps(finite(dict(metrics)), allow_nan=False) + "\n").encode()
        with storage_errors(self.metrics_path, len(line)), self.metrics_path.open("ab") as file:
            file.write(line)

    def truncate(self, step: int) -> None:
        """Drop the lines of metrics.jsonl from `step` on, and damaged ones."""
        if self.metrics_path.exists():
            lines = [line for line in read_metrics(self.metrics_path) if line["step"] < step]
            write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def sync(self) -> None:
        """Force metrics.jsonl onto the disk, so that a checkpoint never outlives the lines before it."""
        if self.metrics_path.exists():
            with storage_errors(self.metrics_path):
                fsync(self.metrics_path)

    def finish(
        self, values: Mapping[str, Any], *, recipe: Recipe, device: str, seed: int, counts: Mapping[str, int]
    ) -> None:
        """Write result.json: measured `values`, and by `counts` how many samples each name stands on.

        Values that are not finite become null, and absolute paths are shortened.
        """
        facts = environment()
        result = {
            "values": change_leaves(dict(values), _without_paths),
            "recipe_digest": recipe.digest(),
            "device": device,
            "seed": seed,
            "counts": dict(counts),
            **{name: facts[name] for name in ("commit", "versions", "command")},
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json(self.folder / "result.json", result)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The sound lines of a metrics.jsonl, in order; damaged ones are passed over, for no run depends on its log.

    A file that cannot be read at all is a CheckpointError.
    """
    try:
        # Behind the last newline there is nothing, or a line that a kill cut short.
        texts = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): mend its rights, or remove it") from error

    lines: list[dict[str, Any]] = []
    for text in texts:
        with suppress(ValueError, RecursionError):  # no JSON, or no text
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    if damaged := len(texts) - len(lines):
        logger.warning("%s: %d of its %d lines are damaged, and passed over", path, damaged, len(texts))
    return lines


def environment() -> dict[str, Any]:
    """Python, platform, CPU count, package versions, git commit (None outside a checkout) and command line."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *map(_without_paths, sys.argv[1:])],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that tracks this file, with "-dirty" behind it if davae's sources were changed."""
    git, package = shutil.which("git"), Path(__file__).parents[1]
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        command = [git, "-C", str(package), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else None

    # An installed package can lie inside somebody else's checkout: only a tracked file counts.
    if ask("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = ask("rev-parse", "HEAD")
    return f"{commit}-dirty" if ask("status", "--porcelain", "--untracked-files=no", ".") else commit


def _without_paths(value: Any) -> Any:
    """Text with every absolute path made relative to the working folder, or cut to its last part."""
    if not isinstance(value, str | Path):
        return value
    return re.sub(r"(?<![\w.~:/])(?:[A-Za-z]:\\|/)[^\s'\",:;]+", _shorten, str(value))


def _shorten(match: re.Match[str]) -> str:
    path = Path(match.group())
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
