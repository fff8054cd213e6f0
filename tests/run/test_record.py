import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from davae.errors import SettingsError, StorageError
from davae.run import record as record_module
from davae.run.recipe import Recipe, load_recipe
from davae.run.record import RunRecord, alone, environment, read_metrics
from davae.run.storage import write_atomically


class Sample(Recipe):
    """A small recipe."""

    steps: int = 3
    """Optimiser steps."""


def test_start_writes_the_recipe_and_the_environment(tmp_path):
    record = RunRecord(tmp_path / "runs" / "one")
    record.start(Sample(steps=5), device="cpu", precision="bf16")
    assert load_recipe(Sample, record.folder / "recipe.toml") == Sample(steps=5)
    where = json.loads((record.folder / "environment.json").read_text())
    assert (where["device"], where["precision"]) == ("cpu", "bf16")
    assert where["cpu_count"] >= 1
    assert where["versions"]["torch"].startswith("2.")
    assert sorted(path.name for path in record.folder.iterdir()) == ["environment.json", "recipe.toml"]


def test_metrics_are_appended_and_read_back(tmp_path):
    record = RunRecord(tmp_path)
    lines = [{"step": step, "loss": step / 3, "loss_hex": (step / 3).hex()} for step in range(5)]
    for line in lines:
        record.append(line)
    record.append({"step": 5, "loss": math.nan, "more": [1.0, -math.inf]})
    assert read_metrics(record.metrics_path) == [*lines, {"step": 5, "loss": None, "more": [1.0, None]}]


def test_truncation_drops_later_steps_and_a_line_cut_short(tmp_path):
    record = RunRecord(tmp_path)
    record.truncate(3)  # nothing there yet
    for step in (0, 1, 2, 2, 3, 4):
        record.append({"step": step})
    with record.metrics_path.open("ab") as file:
        file.write(b'{"step": 1, "lo')
    assert [line["step"] for line in read_metrics(record.metrics_path)] == [0, 1, 2, 2, 3, 4]
    record.truncate(3)
    assert record.metrics_path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 2))


DAMAGE = [b"\0" * 64, b"", b"\xff\xfe\x00", b'{"step": 1, "lo', b"[1]", b'{"loss": 1}', b"[" * 9999]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lines_are_passed_over_and_dropped_with_a_warning(tmp_path, damage, caplog):
    record = RunRecord(tmp_path)
    record.append({"step": 0})
    with record.metrics_path.open("ab") as file:
        file.write(damage + b"\n")
    record.append({"step": 1})
    assert read_metrics(record.metrics_path) == [{"step": 0}, {"step": 1}]
    assert caplog.messages == [f"{record.metrics_path}: 1 of its 3 lines are damaged, and passed over"]
    record.truncate(1)
    assert record.metrics_path.read_text() == '{"step": 0}\n'


def test_the_result_says_where_its_numbers_are_from_and_holds_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/usr/lib/davae", "evaluate", "--out=/srv/somebody/runs/x", str(Path.cwd() / "a" / "b.toml")]
    )
    record = RunRecord(tmp_path)
    values = {"psnr": 30.5, "kid": math.nan, "model": Path("/srv/somebody/model"), "ratio": "3/4", "list": ["/etc/a"]}
    record.finish(values, recipe=Sample(), device="cpu", seed=7, counts={"pictures": 185})
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text)
    assert result["values"] == {"psnr": 30.5, "kid": None, "model": "model", "ratio": "3/4", "list": ["a"]}
    assert result["command"] == ["davae", "evaluate", "--out=x", "a/b.toml"]
    assert (result["recipe_digest"], result["seed"], result["counts"]) == (Sample().digest(), 7, {"pictures": 185})
    assert {"commit", "versions", "device", "finished"} <= result.keys()
    assert "/srv" not in text


def test_web_addresses_and_relative_paths_stay(tmp_path):
    record = RunRecord(tmp_path)
    record.finish(
        {"url": "https://example.org/a/b", "path": "runs/demo/x", "home": "~/x"},
        recipe=Sample(), device="cpu", seed=0, counts={},
    )  # fmt: skip
    values = json.loads((tmp_path / "result.json").read_text())["values"]
    assert values == {"url": "https://example.org/a/b", "path": "runs/demo/x", "home": "~/x"}


def test_the_commit_is_that_of_the_checkout_or_none():
    commit = environment()["commit"]
    assert commit is None or len(commit.removesuffix("-dirty")) in (40, 64)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_change_anywhere_in_the_package_makes_the_commit_dirty(tmp_path: Path) -> None:
    package = Path(record_module.__file__).parents[1]
    shutil.copytree(package / "run", tmp_path / "davae" / "run")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(package / name, tmp_path / "davae")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)

    code = """
from pathlib import Path
from davae.run.record import environment
print(environment()["commit"])
Path("davae/errors.py").open("a").write("# changed")
print(environment()["commit"])
"""
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    before, after = run.stdout.split()
    assert len(before) in (40, 64)
    assert after == f"{before}-dirty"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*folder.* 3 bytes are needed, [\d,]+ are free") as caught:
        write_atomically(tmp_path / "folder", b"abc")
    assert caught.value.exit_code == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "result.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_a_storage_error(tmp_path):
    record = RunRecord(tmp_path)
    record.metrics_path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        record.append({"step": 0})


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        RunRecord(tmp_path / "file" / "run")


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SettingsError, match="is a file, or lies below one"), alone(folder):
            pass
