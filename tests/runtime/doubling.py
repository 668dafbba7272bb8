"""A task for several processes; it imports little, as they start by it."""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from qlora.errors import UserError

PARTS = [(start, start + 10) for start in range(0, 400, 10)]


@dataclass
class Double:
    """Doubles numbers, and notes in `folder` who did what; the first process waits for another to take part."""

    folder: Path
    first: int
    refuse_at: int | None = None
    """The part that no process can do."""
    fail_others: bool = False
    differ: bool = False
    slow_until: int = 0
    """The number up to which the first process takes 10 ms a part."""

    def __call__(self, part):
        start, stop = part
        name = "first" if os.getpid() == self.first else "other"
        (self.folder / name).touch()
        deadline = time.monotonic() + 60
        while name == "first" and not (self.folder / "other").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if name == "first" and start < self.slow_until:
            time.sleep(0.01)
        if name == "other" and self.fail_others:
            raise ValueError("not here")
        if start == self.refuse_at:
            raise UserError(f"row {start + 1}: is broken")
        is_default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        extra = int(name == "other" and self.differ)
        (self.folder / f"{name}-{start}-{stop}-{is_default}").touch()
        return pa.record_batch({"number": [2 * n + extra for n in range(start, stop)]}), Counter(rows=stop - start)

    def done_by(self, name):
        return [path.name.split("-")[1:] for path in self.folder.glob(f"{name}-*")]
