"""A server on this machine in the Hub's place, for tests; what it answers is the test's, or a refusal."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server, which answers in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server

    server.shutdown()
    thread.join()
    server.server_close()


class RefusingHub(ThreadingHTTPServer):
    """A Hub that refuses every file with the same error code, and notes what it was asked."""

    def __init__(self, code: str = "RepoNotFound") -> None:
        super().__init__(("127.0.0.1", 0), _Refusals)
        self.code = code
        self.asked: list[str] = []


class _Refusals(BaseHTTPRequestHandler):
    server: RefusingHub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(403 if self.server.code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", self.server.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


class FolderHub(ThreadingHTTPServer):
    """A Hub whose one repository has a folder's files, and that notes how many bytes of each it sent."""

    name = "someone/tiny"
    commit = "0123456789" * 4

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.folder = folder
        self.sent: dict[str, int] = {}


class _Files(BaseHTTPRequestHandler):
    server: FolderHub

    def do_GET(self) -> None:
        name, commit = self.server.name, self.server.commit
        if self.path.startswith(f"/api/models/{name}/tree/{commit}"):
            return self.answer(json.dumps(self.list_files()).encode())
        if self.path.startswith(f"/api/models/{name}"):
            files = [{"rfilename": file["path"]} for file in self.list_files()]
            return self.answer(json.dumps({"id": name, "sha": commit, "siblings": files}).encode())

        match = re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", self.path)
        path = self.server.folder / match[1] if match else None
        if path is None or not path.is_file():
            self.send_error(404)
            return None
        content, part = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        data = content[int(part[1]) : int(part[2]) + 1] if part else content
        if self.command == "GET":
            self.server.sent[match[1]] = self.server.sent.get(match[1], 0) + len(data)
        return self.answer(data, 206 if part else 200, digest(content))

    def do_HEAD(self) -> None:
        self.do_GET()

    def list_files(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.server.folder.rglob("*") if path.is_file())
        facts = []
        for path in files:
            content, name = path.read_bytes(), path.relative_to(self.server.folder).as_posix()
            facts.append({"type": "file", "path": name, "size": len(content), "oid": digest(content)})
        return facts

    def answer(self, data: bytes, status: int = 200, etag: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
