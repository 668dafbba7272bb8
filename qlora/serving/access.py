"""Who may ask: with a token whoever sends it; without one, programs of this machine and no web page of elsewhere."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from qlora.serving.refusal import Refusal

LOOPBACK = re.compile(r"(127(?:\.\d{1,3}){3}|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""How this machine is named in `Host`; a page elsewhere that gives its own name the address 127.0.0.1 has another."""
OPEN = "/health"
"""What anybody may ask who may connect."""


class Access:
    """Refuses requests before anything reads them."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            refusal = self._refuse(scope["path"], headers)
            if refusal is not None:
                await _answer(send, refusal)
                return
        await self.app(scope, receive, send)

    def _refuse(self, path: str, headers: Mapping[str, str]) -> Refusal | None:
        if self.token is not None:
            sent = headers.get("authorization", "")
            kind, _, given = sent.partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), self.token.encode())
            if path == OPEN or (is_right and kind.lower() == "bearer"):
                return None
            return Refusal("the token is missing or wrong; send it as your API key", status=401, code="invalid_api_key")
        if not LOOPBACK.fullmatch(headers.get("host", "")):
            return Refusal("ask for this server as localhost", status=421, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not LOOPBACK.fullmatch(origin.partition("://")[2]):
            return Refusal("web pages of elsewhere may not ask this server", status=403, code="wrong_origin")
        return None


async def _answer(send: Send, refusal: Refusal) -> None:
    body = json.dumps(refusal.body).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
