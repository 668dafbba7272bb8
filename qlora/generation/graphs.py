"""Decode steps as CUDA graphs: a GPU runs a whole step at one call of the host.

A graph serves a number of rows (`BUCKETS`) and the adapter that was on when it was captured; the lengths of the rows
are read on the device. Rows that are missing up to the number of a bucket decode a token where a free slot begins.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from qlora.generation.transfer import to_pinned
from qlora.runtime.device import capture_stream
from qlora.text import brief_text

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""The rows of a graph; beyond them, multiples of the last."""

Step = Callable[[Tensor, Tensor], Tensor]
"""Computes logits [rows, vocabulary] from tokens and positions on the device, int64 [rows], without the host."""


class StepGraphs:
    """The graphs over the slots of one cache, in one pool of memory; use it in `torch.inference_mode`."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.tokens, self.positions = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(2))
        self.captured: dict[tuple[int, Hashable], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """By rows and adapter, a graph and the logits that it writes."""
        self.is_capturable = True
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = capture_stream(device)

    def run(self, step: Step, tokens: Tensor, positions: list[int], adapter: Hashable) -> Tensor:
        """Returns the logits of a step, [rows, vocabulary]; the next one overwrites them."""
        rows = len(positions)
        count = bucket(rows, self.slots)
        self.tokens[:rows].copy_(tokens)
        padded = torch.tensor([*positions, *[0] * (count - rows)])
        self.positions[:count].copy_(to_pinned(padded), non_blocking=True)
        key = count, adapter
        if key not in self.captured and self.is_capturable:
            self._capture(step, *key)
        if key not in self.captured:
            return step(self.tokens[:rows], self.positions[:rows])
        graph, logits = self.captured[key]
        graph.replay()
        return logits[:rows]

    def _capture(self, step: Step, count: int, adapter: Hashable) -> None:
        tokens, positions = self.tokens[:count], self.positions[:count]
        try:
            with _uncached_autocast(self.device):
                current = torch.cuda.current_stream(self.device)
                self._stream.wait_stream(current)
                # Kernels are compiled here; what would make the host wait in each step shows here too.
                with torch.cuda.stream(self._stream), _syncs_fail():
                    step(tokens, positions)
                current.wait_stream(self._stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads, of an endpoint for one, may use the GPU meanwhile.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                    logits = step(tokens, positions)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.is_capturable = False
            warn_of_no_graph(brief_text(str(error)))
        else:
            self.captured[count, adapter] = graph, logits


def bucket(rows: int, slots: int) -> int:
    """Returns how many rows a step of `rows` computes."""
    most = BUCKETS[-1]
    count = next((size for size in BUCKETS if size >= rows), -(-rows // most) * most)
    return min(count, slots)


@contextlib.contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """Inside, autocast keeps no casts: those of a graph would be freed with it."""
    kind = device.type
    with torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    ):
        yield


@contextlib.contextmanager
def _syncs_fail() -> Iterator[None]:
    """Inside, torch raises where it would make the host wait for the GPU."""
    previous = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(previous)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def warn_of_no_graph(reason: str) -> None:
    """Says once why decode steps are not captured."""
    log.warning("decode steps run without a CUDA graph, which is slower: %s", reason)
