"""Rows without end as what is trained on: drawn from their sets, shuffled in a buffer, and packed, as they are read."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora.config.schema import Stop
from qlora.data.batching.packing import pack
from qlora.data.batching.shared_prompts import join_sides
from qlora.data.batching.stream_state import STATE, SourceState, StreamRow, StreamState, load_state, save_state
from qlora.data.batching.token_store import Counts, Job, encode_rows, sum_up
from qlora.data.ingest.row_stream import RowSource
from qlora.data.overlap import HeldOut, Overlap, describe, keep_best
from qlora.errors import DataError, RunError
from qlora.text import listed

log = logging.getLogger(__name__)

BLOCK = 64
"""Rows of a set that are read and tokenized together."""
PACKS_AT_ONCE = 16
"""How many packs, about, are filled together, each row where the least room is left."""
MOST_ROWS = 128
"""Rows in a pack at most."""
STATES = 4
"""Steps whose states are kept: a loader reads a batch ahead."""


Note = Callable[[StreamRow, int], None]


class StreamedSet:
    """The rows of one set in tokens, as they are read."""

    def __init__(self, number: int, source: RowSource, job: Job) -> None:
        """Takes which of the sets it is, its rows, and how they are encoded."""
        self.number, self.source, self.job = number, source, job
        self.ahead: deque[StreamRow] = deque()
        self.is_over = False

    def next(self, counts: Counter[str], note: Note) -> StreamRow | None:
        """Returns the next row in which something is trained; None: the pass over the set has ended.

        `note` is called with the digest of each row that is read.
        """
        while not self.ahead:
            first, rows = self.source.take(BLOCK)
            if not rows:
                return None
            batch, read = encode_rows(self.job, range(first, first + len(rows)), rows)
            counts.update(read)
            for row, digest in zip(self._split(batch), batch.column("digest").to_pylist(), strict=True):
                note(row, digest)
                self.ahead.append(row)
        return self.ahead.popleft()

    def restart(self) -> None:
        """Begins the next pass."""
        self.source.restart()
        self.ahead.clear()

    @property
    def state(self) -> SourceState:
        return SourceState(self.source.position, tuple(self.ahead), self.is_over)

    def go_to(self, state: SourceState) -> None:
        """Goes on where a state is."""
        self.source.go_to(state.position)
        self.ahead, self.is_over = deque(state.ahead), state.is_over

    def _split(self, batch: pa.RecordBatch) -> Iterator[StreamRow]:
        ids, labels = (batch.column(name).to_pylist() for name in ("input_ids", "labels"))
        for row in zip(ids, labels, batch.column("row").to_pylist(), strict=True):
            yield StreamRow(np.array(row[0], np.int32), np.array(row[1], np.int32), self.number, row[2])


class ItemStream:
    """A stream as `length` items in order: rows, or packs of them. Each is made when it is first asked for.

    `save` and `load` keep where it is in a checkpoint. An item that was made long ago cannot be asked for again.
    """

    def __init__(
        self,
        sets: Sequence[StreamedSet],
        *,
        length: int,
        step: int,
        probabilities: Sequence[float],
        stop: Stop,
        buffer: int,
        width: int | None,
        seed: int,
        max_length: int = 0,
        held_out: HeldOut | None = None,
    ) -> None:
        """Takes the sets and how probable each is; `step` items are an optimizer step, `width` the tokens of a pack.

        No item has more than `max_length` tokens. Rows are compared with those that are `held_out`.
        """
        self.max_length = max_length
        self.sets, self._length, self._step, self._stop = sets, length, step, stop
        self._edges, self._size, self.width = np.cumsum(probabilities), max(buffer, 1), width
        self._about: dict[str, Any] = {
            "sets": [part.source.label for part in sets],
            "sizes": [part.source.sizes for part in sets],
        }
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed])))
        self._buffer: list[StreamRow] = []
        self._is_draining = False
        self._open: list[StreamRow] = []
        self._packs: deque[tuple[StreamRow, ...]] = deque()
        self.passes, self._in_pass, self._counts = 0, 0, Counter[str]()
        self.check: Callable[[StreamRow], None] | None = None
        """What is called for each row, and may refuse it."""
        self._held_out, self._overlaps = held_out, dict[str, Overlap]()
        self._made: OrderedDict[int, tuple[StreamRow, ...]] = OrderedDict()
        self._next = 0
        self._states: OrderedDict[int, StreamState] = OrderedDict({0: self.state})

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns an item as a batch takes it."""
        return self._as_item(self._rows_of(index))

    def named_rows(self, index: int) -> list[tuple[str, dict[str, Any]]]:
        """Returns the rows of an item, each with its name, which says its set and which row of it it is."""
        rows = self._rows_of(index)
        return [(self._name(row), self._as_item((row,))) for row in rows]

    @property
    def overlaps(self) -> list[Overlap]:
        """The held-out rows that are equal, or nearly, to a row that was read, each with the one most like it."""
        return list(self._overlaps.values())

    @property
    def counts(self) -> Counts:
        """What became of the rows that were read so far."""
        return sum_up(self._counts)

    def __str__(self) -> str:
        """Says how far the stream was read, and what was not trained."""
        counts, passes = self.counts, self.passes
        losses = (
            (counts.untrained, "in which nothing is trained"),
            (counts.too_long, "too long"),
            (counts.empty, "with empty answers"),
            (counts.left_out, "left out by their format"),
        )
        dropped = ", ".join(f"{count:,} {why}" for count, why in losses if count)
        over = f" in {passes + 1:,} passes" if passes else ""
        text = f"{counts.rows:,} rows read{over}" + (f", dropped: {dropped}" if dropped else "")
        return f"{text}; {describe(self.overlaps)}" if self._overlaps else text

    def _name(self, row: StreamRow) -> str:
        return f"{self.sets[row.source].source.label}, row {row.number + 1}"

    def _compare(self, row: StreamRow, digest: int) -> None:
        """Notes that a row is equal, or nearly, to one that is held out, and warns of it once."""
        if self._held_out is None:
            return
        overlap = self._held_out.compare(digest, row.ids.tolist(), lambda: self._name(row))
        if overlap is not None and keep_best(self._overlaps, overlap):
            log.warning("data.overlap: %s, so the model is measured on what it has seen", describe([overlap]))

    def save(self, folder: Path, index: int) -> None:
        """Writes where the stream is before the item `index`, with which a step begins."""
        self._make_until(index)  # the last ones may be another process'
        save_state(self._states[index], folder, self._about)

    def load(self, folder: Path, index: int) -> None:
        """Goes on as `save` has left off; the next item is number `index`.

        Raises `RunError` where no rows were streamed before, more or fewer sets, or files of other sizes.
        """
        if not (folder / STATE).is_file():
            raise RunError(
                f"{folder} was written by a run that did not stream its rows, so that there is no place to resume at; "
                "leave data.streaming out, or choose another folder (hydra.run.dir=FOLDER or name=NAME)"
            )
        state, about = load_state(folder)
        if len(about["sets"]) != len(self.sets):
            raise RunError(
                f"{folder.name} was written while {listed(about['sets'])} was streamed, and the config names "
                f"{listed(self._about['sets'])}, so that there is no place to resume at; name the same sets, or choose "
                "another folder (hydra.run.dir=FOLDER or name=NAME)"
            )
        for label, previous, now in zip(about["sets"], about["sizes"], self._about["sizes"], strict=True):
            if previous != now:
                raise RunError(
                    f"{label} has {sum(now):,} bytes in {len(now)} files, and had {sum(previous):,} in {len(previous)} "
                    f"when {folder.name} was written, so that the place where the run was is another; restore the old "
                    "rows, or choose another folder (hydra.run.dir=FOLDER or name=NAME)"
                )
        self._go_to(state)
        self._made.clear()
        self._next = index
        self._states = OrderedDict({index: state})

    @property
    def state(self) -> StreamState:
        """Where the stream is."""
        return StreamState(
            sources=tuple(part.state for part in self.sets),
            random=self._random.bit_generator.state,
            buffer=tuple(self._buffer),
            is_draining=self._is_draining,
            open_pack=tuple(self._open),
            packs=tuple(self._packs),
            passes=self.passes,
            in_pass=self._in_pass,
            counts=dict(self._counts),
            overlaps=tuple(self._overlaps.values()),
        )

    def _go_to(self, state: StreamState) -> None:
        for part, position in zip(self.sets, state.sources, strict=True):
            part.go_to(position)
        self._random.bit_generator.state = state.random
        self._buffer, self._is_draining = list(state.buffer), state.is_draining
        self._open, self._packs = list(state.open_pack), deque(state.packs)
        self.passes, self._in_pass, self._counts = state.passes, state.in_pass, Counter(state.counts)
        self._overlaps = {overlap.held_out: overlap for overlap in state.overlaps}

    def _rows_of(self, index: int) -> tuple[StreamRow, ...]:
        index = range(self._length)[index]
        if index not in self._made and index < self._next:
            raise IndexError(f"item {index} of the stream has passed")
        self._make_until(index + 1)
        return self._made[index]

    def _make_until(self, index: int) -> None:
        while self._next < index:
            self._made[self._next] = self._make()
            self._next += 1
            if self._next % self._step == 0:
                self._states[self._next] = self.state
                while len(self._states) > STATES:
                    self._states.popitem(last=False)
            while len(self._made) > STATES * self._step:
                self._made.popitem(last=False)

    def _make(self) -> tuple[StreamRow, ...]:
        if self.width is None:
            return (self._shuffled(),)
        while not self._packs:
            self._fill_packs(self.width)
        return self._packs.popleft()

    def _fill_packs(self, width: int) -> None:
        """Packs rows; the emptiest pack stays open for the rows that follow."""
        total = sum(len(row.ids) for row in self._open)
        while total < PACKS_AT_ONCE * width:
            row = self._shuffled()
            self._open.append(row)
            total += len(row.ids)
        lengths = np.array([len(row.ids) for row in self._open])
        parts = [part[start : start + MOST_ROWS] for part in pack(lengths, width)
                 for start in range(0, len(part), MOST_ROWS)]  # fmt: skip
        emptiest = min(range(len(parts)), key=lambda index: int(lengths[parts[index]].sum()))
        full = [index for index in self._random.permutation(len(parts)).tolist() if index != emptiest]
        self._packs.extend(tuple(self._open[member] for member in parts[index]) for index in full)
        self._open = [self._open[member] for member in parts[emptiest]]

    def _shuffled(self) -> StreamRow:
        """Returns a row of the buffer, which is filled up first; at the end of a pass it runs empty."""
        while not self._is_draining and len(self._buffer) < self._size:
            row = self._next_row()
            if row is None:
                self._is_draining = True
            else:
                self._buffer.append(row)
        if not self._buffer:
            self._begin_pass()
            return self._shuffled()
        index = int(self._random.integers(len(self._buffer)))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def _begin_pass(self) -> None:
        if not self._in_pass:
            labels = ", ".join(part.source.label for part in self.sets)
            raise DataError(f"{labels}: a whole pass held no row with a token to train on")
        self.passes, self._in_pass, self._is_draining = self.passes + 1, 0, False
        for part in self.sets:
            part.restart()
            part.is_over = False

    def _next_row(self) -> StreamRow | None:
        """Returns the next row of a set that is drawn at random; None: the pass is over."""
        number = 0 if len(self.sets) == 1 else np.searchsorted(self._edges[:-1], self._random.random(), side="right")
        part = self.sets[int(number)]
        row = part.next(self._counts, self._compare)
        if row is None:
            part.is_over = True
            if self._stop is Stop.first or all(other.is_over for other in self.sets):
                return None
            part.restart()
            row = part.next(self._counts, self._compare)
            if row is None:
                raise DataError(f"{part.source.label}: a whole pass held no row with a token to train on")
        self._in_pass += 1
        if self.check is not None:
            self.check(row)
        return row

    def _as_item(self, rows: Sequence[StreamRow]) -> dict[str, np.ndarray]:
        if self.width is None:
            return {"input_ids": rows[0].ids, "labels": rows[0].labels}
        return join_sides([row.ids for row in rows], [row.labels for row in rows])
