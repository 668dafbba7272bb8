"""Finds the rows of a step whose loss or gradients are NaN or infinite by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qlora.runtime import distributed

NamedRow = tuple[str, dict[str, Any]]


def find_bad_rows(
    rows: Sequence[NamedRow],
    blank: dict[str, Any],
    is_finite: Callable[[dict[str, Any]], bool],
    trained: Sequence[torch.nn.Parameter],
    device: torch.device,
) -> list[str]:
    """Runs rows one by one; returns the names of those whose loss or gradients are NaN or infinite, in all processes.

    `is_finite` computes the loss of one row and the gradients of `trained`. A process with fewer rows than another runs
    `blank` or its last row again: a sharded base needs all processes.
    """
    count = max(distributed.all_gather(len(rows)))
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        return []  # weights that are NaN say nothing about the rows
    bad = []
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        for index in range(count):
            name, row = rows[min(index, len(rows) - 1)] if rows else ("", blank)
            if not is_finite(row) and index < len(rows):
                bad.append(name)
    return [name for names in distributed.all_gather(bad) for name in names]
