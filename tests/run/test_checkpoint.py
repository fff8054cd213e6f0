import errno
import hashlib
import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from davae.errors import CheckpointError, NumericsError, StorageError
from davae.run import faults
from davae.run.checkpoint import (
    FORMAT_VERSION,
    Checkpoint,
    DamagedCheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from davae.run.storage import remove_temporaries
from forks import exit_code, forked
from trials import Trials

DIGEST = "c0ffee" * 10 + "beef"


def sample(step: int) -> Checkpoint:
    numbers = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(4, 3, generator=numbers), "conv.bias": torch.randn(4, generator=numbers)}
    moments = {"conv.weight/step": torch.tensor(float(step)), "half": torch.ones(3, dtype=torch.bfloat16)}
    counts = {"batches": torch.tensor(step), "none": torch.zeros(0)}
    return Checkpoint(step, {"model": weights | counts, "optimizer": moments}, {"skipped": step, "seconds": 0.1})


def save(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        save_checkpoint(folder, sample(step), recipe_digest=DIGEST, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    save_checkpoint(tmp_path / "new" / "folder", sample(100), recipe_digest=DIGEST, keep=1)
    path = tmp_path / "new" / "folder" / "step-00000100"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    original = sample(100)
    for verified in (False, True):
        back = load_checkpoint(path, recipe_digest=DIGEST, verified=verified)
        assert (back.step, back.values, list(back.groups)) == (original.step, original.values, list(original.groups))
        for group, tensors in original.groups.items():
            assert back.groups[group].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert back.groups[group][name].dtype == tensor.dtype
                assert torch.equal(back.groups[group][name], tensor)


def test_files_are_verified_unless_they_are_already(tmp_path):
    save(tmp_path, 1)
    path = latest_checkpoint(tmp_path)
    save_file(dict(sample(2).groups["model"]), path / "model.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors"):
        load_checkpoint(path, recipe_digest=DIGEST)
    back = load_checkpoint(path, recipe_digest=DIGEST, verified=True)
    assert all(torch.equal(tensor, sample(2).groups["model"][name]) for name, tensor in back.groups["model"].items())


def test_the_umask_decides_who_may_read_a_checkpoint(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "step-00000001").iterdir()} == {0o640}


def test_the_newest_is_found_and_the_newest_few_are_kept(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    save(tmp_path, 9, 10, 100, 99_999_999, 100_000_000)
    assert names(tmp_path) == ["step-00000100", "step-100000000", "step-99999999"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path):
    save(tmp_path, 1)
    for name in ("step-00000005.tmp-deadbeef", "step-latest", "samples", "damaged-step-00000003-aa"):
        (tmp_path / name).mkdir()
    save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["damaged-step-00000003-aa", "samples", "step-00000002", "step-latest"]


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def append(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(3))


def delete(path: Path, _chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, _chance: random.Random) -> None:
    shutil.copy(path.parent.with_name("step-00000001") / path.name, path)


def empty(path: Path, _chance: random.Random) -> None:
    path.write_bytes(b"")


def foreign(path: Path, _chance: random.Random) -> None:
    """The file of the same step of another run."""
    other = sample(2)
    other.values["seconds"] = 0.2
    other.groups["model"]["conv.bias"][0] = other.groups["optimizer"]["half"][0] = 7
    save_checkpoint(path.parents[1] / "other", other, recipe_digest="f" * 64, keep=1)
    shutil.copy(path.parents[1] / "other" / "step-00000002" / path.name, path)


def not_finite(path: Path, chance: random.Random) -> None:
    """Numbers that a disk or a memory made, with a manifest that fits them."""
    file = path.parent / "model.safetensors"
    tensors = load_file(file)
    tensors["conv.bias"][chance.randrange(4)] = chance.choice([float("nan"), float("inf"), -float("inf"), 1e30])
    save_file(tensors, file)
    reseal(path.parent)


def reseal(folder: Path, **changes: object) -> None:
    """Make the manifest fit the files, as one who knows the format could."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    for name in manifest["files"] if "files" not in changes else ():
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["digest"]
    written = lambda: json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()  # noqa: E731
    manifest["digest"] = hashlib.sha256(written()).hexdigest()
    (folder / "manifest.json").write_bytes(written())


DAMAGES = [flip_a_bit] * 6 + [truncate] * 4 + [append, delete, swap, empty, foreign, not_finite]


@pytest.mark.soak("R3", ci=300, full=5000)
def test_every_damage_is_found_and_an_older_checkpoint_is_used(tmp_path, caplog, trials: Trials):
    source = tmp_path / "source"
    save(source, 1, 2)
    files = names(source / "step-00000002")
    for chance in trials:
        folder = tmp_path / "trial"
        shutil.copytree(source, folder)
        victim, damage = folder / "step-00000002" / chance.choice(files), chance.choice(DAMAGES)
        damage(victim, chance)

        caplog.clear()
        assert latest_checkpoint(folder) == folder / "step-00000001", damage
        message = caplog.records[0].getMessage()
        assert caplog.records[0].levelno == logging.WARNING
        assert "step-00000002" in message
        if damage not in (swap, foreign, not_finite):  # a foreign manifest shows in the first file it does not fit
            assert victim.name in message

        # Nothing of the damaged one is lost.
        aside = next(folder.glob("damaged-step-00000002-*"))
        assert set(names(aside)) >= set(files) - {victim.name}
        shutil.rmtree(folder)


LAYOUTS = [
    {"model": 1, "optimizer": 1},
    {"autoencoder": 1, "ema": 1, "optimizer": 1, "discriminator": 1, "discriminator_optimizer": 1},
    {"transformer": 1},
]
"""Groups of tensors, as of a plain run, of stage 1 with a discriminator, and of one file."""


@pytest.mark.soak("R2", ci=1, full=3)
def test_a_save_that_dies_at_any_operation_leaves_the_old_or_the_new(tmp_path, trials: Trials):
    """Killed right before each file operation of a save, or by a power cut that takes what was not synced with it."""
    for chance in trials:
        layout = LAYOUTS[trials.number % len(LAYOUTS)]

        def checkpoint(step: int, layout=layout, chance=chance) -> Checkpoint:
            numbers = torch.Generator().manual_seed(step)
            groups = {name: {"weight": torch.randn(5, generator=numbers)} for name in layout}
            return Checkpoint(step, groups, {"steps": step})

        for action in ("kill", "cut"):
            for nth in range(1, 200):
                folder = tmp_path / f"{trials.number} {action} {nth}"
                save_checkpoint(folder, checkpoint(1), recipe_digest=DIGEST, keep=1)

                def dies(fault: str = f"save:{action}:{nth}", folder: Path = folder) -> None:
                    faults.arm(fault)
                    save_checkpoint(folder, checkpoint(2), recipe_digest=DIGEST, keep=1)

                # Either checkpoint is whole, whatever the operation was.
                code = exit_code(forked(dies))
                assert code in (0, -signal.SIGKILL)
                newest = latest_checkpoint(folder)
                restored = load_checkpoint(newest, recipe_digest=DIGEST)
                expected = checkpoint(restored.step)
                assert restored.values == expected.values
                assert all(torch.equal(restored.groups[g]["weight"], expected.groups[g]["weight"]) for g in layout)
                assert not list(folder.glob("damaged-*")), "half a checkpoint had a name"
                remove_temporaries(folder)
                assert names(folder)[-1] == newest.name
                if code == 0:
                    break
            assert restored.step == 2
            assert nth > 12 + 2 * len(layout), f"a save has only {nth - 1} operations?"


HOSTILE = {
    "version of text": {"format_version": "1"},
    "no version": {"format_version": None},
    "no step": {"step": None},
    "no files": {"files": []},
    "a file elsewhere": {"files": {"../state.json": {"bytes": 1, "sha256": ""}}},
    "an absolute path": {"files": {"/etc/hostname": {"bytes": 1, "sha256": ""}}},
    "no fingerprint": {"files": {"state.json": None, "model.safetensors": 3}},
    "no state": {"files": {}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_that_fits_its_digest_is_still_checked(tmp_path, changes):
    save(tmp_path, 1)
    reseal(tmp_path / "step-00000001", **changes)
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(tmp_path / "step-00000001", recipe_digest=DIGEST)


@pytest.mark.parametrize("action", ["flip", "truncate"])
def test_what_the_disk_did_not_take_is_seen_before_the_old_one_goes(tmp_path, action):
    save(tmp_path, 1, keep=1)
    faults.arm(f"save.fsync:{action}:1")
    try:
        with pytest.raises(DamagedCheckpointError):
            save_checkpoint(tmp_path, sample(2), recipe_digest=DIGEST, keep=1)
    finally:
        faults.arm("")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"


def test_one_that_the_disk_does_not_give_back_is_set_aside(tmp_path):
    save(tmp_path, 1, 2)
    faults.arm("load:eio:1")
    try:
        assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    finally:
        faults.arm("")
    assert len(list(tmp_path.glob("damaged-step-00000002-*"))) == 1


def test_all_damaged_means_none_and_is_said(tmp_path, caplog):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / "state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) is None
    assert len(list(tmp_path.glob("damaged-*"))) == 2
    assert [record.getMessage().startswith("no sound checkpoint is left") for record in caplog.records] == [
        *(False, False),
        True,
    ]
    caplog.clear()
    assert latest_checkpoint(tmp_path / "new") is None
    assert not caplog.records


def test_a_renamed_checkpoint_is_damaged(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    with pytest.raises(DamagedCheckpointError, match="holds step 1"):
        verify_checkpoint(tmp_path / "step-00000009")


def test_a_newer_format_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("davae.run.checkpoint.FORMAT_VERSION", FORMAT_VERSION + 1)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}") as caught:
        latest_checkpoint(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert names(tmp_path) == ["step-00000001"]


def test_another_recipe_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"c0ffeec0ffee.*123456789abc.*new folder") as caught:
        load_checkpoint(tmp_path / "step-00000001", recipe_digest="123456789abcdef")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_never_written(tmp_path, number):
    save(tmp_path, 1, keep=1)
    bad = sample(2)
    bad.groups["model"]["conv.bias"][3] = number
    with pytest.raises(NumericsError, match=r"step 2: model tensor conv\.bias"):
        save_checkpoint(tmp_path, bad, recipe_digest=DIGEST, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_what_cannot_be_written_leaves_the_old_checkpoints_and_no_litter(tmp_path):
    save(tmp_path, 1, keep=1)
    name_too_long = Checkpoint(2, {"x" * 300: {"weight": torch.ones(2)}}, {})
    with pytest.raises(StorageError, match=r"step-00000002.* 8 bytes are needed, [\d,]+ are free") as caught:
        save_checkpoint(tmp_path, name_too_long, recipe_digest=DIGEST, keep=1)
    assert caught.value.exit_code == 5
    assert names(tmp_path) == ["step-00000001"]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        save_checkpoint(tmp_path / "file" / "below", sample(2), recipe_digest=DIGEST, keep=1)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path):
    vast = torch.empty(1).expand(shutil.disk_usage(tmp_path).free // 4 + 1024)
    with pytest.raises(StorageError, match=f"Errno {errno.ENOSPC}"):
        save_checkpoint(tmp_path / "run", Checkpoint(1, {"model": {"vast": vast}}, {}), recipe_digest=DIGEST, keep=1)
    assert names(tmp_path / "run") == []


def test_the_manifest_names_every_file(tmp_path):
    save(tmp_path, 7)
    manifest = json.loads((tmp_path / "step-00000007" / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (tmp_path / "step-00000007" / name).stat().st_size
