"""A part of the fast step that another package adds: it counts the tokens that the model's body sees."""

from __future__ import annotations

from typing import Any

import torch


class CountTokens:
    """Counts tokens with a hook that stays for the time of a step."""

    seen = 0

    def __init__(self, context: Any) -> None:
        self.body = context.base.base_model

    def unsupported_reason(self) -> str | None:
        return None if isinstance(self.body, torch.nn.Module) else "the model has no body"

    def prepare(self) -> None: ...

    def enter(self) -> None:
        self.hook = self.body.register_forward_hook(self.count)

    def exit(self, *, failed: bool) -> None:
        self.hook.remove()

    def extra_bytes(self, rows: int, length: int) -> float:
        return 8.0 * rows * length

    def count(self, body: torch.nn.Module, args: Any, output: Any) -> None:
        type(self).seen += output.last_hidden_state.shape[:2].numel()


class Never(CountTokens):
    """A part that cannot run anywhere."""

    def unsupported_reason(self) -> str | None:
        return "it is Sunday"
