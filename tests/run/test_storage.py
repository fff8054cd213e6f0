import errno
import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from davae.errors import StorageError
from davae.run import faults
from davae.run.storage import finite, remove_temporaries, replaced_whole, write_atomically, write_json
from forks import exit_code, forked


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that is there already."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_is_new_in_all_of_its_files(old: Path) -> None:
    with replaced_whole(old) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "new.txt").write_text("new")
        assert contents(old) == {"old.txt": "old"}
    assert contents(old.parent) == {"result/deep/new.txt": "new"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replaced_whole(tmp_path / "run") as partial:
            (partial / "deep").mkdir(0o700)
            save_file({"x": torch.zeros(1)}, partial / "deep" / "x.safetensors")
        assert (tmp_path / "run" / "deep").stat().st_mode & 0o777 == 0o777 & ~umask
        assert (tmp_path / "run" / "deep" / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)


def test_a_link_stays_and_what_it_leads_to_is_replaced(old: Path, tmp_path: Path) -> None:
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(old)
    dangling.symlink_to(tmp_path / "scratch" / "run")
    for folder in (link, link, dangling):
        with replaced_whole(folder) as partial:
            (partial / "new.txt").write_text("new")
    assert link.readlink() == old
    assert contents(old) == contents(dangling) == {"new.txt": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "result", "scratch"]


def test_a_folder_and_its_parents_are_made(tmp_path: Path) -> None:
    with replaced_whole(tmp_path / "a" / "b") as partial:
        (partial / "new.txt").write_text("new")
    assert contents(tmp_path) == {"a/b/new.txt": "new"}


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_the_old_folder_and_no_litter(old: Path, error: BaseException) -> None:
    def write() -> None:
        with replaced_whole(old) as partial:
            (partial / "new.txt").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(old.parent) == {"result/old.txt": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left")])
def test_a_full_disk_is_a_storage_error(old: Path, error: Exception) -> None:
    def write() -> None:
        with replaced_whole(old) as partial:
            (partial / "new.txt").write_text("12345")
            raise error

    with pytest.raises(StorageError, match=r"result: .*No space left.* 5 bytes are needed"):
        write()
    assert contents(old.parent) == {"result/old.txt": "old"}


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(old: Path) -> None:
    def write() -> None:
        with replaced_whole(old) as partial:
            partial.rmdir()  # somebody tidies up

    with pytest.raises(StorageError):
        write()
    assert contents(old.parent) == {"result/old.txt": "old"}


def test_what_killed_writers_left_is_overcome(old: Path) -> None:
    def killed(fault: str) -> None:
        faults.arm(fault)
        with replaced_whole(old) as partial:
            (partial / "new.txt").write_text("new")

    # Before the two folders change places, and right after it: there always is a whole one.
    for fault, expected in (("save.rename:kill:1", {"old.txt": "old"}), ("save.fsync:kill:3", {"new.txt": "new"})):
        assert exit_code(forked(lambda fault=fault: killed(fault))) == -signal.SIGKILL
        assert contents(old) == expected

    # Where folders cannot change places, a kill between two renames left the old one aside.
    old.rename(old.with_name(".result.old"))

    def write_badly() -> None:
        with replaced_whole(old):
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_badly()
    assert contents(old.parent) == {"result/new.txt": "new"}
    with replaced_whole(old) as partial:
        (partial / "newer.txt").write_text("newer")
    assert contents(old.parent) == {"result/newer.txt": "newer"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


def test_of_two_writers_at_once_one_result_stays_whole(old: Path) -> None:
    with replaced_whole(old) as first:
        (first / "a.txt").write_text("first")
        with replaced_whole(old) as second:
            (second / "b.txt").write_text("second")
        assert contents(old) == {"b.txt": "second"}
        (first / "c.txt").write_text("first")
    assert contents(old.parent) == {"result/a.txt": "first", "result/c.txt": "first"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


# -------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.txt", b"first")
    write_atomically(tmp_path / "a" / "b.txt", b"second")
    assert contents(tmp_path) == {"a/b.txt": "second"}


def test_a_file_that_cannot_be_written_keeps_its_content_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, b"old")

    def on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        write_atomically(path, b"n" * 100)

    assert exit_code(forked(on_a_full_disk)) == StorageError.exit_code
    assert contents(tmp_path) == {"file.txt": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_a_file_below_a_file_is_a_storage_error_that_says_how_much_room_there_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(StorageError, match=r"cannot write .*below: .*3 bytes are needed, [\d,]+ are free"):
        write_atomically(tmp_path / "file" / "below", b"new")
    assert contents(tmp_path) == {"file": "old"}


def test_a_folder_in_the_place_of_a_file_stays(old: Path) -> None:
    with pytest.raises(StorageError):
        write_atomically(old, b"new")
    assert contents(old.parent) == {"result/old.txt": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


def test_litter_is_removed_but_not_from_folders_with_a_lock_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "cache" / "latents").mkdir(parents=True)
    for name in (".lock", ".a.json.tmp-1", "cache/.b.tmp-2", "cache/latents/.lock", "cache/latents/.c.tmp-3", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".run.tmp-new" / "deep").mkdir(parents=True)
    remove_temporaries(tmp_path)
    assert not (tmp_path / ".run.tmp-new").exists()
    assert set(contents(tmp_path)) == {".lock", "cache/latents/.lock", "cache/latents/.c.tmp-3", "d.txt"}
    remove_temporaries(tmp_path / "cache" / "latents")
    assert set(contents(tmp_path)) == {".lock", "cache/latents/.lock", "d.txt"}


def test_json_says_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"psnr": math.inf, "rows": [1.5, math.nan, (2, -math.inf)], "n": 3})
    assert json.loads((tmp_path / "result.json").read_text()) == {"psnr": None, "rows": [1.5, None, [2, None]], "n": 3}
    assert finite({"flag": True, "none": None}) == {"flag": True, "none": None}


def test_json_that_cannot_be_written_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"n": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "result.json", {"n": object()})
    assert json.loads((tmp_path / "result.json").read_text()) == {"n": 1}
