"""Where a stream of items is: what a checkpoint holds of it, so that a run resumes with the next row, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora.data.ingest.row_stream import Position
from qlora.data.overlap import Overlap
from qlora.errors import DamagedFile, describe_fault

STATE, TOKENS = "stream.json", "stream.npz"


class StreamRow(NamedTuple):
    """A row in tokens."""

    ids: np.ndarray
    labels: np.ndarray
    source: int
    """Which of the sets it is from."""
    number: int
    """Which row of the set it is, from 0."""


@dataclass(frozen=True, slots=True)
class SourceState:
    """Where one set is."""

    position: Position
    ahead: tuple[StreamRow, ...]
    """Rows in tokens that have not been drawn yet."""
    is_over: bool
    """Whether it has been read to its end in this pass."""


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream is."""

    sources: tuple[SourceState, ...]
    random: Mapping[str, Any]
    """The state of what is drawn at random: sets, and rows of the buffer."""
    buffer: tuple[StreamRow, ...]
    """Rows from among which the next one is drawn."""
    is_draining: bool
    """Whether the pass has no more rows than those of the buffer."""
    open_pack: tuple[StreamRow, ...]
    """Rows that wait for others to fill packs with."""
    packs: tuple[tuple[StreamRow, ...], ...]
    """Packs that are ready."""
    passes: int
    """Passes that are over."""
    in_pass: int
    """Rows that this pass has drawn."""
    counts: Mapping[str, int]
    """What became of the rows that were read."""
    overlaps: tuple[Overlap, ...]
    """The held-out rows that are equal, or nearly, to one that was read."""


def save_state(state: StreamState, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes a state, and what the stream reads, into the folder of a checkpoint."""
    groups = [*(source.ahead for source in state.sources), state.buffer, state.open_pack, *state.packs]
    rows = [row for group in groups for row in group]
    written = {
        "about": about,
        "sources": [
            {"rows": source.position.rows, "number": source.position.number, "is_over": source.is_over}
            for source in state.sources
        ],
        "random": state.random,
        "is_draining": state.is_draining,
        "passes": state.passes,
        "in_pass": state.in_pass,
        "counts": dict(state.counts),
        "overlaps": state.overlaps,
        "groups": [len(group) for group in groups],
    }
    (folder / STATE).write_text(json.dumps(written) + "\n", encoding="utf-8")
    np.savez(
        folder / TOKENS,
        ids=_joined([row.ids for row in rows]),
        labels=_joined([row.labels for row in rows]),
        lengths=np.array([len(row.ids) for row in rows], np.int64),
        sources=np.array([row.source for row in rows], np.int64),
        numbers=np.array([row.number for row in rows], np.int64),
    )


def load_state(folder: Path) -> tuple[StreamState, dict[str, Any]]:
    """Returns what `save_state` wrote."""
    try:
        written = json.loads((folder / STATE).read_text(encoding="utf-8"))
        with np.load(folder / TOKENS) as arrays:
            groups = _groups({name: arrays[name] for name in arrays.files}, written["groups"])
        count = len(written["sources"])
        sources = tuple(
            SourceState(Position(source["rows"], source["number"]), ahead, source["is_over"])
            for source, ahead in zip(written["sources"], groups[:count], strict=True)
        )
        buffer, open_pack, *packs = groups[count:]
        state = StreamState(
            sources, written["random"], buffer, written["is_draining"], open_pack, tuple(packs), written["passes"],
            written["in_pass"], written["counts"], tuple(Overlap(*overlap) for overlap in written["overlaps"]),
        )  # fmt: skip
        return state, written["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFile(folder / STATE, f"where the stream was: {describe_fault(error)}") from error


def _groups(arrays: Mapping[str, np.ndarray], sizes: Sequence[int]) -> list[tuple[StreamRow, ...]]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    ids, labels = (np.split(arrays[name], ends) for name in ("ids", "labels"))
    numbers = zip(ids, labels, arrays["sources"].tolist(), arrays["numbers"].tolist(), strict=True)
    rows = iter([StreamRow(*row) for row in numbers] if len(arrays["lengths"]) else [])
    return [tuple(next(rows) for _ in range(size)) for size in sizes]


def _joined(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *rows])
