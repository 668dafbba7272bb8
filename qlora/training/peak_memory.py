"""The most memory that a run has needed of its device: what torch counts, and what it does not.

That is paged optimizer states, and what CUDA graphs compute in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from qlora.runtime.device import peak_memory_gb, reset_peak_memory
from qlora.upstream.bitsandbytes_optim import paged_bytes


class PeakMemory:
    """Follows the memory of one device; on a CPU it is that of the process, which holds all states."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._most = 0.0
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._graphs: Callable[[], int] = int

    def watch(self, optimizer: torch.optim.Optimizer, graphs: Callable[[], int] = int) -> None:
        """Counts the paged states of an optimizer from now on; it has none yet. `graphs` says the bytes of graphs."""
        self.restart()
        self._optimizer, self._graphs = weakref.ref(optimizer), graphs

    def restart(self) -> None:
        """Starts torch's own count anew; what was needed so far is kept."""
        self.gb()
        reset_peak_memory(self.device)

    @property
    def paged(self) -> int:
        """The bytes of paged states, which torch does not count."""
        optimizer = self._optimizer() if self._optimizer is not None else None
        return paged_bytes(optimizer) if optimizer is not None and self.device.type != "cpu" else 0

    @property
    def in_graphs(self) -> int:
        """The bytes that CUDA graphs compute in."""
        return self._graphs()

    def gb(self) -> float:
        """Returns the most memory so far, in 10^9 bytes."""
        self._most = max(self._most, peak_memory_gb(self.device) + (self.paged + self.in_graphs) / 1e9)
        return self._most
