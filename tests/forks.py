"""Programs in forks of the test's process, which has imported everything already: cheap to start and to kill."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.std import tqdm

from davae.errors import DavaeError


def forked(program: Callable[[], object]) -> int:
    """Run `program` in a fork of this process; returns its process id."""
    pid = os.fork()

    # In the fork: its exit code is what the command line would give.
    if pid == 0:
        code = 99
        try:
            torch.set_num_threads(1)
            _own_progress_locks()
            program()
            code = 0
        except DavaeError as error:
            code = error.exit_code
            sys.stderr.write(f"{error}\n")
        except SystemExit as error:  # of the command line
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _own_progress_locks() -> None:
    """Give this fork locks of its own: another fork, once killed, may hold the shared ones for ever."""
    lock, classes = threading.RLock(), [tqdm]
    while classes:
        each = classes.pop()
        each.set_lock(lock)
        classes += each.__subclasses__()


def print_to(output: Path, errors: Path) -> None:
    """Append the output of this fork and of its children to files; pytest has redirected its own streams."""
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))


def exit_code(pid: int) -> int:
    """Wait for a fork; negative when a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
