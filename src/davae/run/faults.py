"""Faults on purpose, so that the promises about mishaps can be tested on the program that users run.

`DAVAE_FAULT=site:action:nth`, read once when davae is imported, makes the nth visit of a site go wrong: for instance
`save.fsync:enospc:2` or `loss:nan:*` (every visit). Without it, `at` only compares with None.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.errors import SettingsError

# Pixels, latents, conditions, predictions, losses, one gradient, the discriminator's loss, one weight's EMA.
TENSOR_SITES = ("data", "encode", "text", "forward", "loss", "grad", "discriminator", "ema")
# Each just before the operation; `save` means all of them together.
FILE_SITES = ("save.open", "save.write", "save.fsync", "save.rename", "save.unlink")
OTHER_SITES = ("read", "decode", "backward", "clip", "step", "load", "cache", "eval")
SITES = (*TENSOR_SITES, *OTHER_SITES, "save", *FILE_SITES)

NUMBERS = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30}
ERRNOS = {"eio": errno.EIO, "enospc": errno.ENOSPC}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
# Flip a bit of the file, halve it, or cut the power: writes since the last fsync are lost, then SIGKILL.
FILE_ACTIONS = ("flip", "truncate", "cut")
DELAY_SECONDS = 1.0


@dataclass
class Fault:
    """One fault: what goes wrong at which visit of which site."""

    site: str
    action: str
    # From 1; None is every visit.
    nth: int | None
    visits: int = 0
    unsynced: set[Path] = field(default_factory=set)

    def visit(self, site: str, subject: Any) -> Any:
        """`subject`, changed if this is the visit; or whatever the action does instead of returning."""
        if self.action == "cut":
            self._follow(site, subject)
        if site != self.site and not (self.site == "save" and site in FILE_SITES):
            return subject
        self.visits += 1
        if self.nth is not None and self.visits != self.nth:
            return subject

        if self.action in NUMBERS:
            return _with_number(subject, NUMBERS[self.action])
        if self.action in ERRNOS:
            raise OSError(ERRNOS[self.action], os.strerror(ERRNOS[self.action]))
        if self.action == "delay":
            time.sleep(DELAY_SECONDS)
        elif self.action in ("flip", "truncate"):
            _damage(subject, self.action)
        else:
            for path in self.unsynced:
                if path.is_file():
                    path.write_bytes(b"")
            os.kill(os.getpid(), SIGNALS.get(self.action, signal.SIGKILL))
        return subject

    def _follow(self, site: str, path: Any) -> None:
        # A site is visited before its operation: the operation is done when any site is visited next.
        self.unsynced = {known for known in self.unsynced if known.is_file()}
        if site in ("save.open", "save.write") and not path.is_dir():
            self.unsynced.add(path)
        elif site == "save.fsync" and not (self.nth == self.visits + 1 and self.site in ("save", site)):
            self.unsynced.discard(path)


_fault: Fault | None = None


def at(site: str, subject: Any = None) -> Any:
    """Mark a site where a fault can be asked for; returns `subject`, the tensor or path that it is about."""
    return subject if _fault is None else _fault.visit(site, subject)


def arm(text: str) -> None:
    """Ask for the fault `site:action:nth`, in place of any other; "" asks for none."""
    global _fault
    _fault = _parse(text) if text else None


def _parse(text: str) -> Fault:
    site, action, nth = [*text.split(":"), "", ""][:3]
    if text.count(":") != 2 or not (nth == "*" or (nth.isdecimal() and int(nth) > 0)):
        raise SettingsError(f"DAVAE_FAULT={text}: give it as site:action:nth, nth a number from 1 or *")
    if site not in SITES:
        raise SettingsError(f"DAVAE_FAULT={text}: there is no site {site!r}; allowed are {', '.join(SITES)}")

    allowed = [*SIGNALS, "delay", *ERRNOS]
    if site in TENSOR_SITES:
        allowed += NUMBERS
    elif site in ("save", *FILE_SITES):
        allowed += FILE_ACTIONS
    if action not in allowed:
        raise SettingsError(f"DAVAE_FAULT={text}: at {site} allowed are the actions {', '.join(allowed)}")
    return Fault(site, action, None if nth == "*" else int(nth))


def _with_number(tensor: Any, number: float) -> Any:
    """A copy whose first element is `number`, and so is its gradient."""
    first = tensor.new_zeros(tensor.shape, dtype=bool)
    first.view(-1)[0] = True
    return ((tensor - tensor.detach() + 1) * number).where(first, tensor)


def _damage(path: Path, action: str) -> None:
    if not path.is_file() or not path.stat().st_size:
        return
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half] ^= 1
    path.write_bytes(content[:half] if action == "truncate" else content)


arm(os.environ.get("DAVAE_FAULT", ""))
