"""Signals as a polite request to stop: the first one is noted, the second one acts as if davae were not there."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from davae.errors import DavaeError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""From a person, from a system that shuts down, and from a cluster's queue that warns before its time limit (Slurm's
`--signal=USR1@120`)."""


class Interrupted(DavaeError):
    """Training was asked to stop by a signal and has saved its state; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; saved after {step} steps. Run the same command again to go on")
        self.exit_code = 128 + signum


class StopRequest:
    """The number of the first signal that came, or 0."""

    signum = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note these `SIGNALS` instead of dying of them; the former handlers come back at the end.

    They come back at the first signal, too, so that a second one is not held up by a long step. Python allows handlers
    in the main thread only; elsewhere nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    former = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def restore() -> None:
        for signum, handler in former.items():
            signal.signal(signum, handler)

    def note(signum: int, _frame: FrameType | None) -> None:
        request.signum = signum
        restore()

    try:
        for signum in SIGNALS:
            signal.signal(signum, note)
        yield request
    finally:
        restore()
