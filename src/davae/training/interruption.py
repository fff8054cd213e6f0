"""Signals as a polite request to stop: the first one is noted, the second one acts as if davae were not there."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from davae.errors import DavaeError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Of a person, of a system that shuts down, and of a cluster's queue that warns before its time limit (Slurm's
`--signal=USR1@120`)."""


class Interrupted(DavaeError):
    """Training was asked to stop by a signal and has saved its state; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, step: int) -> None:
        """Say which signal came and after how many steps the state was saved."""
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; saved after {step} steps. Run the same command again to go on")
        self.exit_code = 128 + signum


class StopRequest:
    """What the signal handlers have seen: `signum` is the number of the first signal, None before it."""

    signum: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note these `SIGNALS` instead of dying of them; the handlers that were there before come back at the end.

    After the first signal the former handlers are back at once, so that a second one is not held up by a long step.
    Outside the main thread, where Python allows no handlers, nothing is installed.
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
        for signum in former:
            signal.signal(signum, note)
        yield request
    finally:
        restore()
