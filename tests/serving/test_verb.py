"""What `davae serve` refuses before it loads anything."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from davae import assets

TOKEN = "a-token-of-24-characters"


def serve(*arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "davae", "serve", str(assets.base_pipeline()), *arguments]
    environment = {**os.environ, "DAVAE_SERVE_TOKEN": token}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["--host", "0.0.0.0"], "", "others could reach it, so a token is needed"),
        (["--host", "::"], "", "others could reach it"),
        (["--host", "example.org"], "", "others could reach it"),
        (["--host", "0.0.0.0"], "short", "allowed are 16 or more"),
        (["--token-file", "no-such-file"], "", "cannot be read"),
        (["--host", "192.0.2.1"], TOKEN, "cannot listen on 192.0.2.1"),
        (["--steps", "101"], "", "more than --max-steps 100"),
        (["--queue", "0"], "", "--queue"),
        (["--port", "65536"], "", "--port"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_leave_with_2_and_say_how_to_mend_them(arguments: list[str], token: str, message: str) -> None:
    answer = serve(*arguments, token=token)
    assert answer.returncode == 2
    assert message in " ".join(answer.stderr.split())
    assert "Traceback" not in answer.stderr


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    answer = serve("--token-file", str(tmp_path / "token"))
    assert answer.returncode == 2
    assert "is empty" in answer.stderr


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answer = serve("--port", str(port))
    assert answer.returncode == 2
    assert f"port {port}" in answer.stderr
