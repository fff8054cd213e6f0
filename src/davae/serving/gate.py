"""What every request passes before it is read: where it comes from, and whether it knows the token."""

import base64
import json
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from davae.serving.metrics import Metrics
from davae.serving.settings import Address, Limits

OPEN_PATHS = ("/healthz",)
"""Answered without a token."""
COUNTED_PATH = "/v1/images/generations"


def error_response(
    status: int, message: str, *, parameter: str | None = None, code: str | None = None, headers: dict | None = None
) -> Response:
    """An error in the shape that OpenAI's clients read; ASCII, whatever was sent."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": parameter, "code": code}
    return Response(json.dumps({"error": error}), status, headers, "application/json")


class BodyLimits:
    """Bounds what clients send: a request is small, a picture for the page may be larger."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._small = RequestBodyLimitMiddleware(app, limits.body_bytes)
        self._large = RequestBodyLimitMiddleware(app, limits.body_bytes + limits.upload_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        is_upload = scope["type"] == "http" and scope["path"].endswith("/gradio_api/upload")
        await (self._large if is_upload else self._small)(scope, receive, send)


class Gate:
    """Refuses requests of pages elsewhere and those without the token, and counts the answers."""

    def __init__(self, app: ASGIApp, address: Address, metrics: Metrics) -> None:
        self._app, self._address, self._metrics = app, address, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI wants it."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} is served")

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == COUNTED_PATH:
                self._metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        answer = self._refuse(scope, Headers(scope=scope)) or self._app
        await answer(scope, receive, count)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        # Browsers name the page that sends a request: another site's may not make this server work.
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return error_response(403, f"requests of pages of {origin[:200]!r} are not answered", code="origin")
        if not self._address.token or scope["path"] in OPEN_PATHS:
            return None
        if self._address.admits(read_token(headers.get("authorization", ""))):
            return None
        challenge = {"WWW-Authenticate": 'Basic realm="davae: any name, and the token as password"'}
        message = "give the server's token as `Authorization: Bearer TOKEN`, which is the API key of OpenAI's clients"
        return error_response(401, message, code="invalid_api_key", headers=challenge)


def read_token(authorization: str) -> str:
    """The token of a client ("Bearer TOKEN"), or of a browser, which asks for a name and a password ("Basic ...")."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        with suppress(ValueError):  # no base64, or no text
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
    return ""
