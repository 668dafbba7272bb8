"""Rows to train on that are held-out ones, or nearly: found by their tokens, and by their words in threes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from qlora.data.batching.token_store import column
from qlora.text import plural

LEAST = 0.7
"""The Jaccard index from which rows are nearly equal: of their words in threes, what both have of what either has."""
FEWEST = 5
"""Rows with fewer words in threes of their own are not compared."""
COMMON, COMMON_ROWS = 0.1, 5
"""What stands in more than this fraction of the held-out rows, and in more than that many, is a prompt around them."""
WORD = re.compile(r"[^\W_\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+|[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")
"""A word in lower case; of scripts that put no spaces between words, a character."""
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
BATCH = 1000


class Match(NamedTuple):
    """The held-out row that a row is most like."""

    held_out: int
    similarity: float


class Overlap(NamedTuple):
    """A held-out row, and a row to train on that is equal to it (`similarity` 1) or nearly."""

    held_out: str
    trained: str
    similarity: float
    is_equal: bool

    def __str__(self) -> str:
        return f"{self.held_out} and {self.trained}" + ("" if self.is_equal else f" ({self.similarity:.0%})")


def fingerprints(text: str) -> np.ndarray:
    """Returns a hash for each three words that follow each other in a text, each once, uint64."""
    hashes = np.array([zlib.crc32(word.encode()) for word in WORD.findall(text.lower())], np.uint64)
    if len(hashes) < 3:
        return np.empty(0, np.uint64)
    mixed = [(hashes[start : len(hashes) - 2 + start] + np.uint64(start + 1)) * FACTORS[start] for start in range(3)]
    return np.unique(mixed[0] ^ (mixed[1] >> np.uint64(7)) ^ (mixed[2] >> np.uint64(13)))


class OverlapFinder:
    """Compares rows with many others at once, exactly: no row that is like enough is missed."""

    def __init__(self, rows: Sequence[np.ndarray]) -> None:
        """Takes the fingerprints of the rows to compare with."""
        hashes = np.concatenate([np.empty(0, np.uint64), *rows])
        owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        unique, counts = np.unique(hashes, return_counts=True)
        self._common = unique[counts > max(COMMON * len(rows), COMMON_ROWS)]
        kept = ~np.isin(hashes, self._common)
        order = np.argsort(hashes[kept], kind="stable")
        self._hashes, self._owners = hashes[kept][order], owners[kept][order]
        self._sizes = np.bincount(self._owners, minlength=len(rows))

    def match(self, row: np.ndarray) -> Match | None:
        """Returns the row that is most like one with these fingerprints; None: none is like enough."""
        rare = row[~np.isin(row, self._common)]
        if len(rare) < FEWEST:
            return None
        first, last = (np.searchsorted(self._hashes, rare, side=side) for side in ("left", "right"))
        # What is like enough holds at least that fraction of the row, so most rows are done with here.
        if np.count_nonzero(last > first) < LEAST * len(rare):
            return None
        owners = np.concatenate([self._owners[start:end] for start, end in zip(first, last, strict=True)])
        both = np.bincount(owners, minlength=len(self._sizes))
        similarity = np.where(self._sizes < FEWEST, 0, both / (len(rare) + self._sizes - both))
        best = int(similarity.argmax())
        return Match(best, float(similarity[best])) if similarity[best] >= LEAST else None


class HeldOut:
    """Held-out rows, with which rows to train on are compared."""

    def __init__(
        self, rows: Dataset, names: Sequence[str], decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        """Takes rows in tokens and their names; `decode` turns tokens to text, and without it only equal rows count."""
        self.names, self._decode = names, decode
        self._digests = {digest: index for index, digest in enumerate(column(rows, "digest").tolist())}
        self._finder = None if decode is None else OverlapFinder(
            [fingerprints(decode(ids)) for ids in rows.select_columns("input_ids")["input_ids"]]
        )  # fmt: skip

    def compare(self, digest: int, ids: Sequence[int], name: Callable[[], str]) -> Overlap | None:
        """Returns which held-out row one to train on is most like; None: none. `name` says which row it is."""
        if (index := self._digests.get(digest)) is not None:
            return Overlap(self.names[index], name(), 1.0, True)
        if self._finder is None or self._decode is None:
            return None
        match = self._finder.match(fingerprints(self._decode(ids)))
        return match and Overlap(self.names[match.held_out], name(), match.similarity, False)

    def search(self, rows: Dataset, name: Callable[[int, int], str]) -> list[Overlap]:
        """Returns for each held-out row the one of `rows` that is most like it, where one is; `name` gets its index and
        its number in its set."""
        best: dict[str, Overlap] = {}
        for index, (digest, ids, number) in enumerate(_columns(rows)):
            overlap = self.compare(digest, ids, partial(name, index, number))
            if overlap is not None:
                keep_best(best, overlap)
        return list(best.values())


def keep_best(best: dict[str, Overlap], overlap: Overlap) -> bool:
    """Keeps an overlap where it is the first or the closest of its held-out row; returns whether it is the first."""
    previous = best.get(overlap.held_out)
    if previous is None or (overlap.similarity, overlap.is_equal) > (previous.similarity, previous.is_equal):
        best[overlap.held_out] = overlap
    return previous is None


def describe(overlaps: Sequence[Overlap], most: int = 3) -> str:
    """Says how many held-out rows are equal or nearly equal to rows that are trained on, and names some."""
    texts = []
    for is_equal, how in ((True, "equal"), (False, "nearly equal")):
        named = [str(overlap) for overlap in overlaps if overlap.is_equal is is_equal]
        if named:
            more = f" and {len(named) - most:,} more" if len(named) > most else ""
            verb, rows = ("is", "a row") if len(named) == 1 else ("are", "rows")
            texts.append(f"{plural(len(named), 'held-out row')} {verb} {how} to {rows} that {verb} trained on: "
                         f"{'; '.join(named[:most])}{more}")  # fmt: skip
    return "; ".join(texts)


def _columns(rows: Dataset) -> Iterator[tuple[int, list[int], int]]:
    for batch in rows.select_columns(["digest", "input_ids", "row"]).with_format("arrow").iter(BATCH):
        yield from zip(*(batch[name].to_pylist() for name in ("digest", "input_ids", "row")), strict=True)
