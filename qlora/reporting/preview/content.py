"""What a preview is made of, and what all its pictures share: visible text, shortened rows, counted lengths."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# What would move the cursor, hide, or turn the reading direction of its surroundings. The joiners and marks that
# emoji and Persian or Hebrew text need stay as they are, and so does the line feed.
CONTROL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
SHORT_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
MIN_GAP = 60
"""The least characters that a gap replaces; its own text needs as many."""


class PreviewToken(NamedTuple):
    """One token of a row; the texts of all of them, joined, are the row's text."""

    text: str
    id: int
    trained: bool


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row as the model sees it."""

    number: int
    """The row's index in the data set."""
    tokens: list[PreviewToken]
    """Special tokens included."""
    notes: list[str]
    """How the row was changed, e.g. `source cut at the beginning`."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What would be trained, as it is shown to the user."""

    title: str
    """E.g. `alpaca_data.json as alpaca`."""
    summary: list[tuple[str, str]]
    """Labels and values, e.g. the format, the template, the rows, the steps an epoch."""
    warnings: list[str]
    """What the user must know before training."""
    rows: list[PreviewRow]
    """The rows that are shown."""
    lengths: dict[str, np.ndarray]
    """Tokens a row, of all rows, by `source`, `target` and `total`."""
    limits: dict[str, int]
    """The longest that `source`, `target` or `total` may be; one that has no limit is missing."""


class Piece(NamedTuple):
    """A token of a shortened row: `text` is what is shown of it."""

    position: int
    token: PreviewToken
    text: str

    @property
    def trained(self) -> bool:
        """Whether the token carries loss."""
        return self.token.trained


class Gap(NamedTuple):
    """What a shortened row leaves out."""

    characters: int
    trained_characters: int
    tokens: int

    @property
    def trained(self) -> bool:
        """Whether everything left out carries loss; a mixed gap counts as context and says how much is trained."""
        return self.characters == self.trained_characters

    def __str__(self) -> str:
        mixed = 0 < self.trained_characters < self.characters
        note = f", {self.trained_characters:,} of them trained" if mixed else ""
        return f"… {self.characters:,} characters{note} …"


@dataclass(frozen=True, slots=True)
class Lengths:
    """The histogram of one kind of length, in bins of equally many whole numbers."""

    name: str
    rows: int
    least: int
    median: int
    p95: int
    most: int
    limit: int | None
    over: int
    """Rows above the limit."""
    low: int
    """Where the first bin starts; below zero if that lets a bin end at the limit."""
    step: int
    """Lengths a bin."""
    counts: list[int]
    """Rows in each bin."""
    beyond: int
    """Rows longer than the last bin reaches."""

    @property
    def high(self) -> int:
        """The maximum length of the last bin."""
        return self.low + self.step * len(self.counts) - 1

    def span(self, index: int) -> tuple[int, int]:
        """Returns the minimum and the maximum length of a bin."""
        first = self.low + index * self.step
        return max(first, 0), first + self.step - 1


def escape(character: str) -> str:
    """Returns how a control character is shown, e.g. `\\x1b`."""
    code = ord(character)
    return SHORT_ESCAPES.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def visible(text: str) -> str:
    """Returns `text` with its control characters shown as escapes; line feeds stay."""
    return CONTROL.sub(lambda match: escape(match[0]), text)


def one_line(text: str) -> str:
    """Returns `text` with its control characters and line feeds shown as escapes."""
    return visible(text).replace("\n", r"\n")


def describe_tokens(tokens: Sequence[PreviewToken]) -> str:
    """Returns e.g. `210 tokens, 57 trained`."""
    trained = sum(token.trained for token in tokens)
    count = "none" if not trained else "all" if trained == len(tokens) else f"{trained:,}"
    return f"{len(tokens):,} token{'' if len(tokens) == 1 else 's'}, {count} trained" if tokens else "no tokens"


def shorten_row(tokens: Sequence[PreviewToken], room: int) -> list[Piece | Gap]:
    """Returns the row in about `room` characters.

    Gaps replace what is left out. The ends of the row and of its first and last trained spans are always included,
    each with equally much text around it.
    """
    ends = list(itertools.accumulate(len(token.text) for token in tokens))
    parts: list[Piece | Gap] = []
    previous: int | None = None
    for low, high in _kept(tokens, ends, room):
        if previous is not None:
            parts.append(_gap(tokens, ends, previous, low))
        for position in range(bisect.bisect_left(ends, low), len(tokens)):
            token = tokens[position]
            start = ends[position] - len(token.text)
            if start > high:
                break
            text = token.text[max(low - start, 0) : high - start]
            if text or not token.text:
                parts.append(Piece(position, token, text))
        previous = high
    return parts


def _kept(tokens: Sequence[PreviewToken], ends: list[int], room: int) -> list[tuple[int, int]]:
    """Returns the ranges of characters to show."""
    total = ends[-1] if ends else 0
    if total <= room:
        return [(0, total)]
    points = {0, total}
    first = next((index for index, token in enumerate(tokens) if token.trained), None)
    if first is not None:
        after = next((index for index in range(first, len(tokens)) if not tokens[index].trained), len(tokens))
        last = next(index for index in reversed(range(len(tokens))) if tokens[index].trained)
        ahead = next((index for index in range(last, -1, -1) if not tokens[index].trained), -1)
        points |= {ends[first] - len(tokens[first].text), ends[after - 1], ends[last], ends[ahead] if ahead >= 0 else 0}
    # Bisection for the largest reach whose ranges fit.
    reach, too_far = 0, room
    while too_far - reach > 1:
        middle = (reach + too_far) // 2
        fits = sum(high - low for low, high in _around(points, middle, total)) <= room
        reach, too_far = (middle, too_far) if fits else (reach, middle)
    return _around(points, reach, total)


def _around(points: set[int], reach: int, total: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for point in sorted(points):
        low, high = max(point - reach, 0), min(point + reach, total)
        if ranges and low - ranges[-1][1] < MIN_GAP:
            low = ranges.pop()[0]
        ranges.append((low, high))
    return ranges


def _gap(tokens: Sequence[PreviewToken], ends: list[int], low: int, high: int) -> Gap:
    trained = whole = 0
    for position in range(bisect.bisect_right(ends, low), len(tokens)):
        token = tokens[position]
        start = ends[position] - len(token.text)
        if start >= high:
            break
        trained += token.trained * (min(ends[position], high) - max(start, low))
        whole += low <= start and ends[position] <= high
    return Gap(high - low, trained, whole)


def count_lengths(preview: Preview, bins: int) -> list[Lengths]:
    """Returns a histogram of about `bins` bins, 10 or more, for each kind of length that has rows."""
    counted = []
    for name, values in preview.lengths.items():
        if values.size:
            counted.append(_count(name, np.asarray(values, np.int64), preview.limits.get(name), bins))
    return counted


def _count(name: str, values: np.ndarray, limit: int | None, bins: int) -> Lengths:
    # An inverted CDF gives lengths that occur, whole numbers.
    points = np.percentile(values, [0, 50, 95, 99, 100], method="inverted_cdf")
    least, median, p95, p99, most = (int(point) for point in points)
    # A few rows far out would press all others into one bar: these stay beyond the last bin.
    high = most if most <= 3 * p99 else math.ceil(1.5 * p99)
    if limit is not None and high < limit <= 1.5 * high:
        high = limit
    low = least if least > 0.3 * high else 0
    if high - low < 8:
        low, high = max(low - 4, 0), high + 4
    step = math.ceil((high - low + 1) / bins)
    # Bins end at the limit, so that none holds rows from both sides of it; the first may then start below zero.
    anchor = limit if limit is not None and low <= limit <= high else high
    low -= -(anchor - low + 1) % step
    size = math.ceil((high - low + 1) / step)
    indices = (values - low) // step
    counts = np.bincount(np.minimum(indices, size), minlength=size + 1)
    over = 0 if limit is None else int(np.count_nonzero(values > limit))
    return Lengths(
        *(name, values.size, least, median, p95, most, limit, over),
        low=low,
        step=step,
        counts=counts[:size].tolist(),
        beyond=int(counts[size]),
    )
