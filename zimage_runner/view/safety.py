"""Who may talk to the gallery: this machine's own pages, or whoever has the token. Nothing is trusted but these."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode

COOKIE = "zimage_view"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Safety:
    """Wraps an ASGI application: checks Host, Origin and token of each request, and adds headers to each answer.

    A page of another site that reaches us by a name of its own (DNS rebinding) has that name in Host.
    """

    def __init__(self, app: Any, *, local: bool, token: str | None) -> None:
        self._app = app
        self._local = local
        self._token = token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in names),
                ]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send_with_headers, 403, refusal)
        elif (cookie := self._greeting(scope, headers)) is not None:
            await _answer(send_with_headers, 303, "", cookie)
        else:
            await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> str | None:
        host = headers.get("host", "")
        if not host_is_ours(host, local=self._local):
            return f"this gallery is not called {host!r:.80}: use the address that it printed"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "only the gallery's own page may ask"
        if scope["method"] != "GET" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "only the gallery's own page may change anything"
        if self._token is not None and not self._has_token(scope, headers):
            return "the token is missing: use the address that the gallery printed"
        return None

    def _has_token(self, scope: Any, headers: dict[str, str]) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer] if kind.lower() == "bearer" else []
        given += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
            given += [cookies[COOKIE].value] if COOKIE in cookies else []
        except CookieError:
            pass
        return any(hmac.compare_digest(text.encode(), (self._token or "").encode()) for text in given)

    def _greeting(self, scope: Any, headers: dict[str, str]) -> tuple[str, str] | None:
        """For the address with the token: a cookie, and the same address without it."""
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if self._token is None or scope["path"] != "/" or scope["method"] != "GET" or "token" not in query:
            return None
        del query["token"]
        rest = urlencode(query, doseq=True)
        return f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/", "/" + (f"?{rest}" if rest else "")


def host_is_ours(host: str, *, local: bool) -> bool:
    """Whether a request's Host names this machine. ``local``: by its loopback names alone."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() in LOCAL_NAMES:
        return True
    if local:
        return False
    try:
        ipaddress.ip_address(name.strip("[]"))
        return True
    except ValueError:
        own = socket.gethostname().lower()
        return name.lower() in (own, own.partition(".")[0], socket.getfqdn().lower())


async def _answer(send: Any, status: int, text: str, cookie: tuple[str, str] | None = None) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    if cookie is not None:
        headers += [(b"set-cookie", cookie[0].encode()), (b"location", cookie[1].encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
