"""What is asked of an engine that serves a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]


class Likely(NamedTuple):
    """One of the likeliest next tokens."""

    ids: tuple[int, ...]
    """Its id; several where the engine named it by a text that several tokens have."""
    logprob: float


class Continuation(NamedTuple):
    """What an engine writes behind a prompt."""

    text: str
    stops: bool
    """Whether it ended by itself, before the limit of tokens."""


@dataclass(frozen=True)
class Served:
    """What an engine says of itself."""

    name: str
    what: str
    """The model: a path, or its name at a server."""
    precision: str | None = None
    """How its weights are held, e.g. `F16` or `Q8_0`; None: it does not say."""
    max_kl: float | None = None
    """A bound that goes with the model, as of the merge that wrote it."""
    details: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Something that serves a model; a server need not offer everything."""

    served: Served

    def next_tokens(self, ids: Sequence[int]) -> list[Likely]:
        """Returns the likeliest tokens behind a prompt."""

    def chat_tokens(self, messages: Sequence[Message]) -> list[int] | int:
        """Returns the tokens that ask for an answer to a chat, or only their number."""

    def continue_greedily(self, ids: Sequence[int], count: int) -> Continuation:
        """Returns what follows a prompt, at most `count` tokens."""

    def close(self) -> None:
        """Releases the model."""
