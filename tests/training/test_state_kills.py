"""A run that is killed, stopped, or short of disk goes on with the same bits."""

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
from torch import Tensor

from davae.data.stored import FileBytes, LocalFile
from davae.errors import DataError, StorageError
from davae.run import faults
from davae.run.checkpoint import latest_checkpoint
from davae.training.interruption import Interrupted
from forks import exit_code, forked
from rank_forks import run_ranks
from tiny_training import STEPS, loss_of, outcome, same, snapshot, tiny_model, tiny_state, train
from trials import Trials


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[dict[str, str], list[dict]], float]:
    """The outcome of a run that nothing disturbs, and how long it took."""
    folder = tmp_path_factory.mktemp("reference")
    began = time.monotonic()
    assert exit_code(forked(lambda: train(folder))) == 0
    took = time.monotonic() - began
    digests, lines = outcome(folder)
    assert set(digests) == {"mlp.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert len(lines) == STEPS + 4
    return (digests, lines), took


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, reference):
    expected, took = reference
    chance = random.Random(3)
    kills = 0
    for trial in range(5):
        folder = tmp_path / str(trial)
        for attempt in range(8):
            pid = forked(lambda folder=folder: train(folder))
            if attempt < 7:
                time.sleep(chance.uniform(0.0, 0.5 * took))
                os.kill(pid, signal.SIGKILL)
            code = exit_code(pid)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert outcome(folder) == expected
        assert not list((folder / "checkpoints").glob("*.tmp-*"))
    assert kills >= 10, "the runs were over before they could be killed"


def test_a_run_killed_before_any_file_operation_of_a_save_ends_with_the_same_bits(tmp_path, reference):
    expected, _ = reference
    start = tmp_path / "start"
    code = exit_code(forked(lambda: stop_at(start, 20)))
    assert code == 143

    def killed_at(folder: Path, operation: int) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open")
            if writes and "checkpoints" in str(arguments[0]) and "step-00000025" in str(arguments):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        train(folder)

    for operation in range(1, 100):
        folder = tmp_path / str(operation)
        shutil.copytree(start, folder)
        code = exit_code(forked(lambda folder=folder, operation=operation: killed_at(folder, operation)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert exit_code(forked(lambda folder=folder: train(folder))) == 0
        assert outcome(folder) == expected
    assert operation > 12, f"a save has only {operation - 1} operations?"


def stop_at(folder: Path, step_to_stop: int, **changes: object) -> None:
    """Train, and get SIGTERM in the middle of the step before `step_to_stop`."""

    def before(step: int) -> None:
        if step == step_to_stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train(folder, before=before, **changes)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_step_boundary_and_leaves(tmp_path, signum):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    model = tiny_model()
    state = tiny_state(tmp_path, model)

    def run() -> None:
        for step in state.steps():
            if step == 7:
                os.kill(os.getpid(), signum)
            state.update(loss_of(state, model, step))

    with pytest.raises(Interrupted, match="saved after 8 steps") as caught:
        run()
    assert caught.value.exit_code == 128 + signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    again = tiny_model()
    resumed = tiny_state(tmp_path, again)
    assert resumed.step == 8
    assert same(snapshot(resumed, again), snapshot(state, model))


def test_a_signal_during_the_last_save_stops_the_program(tmp_path):
    def before(step: int) -> None:
        if step == STEPS:  # by the last save alone
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"saved after {STEPS} steps") as caught:
        train(tmp_path, before=before)
    assert caught.value.exit_code == 143
    assert tiny_state(tmp_path, tiny_model(), precision="bf16").step == STEPS


def test_a_run_stopped_by_a_signal_and_started_again_ends_with_the_same_bits(tmp_path, reference):
    assert exit_code(forked(lambda: stop_at(tmp_path, 13))) == 128 + signal.SIGTERM
    assert exit_code(forked(lambda: train(tmp_path))) == 0
    assert outcome(tmp_path) == reference[0]


def test_the_second_signal_acts_as_before(tmp_path):
    def program() -> None:
        model = tiny_model()
        state = tiny_state(tmp_path, model)
        for step in state.steps():
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            state.update(loss_of(state, model, step))

    assert exit_code(forked(program)) == -signal.SIGTERM


def test_handlers_come_back_when_the_loop_is_left(tmp_path):
    def former(_signum: int, _frame: FrameType | None) -> None:
        raise AssertionError("never sent")

    original = signal.signal(signal.SIGTERM, former)
    try:
        model = tiny_model()
        state = tiny_state(tmp_path, model)
        for step in state.steps():
            assert signal.getsignal(signal.SIGTERM) is not former
            state.update(loss_of(state, model, step))
            if step == 1:
                break
        assert signal.getsignal(signal.SIGTERM) is former
    finally:
        signal.signal(signal.SIGTERM, original)


def test_a_damaged_newest_checkpoint_falls_back_and_the_outcome_is_the_same(tmp_path, reference, caplog):
    assert exit_code(forked(lambda: stop_at(tmp_path, 23))) == 143
    victim = tmp_path / "checkpoints" / "step-00000023" / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert tiny_state(tmp_path, tiny_model(), precision="bf16").step == 20
    assert "optimizer.safetensors is damaged: its SHA-256" in caplog.text
    assert exit_code(forked(lambda: train(tmp_path))) == 0
    assert outcome(tmp_path) == reference[0]


def with_a_small_disk(chance: random.Random, program: Callable[[], object]) -> Callable[[], object]:
    """A program whose files cannot grow beyond some size, or whose file operations fail once or from once on."""
    limit, nth = chance.randrange(3000), chance.randint(1, 40)
    what = chance.choice(["limit", f"save:enospc:{nth}", f"save:eio:{nth}", "save.write:enospc:*", "save.fsync:eio:*"])

    def run() -> None:
        if what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        else:
            faults.arm(what)
        program()

    return run


@pytest.mark.soak("R4", ci=20, full=200)
def test_a_full_or_failing_disk_keeps_the_last_good_checkpoint(tmp_path, reference, trials: Trials):
    start = tmp_path / "start"
    assert exit_code(forked(lambda: stop_at(start, 30, log_every=100))) == 143
    assert max(path.stat().st_size for path in start.glob("checkpoints/step-00000030/*")) > 2800
    for chance in trials:
        folder = tmp_path / "run"
        shutil.copytree(start, folder)
        plain = partial(train, folder, log_every=100)
        program = with_a_small_disk(chance, plain)
        for _ in range(2):  # a supervisor that starts it again does no harm either
            code = exit_code(forked(program))
            assert code in (0, StorageError.exit_code)
            newest = latest_checkpoint(folder / "checkpoints")
            assert newest >= folder / "checkpoints" / "step-00000030"
            assert not list(folder.rglob("damaged-*"))
            if newest.name == "step-00000030":  # nothing failed while the old ones were removed
                assert not list(folder.rglob("*.tmp-*"))
        assert exit_code(forked(plain)) == 0
        assert outcome(folder)[0] == reference[0][0]
        assert not list(folder.rglob("*.tmp-*"))
        shutil.rmtree(folder)


def test_a_folder_that_is_read_only_is_a_storage_error(tmp_path_factory):
    folder = Path(tempfile.mkdtemp())  # not pytest's, which only its owner may enter

    def train_as_somebody() -> None:
        if os.getuid() == 0:  # who may write everywhere
            os.setresuid(65534, 65534, 65534)
        train(folder, steps=5)

    try:
        train(folder, steps=5)
        folder.chmod(0o555)
        (folder / "checkpoints").chmod(0o555)
        assert exit_code(forked(train_as_somebody)) == StorageError.exit_code
        assert latest_checkpoint(folder / "checkpoints").name == "step-00000005"
    finally:
        folder.chmod(0o755)
        (folder / "checkpoints").chmod(0o755)
        shutil.rmtree(folder)


def read_and_train(folder: Path, fails: dict[int, str], **changes: object) -> dict[str, Tensor]:
    """Ten steps, before each of which a file is read, with faults at some of them."""
    path = folder.parent / "batch"
    path.write_bytes(b"crops")
    file = FileBytes("batch", LocalFile(str(path)), 0, 5)
    model = tiny_model()
    state = tiny_state(folder, model, steps=10, checkpoint_every=100, **changes)
    load = state.saving(lambda number: file.read())
    for step in state.steps():
        faults.arm(fails.get(step, ""))
        assert load(step) == b"crops"
        state.update(loss_of(state, model, step))
    return snapshot(state, model)


def test_a_file_that_one_rank_cannot_read_ends_all_of_them_after_a_save(tmp_path, capfd):
    def program(name: str, fault: str) -> None:
        read_and_train(tmp_path / name, {7: fault} if os.environ["RANK"] == "1" else {})

    assert run_ranks(lambda: program("run", "read:eio:*"), 2) == [DataError.exit_code] * 2
    said = capfd.readouterr().err
    assert "batch: cannot be read, 3 times tried" in said
    assert "another rank could not read its part of batch 7" in said
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000007"

    # The same command goes on to the same weights.
    for name in ("run", "whole"):
        assert run_ranks(lambda name=name: program(name, ""), 2) == [0, 0]
    last = "checkpoints/step-00000010/mlp.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_a_file_that_can_no_longer_be_read_ends_a_run_after_a_save(tmp_path):
    """Three attempts, a checkpoint of all steps that are done, and an error that sends to the disk."""
    expected = read_and_train(tmp_path / "whole", {})
    try:
        with pytest.raises(DataError, match=r"batch: cannot be read, 3 times tried .*look at its disk or mount"):
            read_and_train(tmp_path / "run", {2: "read:eio:1", 7: "read:eio:*"})
    finally:
        faults.arm("")
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000007"
    assert same(read_and_train(tmp_path / "run", {}), expected)
