"""Ranks that die, stop or change in number: the run goes on where it was, or says which rank it waited for."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rank_program
from davae.errors import RankError
from davae.record import read_metrics
from forks import exit_code, forked
from hashes import digests
from rank_forks import FSDP2, run_ranks, start_ranks
from rank_program import STEPS, signalled, train

LAST = f"checkpoints/step-{STEPS:08d}"
BOTH = pytest.mark.parametrize("settings", [{}, FSDP2], ids=["DDP", "FSDP2"])


def losses(folder: Path) -> list[str]:
    """Of every step, bit for bit."""
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(STEPS))
    return [line["loss_hex"] for line in lines]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    assert exit_code(forked(lambda: train(folder))) == 0
    return folder


@BOTH
def test_from_two_ranks_to_one_and_back(settings: dict[str, str], one: Path, tmp_path: Path) -> None:
    """A signal that comes to one rank stops all of them, at the end of the same step."""
    first, second = (signalled(signal.SIGTERM, step, rank) for step, rank in ((10, 1), (25, 0)))
    assert run_ranks(lambda: train(tmp_path, before=first), 2, settings) == [143, 143]
    assert sorted((tmp_path / "checkpoints").iterdir())[-1].name == "step-00000011"
    assert exit_code(forked(lambda: train(tmp_path, before=second))) == 143
    assert run_ranks(lambda: train(tmp_path), 2, settings) == [0, 0]
    found, expected = ([float.fromhex(loss) for loss in losses(folder)] for folder in (tmp_path, one))
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-6
    for name in ("mlp", "ema", "optimizer"):
        ours, theirs = (load_file(folder / LAST / f"{name}.safetensors") for folder in (tmp_path, one))
        assert ours.keys() == theirs.keys()
        assert all((tensor - theirs[key]).abs().max() < 1e-5 for key, tensor in ours.items())


@pytest.mark.parametrize(("settings", "stopped"), [({}, 1), (FSDP2, 0)], ids=["DDP, rank 1", "FSDP2, rank 0"])
def test_a_rank_that_is_stopped_is_named_and_waited_for_no_longer(
    settings: dict[str, str], stopped: int, tmp_path: Path
) -> None:
    began = time.monotonic()
    halt = signalled(signal.SIGSTOP, 5, stopped)
    pids = start_ranks(lambda: train(tmp_path, timeout=5.0, before=halt), 2, settings)
    assert exit_code(pids[1 - stopped]) == RankError.exit_code
    assert time.monotonic() - began < 60
    os.kill(pids[stopped], signal.SIGKILL)
    assert exit_code(pids[stopped]) == -signal.SIGKILL
    assert f"rank {1 - stopped} of 2" in (tmp_path / "rank_errors").read_text()
    assert f"rank {stopped} does not answer" in (tmp_path / "rank_errors").read_text()
    assert run_ranks(lambda: train(tmp_path), 2, settings) == [0, 0]
    assert len(losses(tmp_path)) == STEPS


def torchrun_killed(folder: Path, kills: int, settings: dict[str, str], chance: random.Random) -> None:
    """Run the program under torchrun on two ranks, and kill one of them, by chance, again and again."""
    program = Path(rank_program.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    command += ["--max-restarts", str(kills), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    with (folder.parent / "torchrun.log").open("wb") as log:
        run = subprocess.Popen([*command, str(program), str(folder)], env=environment, stdout=log, stderr=log)
    pids: set[str] = set()
    for _ in range(kills):
        while len(new := {path.name for path in folder.glob("pids/*")} - pids) < 2:
            assert run.poll() is None, (folder.parent / "torchrun.log").read_text()
            time.sleep(0.05)
        pids |= new
        time.sleep(chance.uniform(0.0, 1.0))
        try:
            os.kill(int(chance.choice(sorted(new))), signal.SIGKILL)
        except ProcessLookupError:  # the run was over before this kill
            break
    assert run.wait(timeout=120) == 0, (folder.parent / "torchrun.log").read_text()


FEW = pytest.param(5, {}, id="5 kills, DDP", marks=pytest.mark.timeout(600))
MANY = pytest.param(50, FSDP2, id="50 kills, FSDP2", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.soak("R16")
@pytest.mark.parametrize(("kills", "settings"), [FEW, MANY])
def test_killed_again_and_again_torchrun_ends_with_the_same_losses(
    kills: int, settings: dict[str, str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", kills)
    assert run_ranks(lambda: train(tmp_path / "whole"), 2, settings) == [0, 0]
    torchrun_killed(tmp_path / "killed", kills, settings, random.Random(kills))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert digests(tmp_path / "killed" / LAST) == digests(tmp_path / "whole" / LAST)
