"""A token that keeps other people out of a page on an address that they can reach."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from hashlib import sha256
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs

STARTED = "/gradio_api/startup-events"  # gradio asks itself, without a token; the answer is `true`
Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]


class TokenGate:
    """Refuse requests without the token. `?token=...` of the first request is kept as a cookie."""

    def __init__(self, app: Asgi, token: str) -> None:
        self.app, self.token = app, token
        self.cookie = f"dit-in-dit-{sha256(token.encode()).hexdigest()[:12]}"  # two pages on one machine share cookies

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] == STARTED:
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"cookie", b"").decode("latin-1")
        cookies = dict(pair.strip().partition("=")[::2] for pair in sent.split(";"))  # SimpleCookie stops at odd ones
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        known = cookies.get(self.cookie, "")
        if not any(secrets.compare_digest(each.encode(), self.token.encode()) for each in (known, given)):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            headers = [(b"content-type", b"text/plain; charset=utf-8")]  # 401: gradio would take 403 for a dead server
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            text = "Open the address that the terminal shows: it ends in a token.\n"
            await send({"type": "http.response.body", "body": text.encode()})
            return

        async def with_cookie(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start" and given:
                cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                event["headers"] = [*event.get("headers", []), (b"set-cookie", cookie.encode())]
            await send(event)

        await self.app(scope, receive, with_cookie)


def needs_token(host: str) -> bool:
    """Whether an address can be reached from other machines."""
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
