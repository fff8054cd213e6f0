"""A missing folder is never asked of the Hub, and a name on the Hub is asked for at its pinned revision."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from davae.errors import CheckpointError, SettingsError
from davae.pipelines.places import HubName, find_on_hub, pin
from hub_server import RefusingHub, serving

KEPT = Path(__file__).parents[1] / "fixtures" / "0.1.0"


@pytest.fixture
def hub() -> Iterator[RefusingHub]:
    with serving(RefusingHub()) as server:
        yield server


# Two verbs in one process, because its imports take most of the time.
VERBS = """
from davae.cli import main
for arguments in (["generate", "runs/finetune", "a kite"], ["inspect", "someone/tiny", "--revision", "abc123"]):
    try:
        main(arguments)
    except SystemExit as leaving:
        print(leaving.code)
"""


def test_no_request_leaves_for_a_folder_that_is_missing_and_a_revision_is_asked_for(
    hub: RefusingHub, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", VERBS]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "4"], done.stderr
    assert "there is no runs/finetune on this machine" in done.stderr
    assert not any("finetune" in path for path in hub.asked)
    assert any("abc123" in path for path in hub.asked)


@pytest.mark.parametrize(
    "source",
    [
        "runs/finetune",
        "made/finetune",
        "./a/b",
        "../a",
        "/a/b",
        "~/a",
        "a/b/c",
        "finetune",
        "a/b/",
        "a/mine.safetensors",
    ],
)
def test_what_looks_like_a_path_or_is_there_in_part_is_no_name(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    with pytest.raises(CheckpointError, match=r"on this machine, and the Hub is not asked .*OWNER/NAME"):
        find_on_hub(source)
    with pytest.raises(CheckpointError, match="on this machine"):
        find_on_hub(Path("someone/tiny"))


def test_names_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_on_hub("someone/tiny-1.5_m") == HubName("someone/tiny-1.5_m", None)
    assert find_on_hub(pin("someone/tiny", "refs/pr/1")) == HubName("someone/tiny", "refs/pr/1")

    shutil.copytree(KEPT / "base", tmp_path / "someone" / "tiny")
    assert find_on_hub("someone/tiny") is None
    assert find_on_hub("someone/other@main") == HubName("someone/other", "main")
    with pytest.raises(SettingsError, match="is a folder on this machine, which has no revision 'main'"):
        find_on_hub(pin("someone/tiny", "main"))
