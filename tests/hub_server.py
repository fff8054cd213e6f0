"""A server on this machine in the Hub's place, for tests; what it answers is the test's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
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
