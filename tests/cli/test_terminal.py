"""The command line towards the system: terminals, full disks, places that cannot be written, odd encodings."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from davae import assets
from davae.cli import main
from davae.cli.options import PrintableFormatter, make_printable, say

HOSTILE = "a\x1b]0;owned\x07\x9b2J\u202egnp\udcff"
SHOWN = "a\\x1b]0;owned\\x07\\x9b2J\\u202egnp\\udcff"


def leave(*arguments: str) -> int:
    """Run a verb in this process; its exit code."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def test_no_name_reaches_the_terminal_as_an_escape_sequence(capsys) -> None:
    assert make_printable(HOSTILE) == SHOWN
    say(HOSTILE)
    assert leave("runs", HOSTILE) == 4
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\n"
    assert SHOWN in err
    record = logging.makeLogRecord({"msg": "%s is damaged", "args": (HOSTILE,)})
    assert PrintableFormatter().format(record) == f"{SHOWN} is damaged"


def test_people_can_read_names_of_other_languages() -> None:
    for name in ("Grüße, 世界.png", "😀\u200d🚒 a", "two\nlines\tand a tab"):
        assert make_printable(name) == name


OUT_VERBS = [
    ["demo", "--out"],
    ["upgrade", "nowhere", "nowhere"],
    ["import", "nowhere.safetensors"],
    ["generate", "nowhere", "a prompt", "--out"],
    ["reconstruct", "nowhere", "nowhere", "--out"],
    ["latents", "nowhere", "nowhere", "--out"],
    ["evaluate", "nowhere", "nowhere", "--out"],
    ["bench", "nowhere", "--out"],
    ["data", "avatars"],
    ["data", "inspect", "nowhere", "--out"],
]


@pytest.mark.parametrize("verb", OUT_VERBS, ids=lambda verb: " ".join(verb[:2]))
def test_an_out_that_cannot_be_written_is_found_before_anything_is_read(verb, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    places = {tmp_path / "file": 2, tmp_path / "file" / "out": 2, tmp_path / "fifo": 2, tmp_path / ("x" * 250): 2}
    places |= {tmp_path / ("x" * 300): 2, Path("/proc/out"): 5}
    for out, code in places.items():
        assert leave(*verb, str(out)) == code
        assert f"{out}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "fifo"}


def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("davae ", f"{sys.executable} -m davae ")
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=800, check=False, env=environment
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", ["--version", "--help", "demo --dry-run"])
def test_a_full_stdout_is_an_error_without_a_traceback(arguments: str) -> None:
    answer = run(f"davae {arguments} > /dev/full")
    assert (answer.returncode, "Traceback" in answer.stderr, "Exception" in answer.stderr) == (5, False, False)
    assert "No space left on device" in answer.stderr


@pytest.mark.timeout(900)
def test_a_verb_shows_its_own_progress_and_nothing_of_its_libraries(tmp_path: Path) -> None:
    base, settings = assets.base_pipeline(), "--size 64 --steps 1 --prompt-tokens 8"
    answer = run(f"davae generate {base} 'a ball' {settings} --out {tmp_path} 2>&1 >/dev/null")
    assert answer.returncode == 0, answer.stdout
    rest = re.sub(r"generating: 1/1 batches, .*\n", "", answer.stdout).split("\n")
    assert [line.partition(" ")[0] for line in rest if line] == ["1", "next:"], answer.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stderr_changes_no_exit_code() -> None:
    assert run("davae runs nowhere 2> /dev/full").returncode == 4
    shown = "from davae.run.progress import track; print(list(track([1, 2], 'work')))"
    answer = run(f'{sys.executable} -c "{shown}" 2> /dev/full')
    assert answer.stdout == "[1, 2]\n"


def test_a_terminal_that_knows_ascii_only_gets_escapes(tmp_path: Path) -> None:
    answer = run(
        f"davae data avatars {tmp_path}/caf\u00e9 --dry-run; davae runs {tmp_path}/caf\u00e9", PYTHONIOENCODING="ascii"
    )
    assert "Traceback" not in answer.stderr
    assert answer.returncode == 4
    assert "caf\\xe9: no run" in answer.stderr
