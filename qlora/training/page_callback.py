"""The callback that keeps a page about the training run up to date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qlora.text import format_duration
from qlora.training.meter import ClockedCallback


class Page(Protocol):
    """What is written about a run while it is alive."""

    def update(self, history: Sequence[Mapping[str, Any]], note: str, *, measured: bool = False) -> None:
        """Shows what the trainer has logged, and what the run does."""

    def keep_alive(self, history: Sequence[Mapping[str, Any]], note: str) -> None:
        """Shows that the run is alive."""


class PageCallback(ClockedCallback):
    """Hands each log and evaluation to a page."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows a log, and always one of an evaluation."""
        if state.is_world_process_zero:
            measured = any(name.startswith("eval_") for name in logs or {})
            self._page.update(state.log_history, self._note(state), measured=measured)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows that the run is alive where logs are rare."""
        super().on_step_end(args, state, control)
        if state.is_world_process_zero:
            self._page.keep_alive(state.log_history, self._note(state))

    def _note(self, state: Any) -> str:
        note = f"training, step {state.global_step:,} of {state.max_steps:,}"
        left = state.max_steps - state.global_step
        if left > 0 and (seconds := self.clock.seconds_left(left)) is not None:
            note += f", about {format_duration(seconds)} left"
        return note
