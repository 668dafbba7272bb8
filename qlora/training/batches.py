"""The batches of a process: in which order the rows come, who gets them, and what is counted before they are moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from qlora.objectives import Objective
from qlora.objectives.protocol import IGNORED, SHARED_ROWS
from qlora.objectives.row_loss import RowLoss
from qlora.runtime.row_processes import ALONE, RowProcesses
from qlora.step.kernels.sharded_rows import take_share
from qlora.training.sampler import LengthGroupedSampler, OrderedSampler, SharedBatches, ShuffledSampler
from qlora.upstream.torch import Rows, as_dataset

Batch = dict[str, torch.Tensor]
Micro = dict[str, Any]
"""A batch with its `TARGETS`."""
Collate = Callable[[list[dict[str, Any]]], Batch]
COUNTS = "counts"
"""The key of a batch's numbers of tokens and of pairs, by how far layers look back, beside its tensors."""
WEIGHTS = "weights"
"""The key of what a loss over rows counts of each, float [rows, 2] of numpy: see `RowLoss.count`."""
SAVED = "saved"
"""The key of the number of tokens that are computed once and counted twice: those of prompts that answers share."""
TARGETS = "targets"
"""The key of the number of labels that the loss counts, int64 [rows] of numpy: it stays on the host."""


@dataclass(frozen=True)
class CountingCollator:
    """Collates rows and counts them while they are on the host."""

    collate: Collate
    count: Callable[[Batch], tuple[int, ...]]
    objective: Objective
    blank: dict[str, Any]
    """A row without labels, for a process that has no rows left while others have: it takes part in the step."""
    shared: RowProcesses = ALONE
    """The processes that share each row."""
    most_rows: int = 0
    """The most rows in a pack, with those of its padding; 0: rows are not packed."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows or [self.blank])
        batch["labels"] = self.objective.labels(batch)
        counts = tuple(self._fraction(number) if rows else 0 for number in self.count(batch))
        if self.shared.count > 1:
            batch = take_share(batch, self.shared, len(batch["labels"]) * max(self.most_rows, 2) + 1)
        targets = (batch["labels"] != IGNORED).flatten(1).sum(1).numpy()
        saved = int((batch[SHARED_ROWS[2]] >= 0).sum()) if rows and SHARED_ROWS[2] in batch else 0
        counted: dict[str, Any] = {TARGETS: targets, COUNTS: counts, SAVED: saved}
        if isinstance(self.objective, RowLoss):
            counted[WEIGHTS] = self.objective.count(batch).numpy()
        return {**batch, **counted}

    def _fraction(self, number: int) -> int:
        """Returns the part of a number that is this process's, so that those of all processes add up."""
        even, rest = divmod(number, self.shared.count)
        return even + (rest if self.shared.index == 0 else 0)


class Stream(Protocol):
    """Rows that are read as they are needed, and whose place is kept in checkpoints."""

    def save(self, folder: Path, index: int) -> None:
        """Writes where it is before the item `index`, with which a step begins."""

    def load(self, folder: Path, index: int) -> None:
        """Goes on there; the next item is number `index`."""


def without_labels(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of which no token is trained."""
    return {**row, **{name: [IGNORED] * len(row[name]) for name in ("labels", "rejected_labels") if name in row}}


def take_targets(batch: Micro) -> tuple[Batch, int]:
    """Returns the tensors of a batch, and how many of its labels the loss counts."""
    tensors = {name: value for name, value in batch.items() if name not in (TARGETS, WEIGHTS)}
    return tensors, int(batch[TARGETS].sum())


def split(batch: Micro, chunks: int) -> list[Micro]:
    """Returns the batch in `chunks` parts with about the same number of rows."""
    parts = (
        value.tensor_split(chunks) if isinstance(value, torch.Tensor) else np.array_split(value, chunks)
        for value in batch.values()
    )
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


def share_batches(
    arguments: TrainingArguments, lengths: Sequence[int], rows: int, shared: RowProcesses, *, in_order: bool = False
) -> SharedBatches:
    """Returns the order of the batches of this process; `in_order`: that of the rows, which are shuffled already.

    transformers' grouping goes from the longest rows to the shortest, and between processes it fills the last batches
    up with rows that were trained before.
    """
    processes, batch = arguments.world_size // shared.count, arguments.train_batch_size
    if in_order:
        order: Any = OrderedSampler(rows)
    elif arguments.train_sampling_strategy == "group_by_length":
        size = batch * arguments.gradient_accumulation_steps * processes
        order = LengthGroupedSampler(lengths, size, arguments.seed)
    else:
        order = ShuffledSampler(rows, arguments.seed)
    return SharedBatches(order, batch, process=arguments.process_index // shared.count, processes=processes)


def build_loader(
    rows: Rows, batches: SharedBatches, collate: CountingCollator, arguments: TrainingArguments, *, non_blocking: bool
) -> DataLoader[Any]:
    """Returns the loader of a process's batches, on its device."""
    workers = arguments.dataloader_num_workers
    loader = DataLoader(
        as_dataset(rows),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=arguments.dataloader_pin_memory,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=arguments.process_index),
    )
    return prepare_data_loader(
        loader,
        device=arguments.device,
        num_processes=1,  # the batches are those of this process already
        process_index=0,
        put_on_device=True,
        non_blocking=non_blocking,
    )
