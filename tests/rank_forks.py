"""Programs on several ranks, each in a fork of the test's process, which exchange by gloo."""

import os
import socket
from collections.abc import Callable

from accelerate import PartialState

from forks import exit_code, forked

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""Environment variables that `accelerate launch` sets for FSDP2."""


def start_ranks(program: Callable[[], object], count: int, settings: dict[str, str] | None = None) -> list[int]:
    """Run `program` on so many ranks, with accelerate's `settings` in the environment; returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}

    def begin(rank: int) -> None:
        PartialState._reset_state()  # the test's process may have been its own only rank already
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {**place, **(settings or {}), **{name: str(number) for name, number in numbers.items()}}
        program()

    return [forked(lambda rank=rank: begin(rank)) for rank in range(count)]


def run_ranks(program: Callable[[], object], count: int, settings: dict[str, str] | None = None) -> list[int]:
    """`start_ranks`, and their exit codes."""
    return [exit_code(pid) for pid in start_ranks(program, count, settings)]
