"""Faults on purpose: what can be asked for, and that nothing happens unless it is."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from davae.errors import SettingsError
from davae.run import faults
from davae.run.storage import write_atomically
from forks import exit_code, forked

PACKAGE = Path(faults.__file__).parents[1]


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    faults.arm("")


def test_without_a_fault_everything_passes() -> None:
    faults.arm("")
    tensor = torch.ones(3)
    assert faults.at("loss", tensor) is tensor
    assert faults.at("clip") is None


def test_every_site_is_somewhere_in_the_code() -> None:
    code = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "faults.py")
    assert {*faults.SITES} - {"save"} == set(re.findall(r'faults\.at\(\s*"([\w.]+)"', code))


@pytest.mark.parametrize(
    "text",
    ["loss", "loss:nan", "loss:nan:0", "loss:nan:x", "los:nan:1", "loss:explode:1", "clip:nan:1", "loss:flip:1", "::"],
)
def test_a_fault_that_cannot_be_is_an_error(text: str) -> None:
    with pytest.raises(SettingsError, match=f"DAVAE_FAULT={text}"):
        faults.arm(text)


@pytest.mark.parametrize(("action", "number"), [("nan", math.nan), ("inf", math.inf), ("huge", 1e30)])
def test_a_number_is_put_into_the_nth_visits_first_element_and_its_gradient(action: str, number: float) -> None:
    faults.arm(f"loss:{action}:2")
    weight = torch.ones(2, 3, requires_grad=True)
    assert faults.at("loss", weight) is weight
    assert faults.at("data", weight) is weight
    changed = faults.at("loss", weight)
    torch.testing.assert_close(changed.flatten()[0].item(), torch.tensor(number).item(), equal_nan=True)
    assert torch.equal(changed.flatten()[1:], weight.flatten()[1:])
    changed.sum().backward()
    assert not weight.grad[0, 0].abs() < 1e29
    assert faults.at("loss", weight) is weight
    assert torch.equal(weight, torch.ones(2, 3))


def test_every_visit() -> None:
    faults.arm("step:eio:*")
    for _ in range(3):
        with pytest.raises(OSError, match="error") as caught:
            faults.at("step")
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(("action", "signum"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_a_signal(action: str, signum: int) -> None:
    def program() -> None:
        faults.arm(f"backward:{action}:1")
        faults.at("backward")

    assert exit_code(forked(program)) == -signum


def test_stopped_until_told_to_go_on() -> None:
    def program() -> None:
        faults.arm("eval:stop:1")
        faults.at("eval")

    pid = forked(program)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(pid, signal.SIGCONT)
    assert exit_code(pid) == 0


def test_a_power_cut_takes_what_was_not_synced(tmp_path: Path) -> None:
    def program() -> None:
        faults.arm("save.fsync:cut:1")
        write_atomically(tmp_path / "file", b"content")

    assert exit_code(forked(program)) == -signal.SIGKILL
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]

    def later() -> None:
        faults.arm("save.rename:cut:1")
        write_atomically(tmp_path / "other", b"content")

    assert exit_code(forked(later)) == -signal.SIGKILL
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [0, 7]


def test_it_is_read_from_the_environment_once() -> None:
    code = "from davae.run import faults; faults.at('step')"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "DAVAE_FAULT": "step:kill:1"}, check=False)
    assert run.returncode == -signal.SIGKILL
