"""Uploads, to a server on this machine that answers as the Hub does: what arrives is the folder."""

import base64
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from davae import load_pipeline
from davae.cli import main
from davae.errors import SettingsError, StorageError
from davae.pipelines.publishing import push_folder
from hub_server import serving

KEPT = Path(__file__).parents[1] / "fixtures" / "0.1.0"
NAME = "someone/tiny-da"


class Hub(ThreadingHTTPServer):
    """Repositories that were made, and the files that were committed, by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.refuse = False


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuse:
            return self.answer(403, {"error": "this token may not write"})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer(200, {"url": f"http://127.0.0.1/{NAME}", "name": NAME, "id": "1"})
        if self.path.endswith("/preupload/main"):
            content = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in content]})
        if self.path.endswith("/commit/main"):
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer(200, {"commitUrl": f"http://127.0.0.1/{NAME}/commit/1", "commitOid": "1"})
        return self.answer(200, {"errors": [], "warnings": []})  # of the card

    def answer(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    with serving(Hub()) as server:
        yield server


def davae(hub: Hub, *arguments: object) -> subprocess.CompletedProcess:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "davae", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_portable_upgrade_arrives_with_its_code_and_its_card(hub: Hub, tmp_path: Path) -> None:
    parts = (KEPT / "base", KEPT / "upgraded" / "vae", tmp_path / "out")
    done = davae(hub, "upgrade", *parts, "--portable", "--push-to-hub", NAME, "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].endswith(f"/{NAME}")
    assert [(repository["name"], repository["organization"]) for repository in hub.created] == [("tiny-da", "someone")]
    assert "private" in str(hub.created)  # a key of its own or a visibility, by huggingface_hub's version

    here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert hub.files == here
    assert {"vae/davae_autoencoder.py", "model_index.json", "README.md"} <= here.keys()

    for name, data in hub.files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)

    assert load_pipeline(tmp_path / "back").vae.config.detail_channels == 4
    card = ModelCard.load(tmp_path / "back" / "README.md")
    assert card.data.library_name == "diffusers"
    assert "trust_remote_code=True" in card.text


def test_a_hub_that_refuses_leaves_the_folder_and_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.refuse = True
    parts = (KEPT / "base", KEPT / "upgraded" / "vae", tmp_path / "out")
    done = davae(hub, "upgrade", *parts, "--push-to-hub", NAME)
    assert done.returncode == StorageError.exit_code
    assert "was not uploaded" in done.stderr
    assert "this token may not write" in done.stderr
    assert load_pipeline(tmp_path / "out").vae.config.detail_channels == 4


def test_a_wrong_name_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(KEPT / "base"), str(KEPT / "upgraded" / "vae"), str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=str(SettingsError.exit_code)):
        main(["upgrade", *parts, "--push-to-hub", "a/b/c"])
    assert "Give OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_results_are_uploaded_and_offline_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no pipeline, adapter or model"):
        push_folder(tmp_path, NAME)
    with pytest.raises(StorageError, match=r"was not uploaded to someone/tiny-da: .*offline"):
        push_folder(KEPT / "adapter_lora", NAME)
