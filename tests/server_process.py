"""A `davae serve` in a process of its own, for tests that are its clients."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


class ServerProcess:
    """The verb, from its start to its end."""

    def __init__(self, *arguments: str, token: str = "") -> None:
        command = [sys.executable, "-m", "davae", "serve", *arguments]
        environment = {**os.environ, "DAVAE_SERVE_TOKEN": token}
        self.token = token
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def wait_until_ready(self) -> "ServerProcess":
        """Wait for the line that names the address."""
        line = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert match is not None, line + self.process.stderr.read()
        self.port = int(match[1])

        # The line is printed a moment before the server listens.
        deadline = time.monotonic() + 30
        while True:
            try:
                assert self.get("/healthz")[0] == 200
                return self
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.05)

    def wait_until_closed(self) -> None:
        """Wait until it lets no more connections in."""
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=30).close()
            except ConnectionRefusedError:
                return
            assert time.monotonic() < deadline, "the server still listens"
            time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        return self.request("GET", path, headers=headers)

    def post(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Ask for images with this body."""
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.request("POST", "/v1/images/generations", body, headers)

    def send_raw(self, data: bytes) -> bytes:
        """The first bytes that the server answers to bytes that may be no HTTP; b"" if it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            try:
                return connection.recv(65536)
            except ConnectionResetError:
                return b""

    def metric(self, name: str) -> float:
        """A number of /metrics; 0 if it is not there yet."""
        text = self.get("/metrics", {"Authorization": f"Bearer {self.token}"})[1].decode()
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
        return 0.0 if match is None else float(match[1])

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        deadline = time.monotonic() + 120
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def memory(self) -> int:
        """Resident bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.process.stderr.close()


def save_tiny_pair(folder: Path, *, sees_detail: bool = False) -> tuple[Path, Path]:
    """A tiny base pipeline and its upgrade on disk; its decoder begins with zeros for the detail latents.

    With `sees_detail` they are random numbers instead, so that the detail shows as in a trained one.
    """
    import torch

    import tiny_pipelines
    from tiny_upgrades import upgrade_tiny

    base, upgraded = folder / "tiny-base", folder / "tiny"
    tiny_pipelines.sd3().save_pretrained(base)
    pipeline = upgrade_tiny(tiny_pipelines.sd3())
    if sees_detail:
        torch.manual_seed(6)
        torch.nn.init.normal_(pipeline.vae.detail_upsample.shortcut.weight, std=0.2)
    pipeline.save_pretrained(upgraded)
    return base, upgraded


def traversal_probes() -> list[str]:
    """Paths that lead out of a folder, written in 60 ways."""
    climbs = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%252f", "..\\", "..%5c", "....//", "..%c0%af", "..;/"]
    targets = ["etc/passwd", "proc/self/environ"]
    probes = [f"{start}{climb * 8}{target}" for start in ("/", "/v1/") for climb in climbs for target in targets]
    probes += [
        f"/{name}" for name in ("//etc/passwd", "%2fetc%2fpasswd", "file:///etc/passwd", "\\\\host\\share", "C:/")
    ]
    probes += [f"/v1/images/{name}" for name in ("../../etc/passwd", "a%00.png", "%00", ".", "..", "~root/.ssh/id_rsa")]
    probes += [f"/{place}" for place in ("static/../x", "docs", "files/etc/passwd", "file=/etc/passwd", ".git/config")]
    probes += ["/v1/images/generations/../../../etc/passwd", "/v1/models/../../etc/passwd", "/healthz/../etc/passwd"]
    return [*probes, "/metrics/..%2f..%2fetc/passwd"]
