"""The processes that share one row (`trainer.context_parallel`), and how its tokens are dealt out to them.

A row is cut into twice as many chunks as there are processes. Each takes one from the front and its mirror image from
the end (zig-zag), so that all have about as many tokens to attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from qlora.runtime import distributed


@dataclass(frozen=True)
class RowProcesses:
    """The processes that share the rows of this one."""

    count: int = 1
    index: int = 0
    """Which of them this one is."""
    group: Any = None
    """torch's group of them; None: all processes, or this one alone."""

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of a row that are this process's, of `2 * count`."""
        return self.index, 2 * self.count - 1 - self.index


ALONE = RowProcesses()


@cache
def row_processes(count: int) -> RowProcesses:
    """Returns the group of `count` processes that this one is in; all processes must call it."""
    if count == 1:
        return ALONE
    from torch import distributed as processes

    starts = range(0, distributed.world_size(), count)
    groups = [processes.new_group(range(start, start + count), timeout=distributed.STEP_TIMEOUT) for start in starts]
    number, index = divmod(distributed.rank(), count)
    return RowProcesses(count, index, groups[number])


def row_takers(count: int) -> int:
    """Returns how many groups of `count` processes there are, each of which takes rows that no other takes."""
    return distributed.world_size() // count
