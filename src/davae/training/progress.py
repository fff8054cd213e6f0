"""The progress of long work: a live bar on a terminal, a line every ten seconds elsewhere."""

import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0


class StepProgress:
    """A context manager that shows how many of `total` are done, speed and time left; of training more, see `show`.

    Args:
        label: what is done.
        done: so many are done already; the speed counts only those from here on.
        total: so many there are.
        console: where it is shown.
        unit: what is counted, in the plural.
        samples: pictures in a step, for the samples a second; 0 shows none.
        device: a GPU whose largest memory use is shown; of others nothing is.
    """

    def __init__(
        self,
        label: str,
        *,
        done: int,
        total: int,
        console: Console,
        unit: str = "steps",
        samples: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.done = done
        self._label, self._start, self._total, self._console = label, done, total, console
        self._unit, self._samples = unit, samples
        self._gpu = device if device is not None and device.type == "cuda" else None
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

    def show(self, done: int, loss: float | None = None) -> None:
        """Say that `done` are done, in training what the loss of the last step was, how fast it goes, how long yet."""
        self.done, now = done, time.monotonic()
        speed = (done - self._start) / max(now - self._began, 1e-9)
        left = round((self._total - done) / speed) if speed else 0
        parts = [f"{speed:.2f} {'it' if self._unit == 'steps' else self._unit}/s"]
        if self._samples:
            parts.append(f"{speed * self._samples:.1f} samples/s")
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self._gpu is not None:
            parts.append(f"{torch.cuda.max_memory_allocated(self._gpu) / 2**30:.1f} GiB")
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        status = ", ".join(parts)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, status=status)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or done == self._total:
            self._last_line = now
            line = f"{self._label}: {done}/{self._total} {self._unit}, {status}"
            self._console.print(line, highlight=False, soft_wrap=True)
