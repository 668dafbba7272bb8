"""Keeps Python's garbage collector from searching, in the middle of a step, what stays as long as training does.

Compiled code, its guards and a model's modules are millions of objects. A search through all of them takes the host up
to a second, in which the GPU has soon nothing left to do.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import TrainerCallback

WARM = 2
"""Steps after which all code is compiled."""


@contextmanager
def unsearched() -> Iterator[None]:
    """Inside, no search looks at the objects that there are now; what is garbage is freed before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Unsearched(TrainerCallback):
    """Enters `unsearched` when a training run is warm; `close` leaves it."""

    def __init__(self) -> None:
        self._steps = 0
        self._inside = ExitStack()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts the steps of this process."""
        self._steps += 1
        if self._steps == WARM:
            self._inside.enter_context(unsearched())

    def close(self) -> None:
        """Lets the collector search everything again."""
        self._inside.close()
        self._steps = 0
