"""Both stages' commands under torchrun on two ranks, which are killed, stopped, leave and come back (R16)."""

import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from davae import cli
from davae.run import faults, ranks
from davae.run.recipe import Recipe
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import AutoencoderRecipe
from elastic import generations, start_agent, start_torchrun
from forks import exit_code
from rank_forks import FSDP2, run_ranks
from stages import autoencoder_recipe, finetune_recipe, outcome, steps_done
from trials import Trials

WAYS = {"DDP": {}, "FSDP2": FSDP2}
STEADY = {"precision": "float32", "learning_rate": 1e-5, "final_learning_rate": 1e-6, "checkpoint_every": 2}
"""Rounding errors grow by what a step changes."""
MEET_ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it agents of torch 2.13 do not say where to meet to one that comes later, which gives up after a minute."""


@dataclass(frozen=True)
class Stage:
    """A stage's recipe, the settings of accelerate that it runs by, and what two undisturbed ranks made of it."""

    recipe: Recipe
    settings: dict[str, str]
    finished: Path
    seconds: float

    def arguments(self, folder: Path, *options: str) -> list[str]:
        file = folder.with_suffix(".toml")
        file.write_text(self.recipe.to_toml())
        verb = "train-autoencoder" if isinstance(self.recipe, AutoencoderRecipe) else "finetune"
        return [verb, str(file), "--out", str(folder), "--report-to", "none", *options]

    def program(self, folder: Path, *options: str) -> Callable[[], None]:
        arguments = self.arguments(folder, *options)

        def program() -> None:
            ranks.ROLL_CALL = 0.5  # who is there in these tests says so at once
            cli.main(arguments)

        return program


@pytest.fixture(scope="module")
def stage(request, base_folder, autoencoder_folder, picture_folder, tmp_path_factory) -> Stage:
    name, way = request.param.split(", ")
    if name == "stage 1":
        recipe = autoencoder_recipe(base_folder, picture_folder, **STEADY, steps=6)
    else:
        recipe = finetune_recipe(base_folder, autoencoder_folder, picture_folder, **STEADY, steps=8)
    folder = tmp_path_factory.mktemp("whole") / "run"
    whole = Stage(recipe, WAYS[way], folder, 0.0)
    began = time.monotonic()
    assert run_ranks(whole.program(folder), 2, whole.settings) == [0, 0]
    return Stage(recipe, whole.settings, folder, time.monotonic() - began)


def by(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("stage", names, indirect=True)


def wait_until(there: Callable[[], bool], agent: int) -> None:
    """Or until the agent is done."""
    while not there() and psutil.Process(agent).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


def listens(process: int) -> bool:
    return any(line.status == psutil.CONN_LISTEN for line in psutil.Process(process).net_connections())


def stopped_ranks(agent: int) -> list[psutil.Process]:
    """The agent's ranks that stand still."""
    stopped = []
    for rank in psutil.Process(agent).children():
        with suppress(psutil.NoSuchProcess):  # it has just died
            if rank.status() == psutil.STATUS_STOPPED:
                stopped.append(rank)
    return stopped


def is_to_end(process: psutil.Process) -> bool:
    """Whether SIGTERM waits for it to go on."""
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(pending[1], 16) >> (signal.SIGTERM - 1) & 1)


def repeated(stage: Stage, trials: Trials, folder: Path, wait: Callable[..., object], *, command: bool = False) -> None:
    """Runs with up to five kills each, until all trials are done; each ends with the bits of the undisturbed run."""
    for chance in trials:
        run, log = folder / str(trials.number), folder / f"{trials.number}.log"
        most = min(5, trials.count - trials.done)
        if command:
            agent = start_torchrun(["-m", "davae", *stage.arguments(run)], log, stage.settings, restarts=most)
        else:
            agent = start_agent(stage.program(run), log, stage.settings, restarts=most)
        starts = 0
        for processes in generations(agent):
            starts += 1
            if starts <= most:
                wait(chance, run, agent)
                with suppress(psutil.NoSuchProcess):  # it was done before
                    chance.choice(processes).kill()
        assert exit_code(agent) == 0, log.read_text()
        assert outcome(run) == outcome(stage.finished)
        trials.done += starts - 2  # the first start was no restart, and the loop counts one


CI, ONE, ELSE = (pytest.mark.soak("R16", ci=ci, full=10) for ci in (2, 1, 0))


@by(
    pytest.param("stage 1, DDP", marks=CI),
    pytest.param("stage 1, FSDP2", marks=[ELSE, pytest.mark.slow]),  # each layer of it is gathered by itself
    pytest.param("stage 2, DDP", marks=ONE),
    pytest.param("stage 2, FSDP2", marks=ONE),
)
@pytest.mark.timeout(3600)
def test_killed_at_random_moments(stage: Stage, trials: Trials, tmp_path: Path) -> None:
    """At a time between the start of the ranks and their end."""

    def wait(chance: random.Random, _run: Path, _agent: int) -> None:
        time.sleep(chance.uniform(0.05, 0.9) * stage.seconds)

    repeated(stage, trials, tmp_path, wait)


@by("stage 2, DDP", pytest.param("stage 1, DDP", marks=pytest.mark.slow))
@pytest.mark.soak("R16", ci=1, full=5)
@pytest.mark.timeout(3600)
def test_the_command_killed_while_it_trains(stage: Stage, trials: Trials, tmp_path: Path) -> None:
    """`torchrun -m davae ...`, as docs/cluster.md has it; after a random step."""

    def wait(chance: random.Random, run: Path, agent: int) -> None:
        step = chance.randint(1, stage.recipe.steps)
        wait_until(lambda: steps_done(run) >= step, agent)

    repeated(stage, trials, tmp_path, wait, command=True)


@by("stage 2, DDP")
@pytest.mark.soak("R16", ci=1, full=5)
def test_a_rank_that_stands_still_is_named(stage: Stage, trials: Trials, tmp_path: Path) -> None:
    """Within a minute; torchrun then starts the run anew, and it ends with the same bits."""
    for chance in trials:
        folder, log = tmp_path / str(trials.number), tmp_path / f"{trials.number}.log"
        agent = start_agent(stage.program(folder, "--rank-timeout", "8"), log, stage.settings, restarts=3)
        stopped = -1
        for processes in generations(agent):
            step = chance.randint(1, stage.recipe.steps - 1)
            if stopped < 0:
                wait_until(lambda step=step, folder=folder: steps_done(folder) >= step, agent)
                stopped, began = chance.randrange(2), time.monotonic()
                processes[stopped].suspend()
                said = f"rank {stopped} does not answer"
                wait_until(lambda log=log, said=said: said in log.read_text(), agent)
                assert said in log.read_text()
                assert time.monotonic() - began < 60
                with suppress(psutil.NoSuchProcess):
                    processes[stopped].resume()  # or else torchrun waits half a minute before it kills it
        assert exit_code(agent) == 0, log.read_text()
        assert outcome(folder) == outcome(stage.finished)


@by("stage 2, DDP")
def test_an_agent_that_leaves_and_comes_back(stage: Stage, tmp_path: Path) -> None:
    """`torchrun --nnodes 1:2`: killed with its rank, the other agent goes on alone; once it is back, they are two.

    Ranks stop by themselves where the next agent is to leave or to come, so that no speed of the machine matters.
    """
    folder, log, worlds = tmp_path / "run", tmp_path / "log", tmp_path / "worlds"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    program = stage.program(folder, "--rank-timeout", "30")

    def start(*, leaves: bool = False) -> int:
        def rank() -> None:
            with worlds.open("a") as file:
                file.write(os.environ["WORLD_SIZE"])
            # Alone, it waits for the other to come for the first time.
            while os.environ["WORLD_SIZE"] == "1" and "22" not in worlds.read_text():
                time.sleep(0.05)
            if leaves or worlds.read_text().endswith("221"):
                faults.arm("step:stop:3")
            program()

        return start_agent(rank, log, MEET_ANEW, restarts=1, ranks=1, nodes=(1, 2), endpoint=endpoint)

    first = start()
    wait_until(lambda: listens(first), first)
    second = start(leaves=True)
    wait_until(lambda: stopped_ranks(second) != [], first)
    for process in [psutil.Process(second), *psutil.Process(second).children()]:
        process.kill()
    assert exit_code(second) == -signal.SIGKILL
    wait_until(lambda: stopped_ranks(first) != [], first)
    [alone] = stopped_ranks(first)
    second = start()
    wait_until(lambda: is_to_end(alone), first)
    alone.resume()
    assert [exit_code(first), exit_code(second)] == [0, 0], log.read_text()
    assert re.fullmatch("1*221+22", worlds.read_text())
    runs = (read_metrics(run / "metrics.jsonl") for run in (folder, stage.finished))
    found, expected = ([line["loss"] for line in run] for run in runs)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-6
