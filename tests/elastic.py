"""torchrun in a fork of the test's process: the command, or only its agent, whose ranks are forks, too.

Forks import nothing again, which makes a restart five times as fast: two ranks on one core take two seconds, not ten.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from accelerate import PartialState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from forks import forked, print_to


def start_agent(
    program: Callable[[], object],
    log: Path,
    settings: dict[str, str] | None = None,
    *,
    restarts: int,
    ranks: int = 2,
    nodes: tuple[int, int] = (1, 1),
    endpoint: str = "127.0.0.1:0",
) -> int:
    """What `torchrun` does with the ranks of a function; returns the agent's process.

    Args:
        program: of each rank.
        log: what agent and ranks print is added to it.
        settings: accelerate's, for the environment.
        restarts: after so many the run has failed.
        ranks: of this agent.
        nodes: the fewest and most agents of the run.
        endpoint: host and port where the agents meet.
    """

    def rank() -> None:
        PartialState._reset_state()  # the test's process may have been its own only rank already
        program()

    def agent() -> None:
        _begin(log, settings)
        config = LaunchConfig(
            *nodes,
            ranks,
            run_id="test",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"last_call_timeout": 3},
            max_restarts=restarts,
            start_method="fork",
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(log.with_suffix(".ranks"))),
        )
        elastic_launch(config, rank)()

    return forked(agent)


def start_torchrun(arguments: list[str], log: Path, settings: dict[str, str] | None = None, *, restarts: int) -> int:
    """`torchrun --nproc-per-node 2 --max-restarts RESTARTS ARGUMENTS`; returns its process."""

    def run() -> None:
        _begin(log, settings)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        os.execv(sys.executable, [*command, *arguments])

    return forked(run)


def generations(agent: int, count: int = 2) -> Iterator[list[psutil.Process]]:
    """The ranks' processes, once all `count` are there; then those of every restart, until the run is over."""
    process, seen = psutil.Process(agent), set()
    while process.status() != psutil.STATUS_ZOMBIE:
        new = [child for child in process.children() if child.pid not in seen]
        if len(new) == count:
            seen |= {child.pid for child in new}
            yield new
        time.sleep(0.01)


def _begin(log: Path, settings: dict[str, str] | None) -> None:
    print_to(log, log)
    os.environ |= {**(settings or {}), "OMP_NUM_THREADS": "1"}
