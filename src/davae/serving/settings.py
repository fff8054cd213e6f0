"""What a server allows: its limits, where it listens, and who may ask."""

import hmac
import ipaddress
import socket
from dataclasses import dataclass

from davae.errors import SettingsError

SHORTEST_TOKEN = 16
"""In characters: shorter ones can be guessed."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait. More is refused, and never cut down without a word."""

    steps: int = 100
    side: int | None = None
    """Width times height may be this number's square; the pipeline's own side if None."""
    batch: int = 4
    """Images that one call of the pipeline makes, which is also the most that one request may ask for."""
    prompt: int = 2000
    """In characters."""
    queue: int = 16
    """Requests that wait."""
    upload_bytes: int = 20_000_000
    """Of a picture on the page."""
    body_bytes: int = 64 * 1024
    """Of a request."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise SettingsError(f"limit {name}={value}: allowed are 1 or more")


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise."""

    steps: int = 28
    guidance_scale: float = 4.0
    prompt_tokens: int = 256
    """The longest text encoder pads or cuts to this."""


@dataclass(frozen=True)
class Address:
    """Where the server listens, and the token that a client must know; "" for none."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""

    def __post_init__(self) -> None:
        if self.token and (len(self.token) < SHORTEST_TOKEN or not self.token.isascii()):
            raise SettingsError(
                f"the token has {len(self.token)} characters: allowed are {SHORTEST_TOKEN} or more, in ASCII, such as "
                "those of: openssl rand -hex 24"
            )
        if not self.token and not self.is_loopback:
            raise SettingsError(
                f"--host {self.host}: others could reach it, so a token is needed. Put one into a file or into "
                "DAVAE_SERVE_TOKEN: openssl rand -hex 24 > token; davae serve ... --token-file token"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def allowed_hosts(self) -> list[str]:
        """Names in the Host header that are answered: without a token, a page elsewhere must not reach this server."""
        return ["*"] if self.token else [self.host, "localhost", "127.0.0.1", "[::1]", "::1"]

    def admits(self, token: str) -> bool:
        """Whether this is the token; the time that it takes tells nothing about it."""
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode())

    def bind(self) -> socket.socket:
        """A socket with this address. It does not listen yet: until the server is ready, connections are refused.

        Raises:
            SettingsError: the port is taken, or the address is not this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that was killed a moment ago
        try:
            bound.bind((self.host, self.port))
            return bound
        except (OSError, OverflowError) as error:
            bound.close()
            raise SettingsError(
                f"cannot listen on {self.host}, port {self.port} ({error}): give another --port or --host"
            ) from error
