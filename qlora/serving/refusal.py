"""What a client is told that asked for what cannot be done, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from qlora.text import brief_text


class Refusal(Exception):
    """Raised where a request is refused: a sentence, an HTTP status, and the field that it is about."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = brief_text(message, 1000), status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""What OpenAI calls errors, by HTTP status; others are the client's below 500, and the server's from there on."""
