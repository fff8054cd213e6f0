"""Ranks that die, stop or change in number: the run goes on where it was, or says which rank it waited for."""

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from davae.errors import RankError
from davae.run.record import read_metrics
from forks import exit_code, forked
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


def test_rank_0_that_is_stopped_is_named_and_waited_for_no_longer(tmp_path: Path) -> None:
    """It has the store in which ranks look for each other, and torchrun is not there to have it."""
    settings, stopped = FSDP2, 0
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
