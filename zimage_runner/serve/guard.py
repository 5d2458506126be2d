"""Who may ask, and how much at once: checked before any route sees the request."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from zimage_runner.serve.config import Server
from zimage_runner.serve.errors import ApiError
from zimage_runner.serve.metrics import Metrics
from zimage_runner.view.safety import HEADERS, host_is_ours

FORM = "multipart/form-data"
OPEN_ROUTES = ("/live", "/ready")
"""Without a token: whoever watches the service need not be able to draw."""
FORMS = ("/v1/images/edits",)
"""Routes that take pictures, in a form. A page of another site could send one, so its origin is checked too."""
READS_NOTHING = "/v1/images/variations"
"""Its answer is the same whatever is sent."""
OTHER = "other"
"""The route, in metrics, of requests that no route is for."""


class Guard:
    """Wraps the ASGI application. Adds headers, and counts answers."""

    def __init__(self, app: Any, server: Server, token: str | None, metrics: Metrics) -> None:
        self._app = app
        self._server = server
        self._token = token
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in names]
                message["headers"] = [*message["headers"], *extra]
                route = getattr(scope.get("route"), "path", OTHER)
                self._metrics.count(route, message["status"])
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await _answer(send_with_headers, error)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Any) -> None:
        """Raise ApiError for a request that nothing is done for."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._token is None and not host_is_ours(host, local=self._server.is_local):
            # A page of another site reaches us by a name of its own (DNS rebinding).
            raise ApiError(403, f"this service is not called {host!r:.80}: ask it by its address, or set server.token")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "pages of other sites may not ask")
        if self._token is not None and scope["path"] not in OPEN_ROUTES:
            self._check_token(headers.get("authorization", ""))
        if scope["method"] == "POST" and scope["path"] != READS_NOTHING:
            what, wanted = ("a form", FORM) if scope["path"] in FORMS else ("JSON", "application/json")
            if headers.get("content-type", "").partition(";")[0].strip() != wanted:
                raise ApiError(415, f"send {what}: content-type: {wanted}")

    def _check_token(self, header: str) -> None:
        kind, _, given = header.partition(" ")
        expected = (self._token or "").encode()
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1", "replace"), expected):
            raise ApiError(
                401, "the token is missing or wrong: send Authorization: Bearer TOKEN", code="invalid_api_key"
            )


async def read_json(request: Request, server: Server) -> Any:
    """The JSON of a request's body. Raises ApiError."""
    body = await read_body(request, server)
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is no JSON: {reason:.200}") from None


async def read_body(request: Request, server: Server) -> bytes:
    """A request's body, bounded in size and time. Raises ApiError."""
    most = server.max_body_mb * 1e6
    try:
        length = int(request.headers.get("content-length", 0))
    except ValueError:
        length = 0
    too_large = ApiError(413, f"the body is too large: send at most {server.max_body_mb:g} million bytes")
    if length > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(server.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {server.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the body did not arrive") from None
    return bytes(body)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


async def _answer(send: Any, error: ApiError) -> None:
    headers = [(b"content-type", b"application/json"), *((k.encode(), v.encode()) for k, v in error.headers.items())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
