"""Keeps libraries that decorate functions with `torch.compile` from importing its compiler when they are imported.

bitsandbytes decorates five functions that way. `torch.compile` imports inductor as soon as it is called, which takes a
second of CPU time at every start, and a run calls these functions rarely or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


@contextmanager
def compile_at_first_call() -> Iterator[None]:
    """Inside the block, `torch.compile` returns functions that are compiled when they are first called."""
    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda decorated: compile_later(decorated, **options)
        if isinstance(function, torch.nn.Module):
            return compile_now(function, **options)
        return _compiled_later(function, lambda: compile_now(function, **options))

    torch.compile = compile_later  # type: ignore[assignment]  # declared with an overload for each way to call it
    try:
        yield
    finally:
        torch.compile = compile_now


def _compiled_later(
    function: Callable[..., Any], compile_function: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compile_function()
        return compiled(*args, **kwargs)

    return call
