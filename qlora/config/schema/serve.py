"""An endpoint that speaks OpenAI's protocol: the group `serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qlora.errors import require

BASE = "base"
"""The name by which the untuned base is asked for."""
NAME = re.compile(r"[^\s/\\\x00-\x1f\x7f]{1,100}")
"""A name that clients ask for."""


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """Where `task=serve` answers, with what, and how many at once."""

    host: str = "127.0.0.1"
    """The address that it listens on. Any but this machine's loopback needs a token."""
    port: int = 8000
    """The port; 0 takes any free one."""
    token_variable: str = "QLORA_SERVE_TOKEN"
    """The variable of the environment that holds the token which clients must send as their API key. Where it is
    unset, nobody needs one, and the endpoint listens on the loopback alone."""
    name: str | None = None
    """The name by which clients ask for what `adapter` names; unset: that of its run's folder. The untuned base is
    `base`."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Further adapters of the same base: names for clients, and folders of adapters or of finished runs."""
    slots: int = 16
    """Requests of one adapter that are answered together; the others wait. Fewer where the memory does not hold their
    keys and values, which is said."""
    context: int | None = None
    """The most tokens of a prompt with its answer; unset: the model's context, or 8,192 if that is less."""
    queue: int = 1000
    """Requests that may wait; one more is refused (429)."""

    def __post_init__(self) -> None:
        require(bool(self.host.strip()), "serve.host", "be an address such as 127.0.0.1", self.host)
        require(0 <= self.port <= 65535, "serve.port", "lie between 0 and 65535", self.port)
        is_variable = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_variable) is not None
        require(is_variable, "serve.token_variable", "be the name of a variable, never the token", "another text")
        for name in ("slots", "queue"):
            require(getattr(self, name) > 0, f"serve.{name}", "be positive", getattr(self, name))
        require(self.context is None or self.context > 1, "serve.context", "be 2 or more, or null", self.context)
        names: dict[str, str | None] = {f"serve.adapters.{name}": name for name in self.adapters}
        for key, asked in (names | {"serve.name": self.name}).items():
            is_name = asked is None or (NAME.fullmatch(asked) is not None and asked != BASE)
            require(is_name, key, f"be a name without blanks and slashes, and not {BASE!r}, which is the base", asked)
