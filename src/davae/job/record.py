"""What a job's folder knows of the job: job.json has its estimate, and the steps that are finished with their facts."""

import datetime
from pathlib import Path
from typing import Any

from davae.errors import CheckpointError, SettingsError
from davae.job.recipe import JobRecipe
from davae.run.storage import read_json, write_json

RECORD, PAGE = "job.json", "index.html"


class JobRecord:
    """The steps of the job in `folder`; every change is written at once, by the rank that `writes`."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.path, self._writes = folder / RECORD, writes
        self.values: dict[str, Any] = {"estimate": {}, "steps": {}}
        if self.path.is_file():
            self.values |= read_json(self.path)
        elif writes and (folder / PAGE).exists():
            raise SettingsError(f"{folder / PAGE} is there and not of a job: give another folder, or remove it")
        if not all(isinstance(self.values[name], dict) for name in ("estimate", "steps")):
            raise CheckpointError(f"{self.path} is damaged: remove it; no finished stage is lost by that")

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Facts by the names of the steps that are finished, in their order."""
        return self.values["steps"]

    def is_finished(self, name: str, key: str, leaves: Path) -> bool:
        """Whether a step is finished that depends on the settings of this `key`, and its file `leaves` is there."""
        return self.steps.get(name, {}).get("key") == key and leaves.exists()

    def finish(self, name: str, key: str, seconds: float, facts: dict[str, Any]) -> None:
        """Note a finished step, and the seconds of the call that finished it."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.steps[name] = {"key": key, "seconds": round(seconds, 1), "finished": now, "facts": facts}
        self.write()

    def note_estimate(self, estimate: dict[str, Any]) -> None:
        """Keep what was timed before the first step."""
        self.values["estimate"] = estimate
        self.write()

    def write(self) -> None:
        """Write job.json."""
        if self._writes:
            write_json(self.path, self.values)


def combine(recipe: JobRecipe, *parts: str) -> str:
    """A step's key: the digests of the parts of the recipe that it depends on."""
    return " ".join(recipe.digests[name] for name in parts)
