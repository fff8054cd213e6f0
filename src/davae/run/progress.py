"""The progress of long work: a live bar on a terminal, a line every ten seconds elsewhere."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


def announce(title: str) -> None:
    """A line across stderr above the progress of what comes next, on rank 0 only."""
    with suppress(OSError):
        Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0").rule(title)


def track(items: Sequence[Item], label: str, *, unit: str = "steps", visible: bool = True) -> Iterator[Item]:
    """The items one by one, with their progress on stderr."""
    console = Console(stderr=True, quiet=not visible)
    with StepProgress(label, done=0, total=len(items), console=console, unit=unit) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress.show(done)


@dataclass
class StepProgress:
    """A context manager that shows how many of `total` units are done, the speed since `done`, and the time left.

    With `samples`, the images in a step, it shows samples a second, too, and of a GPU the peak memory. Nothing ends if
    it cannot be shown, as in a log file on a full disk.
    """

    label: str
    done: int
    total: int
    console: Console
    unit: str = "steps"
    samples: int = 0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self._start, self._began = self.done, time.monotonic()
        self._last_line = self._began
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console)
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, status="")

    def __enter__(self) -> "StepProgress":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.stop()

    def show(self, done: int, loss: float | None = None) -> None:
        """Show that `done` are done, and in training the loss of the last step."""
        self.done, now = done, time.monotonic()
        status = self._status(done, now, loss)
        if self.console.is_terminal:
            self._bar.update(self._task, completed=done, status=status)
            return

        # A log file gets a line now and then, and one at the end.
        if now - self._last_line >= SECONDS_BETWEEN_LINES or done == self.total:
            self._last_line = now
            line = f"{self.label}: {done}/{self.total} {self.unit}, {status}"
            with suppress(OSError):
                self.console.print(line, highlight=False, soft_wrap=True)

    def _status(self, done: int, now: float, loss: float | None) -> str:
        speed = (done - self._start) / max(now - self._began, 1e-9)
        parts = [f"{speed:.2f} {'it' if self.unit == 'steps' else self.unit}/s"]
        if self.samples:
            parts.append(f"{speed * self.samples:.1f} samples/s")

        left = round((self.total - done) / speed) if speed else 0
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self.device is not None and self.device.type == "cuda":
            parts.append(f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB")
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        return ", ".join(parts)
