"""The progress of a training run: a live bar on a terminal, a line every ten seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0


class StepProgress:
    """A context manager that shows how many of `total` steps are done, steps per second, time left and the loss."""

    def __init__(self, label: str, *, done: int, total: int, console: Console) -> None:
        """Start at `done` steps; the speed counts only steps from here on."""
        self._label, self._start, self._total, self._console = label, done, total, console
        self._began = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self._task = self._bar.add_task(label, total=total, completed=done, status="")

    def __enter__(self) -> "StepProgress":
        """Show the bar if this is a terminal."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def show(self, done: int, loss: float) -> None:
        """Say that `done` steps are done and what the loss of the last one was."""
        now = time.monotonic()
        speed = (done - self._start) / max(now - self._began, 1e-9)
        left = round((self._total - done) / speed)
        status = f"{speed:.2f} it/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left, loss {loss:.4f}"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, status=status)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or done == self._total:
            self._last_line = now
            self._console.print(f"{self._label}: {done}/{self._total} steps, {status}", highlight=False, soft_wrap=True)
