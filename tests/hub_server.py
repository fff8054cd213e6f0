"""A server on this machine in the Hub's place, for tests; what it answers is the test's, or a refusal."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
