"""Writes a preview for the terminal, readable with and without colours."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import cell_len

from qlora.reporting.preview.content import (
    CONTROL,
    Gap,
    Lengths,
    Piece,
    Preview,
    PreviewRow,
    count_lengths,
    describe_tokens,
    escape,
    one_line,
    shorten_row,
    visible,
)

ROOM = 2_500  # characters of a row
LONGEST_TOKEN = 40  # characters in the list of ids
OPEN, CLOSE = "⟦", "⟧"
BARS = " ▁▂▃▄▅▆▇█"
# Select Graphic Rendition parameters (ECMA-48).
STYLES = {"bold": "1", "faint": "2", "label": "36", "warning": "33", "trained": "30;42", "faint trained": "2;30;42"}


@dataclass(frozen=True, slots=True)
class _Pen:
    """Styles text where there are colours."""

    color: bool

    def __call__(self, text: str, style: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self.color and text and style else text


def to_text(preview: Preview, *, ids: bool, color: bool, width: int = 80) -> str:
    """Returns the preview as lines for a terminal of `width` columns, without a line feed at the end.

    Trained tokens stand on a background; without `color`, between ⟦ and ⟧. No control character of the data is
    printed raw. The text of a row is neither wrapped nor indented. `ids` lists each token with its id.
    """
    pen = _Pen(color)
    blocks = [[pen(one_line(preview.title), "bold"), *_summary(preview.summary, pen, width)]]
    blocks.append([line for warning in preview.warnings for line in _warning(warning, pen, width)])
    if preview.rows:
        blocks.append([_legend(pen)])
    blocks += [_row(row, pen, ids, width) for row in preview.rows]
    blocks.append(_lengths(preview, pen, width))
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _summary(summary: list[tuple[str, str]], pen: _Pen, width: int) -> list[str]:
    rows = [(one_line(label), one_line(value)) for label, value in summary]
    indent = max((cell_len(label) for label, _ in rows), default=0) + 4
    lines = []
    for label, value in rows:
        head = pen(f"  {label}", "label") + " " * (indent - 2 - cell_len(label))
        first, *rest = _wrap(value, width - indent)
        lines += [head + first, *(" " * indent + line for line in rest)]
    return lines


def _warning(text: str, pen: _Pen, width: int) -> list[str]:
    return [pen(("    " if number else "  ! ") + line, "warning") for number, line in enumerate(_wrap(text, width - 4))]


def _wrap(text: str, room: int) -> list[str]:
    return textwrap.wrap(one_line(text), max(room, 30), break_long_words=False, break_on_hyphens=False) or [""]


def _legend(pen: _Pen) -> str:
    mark = pen("trained", "trained") if pen.color else f"{OPEN}trained{CLOSE}"
    return f"{mark} tokens carry loss; everything else is context"


def _row(row: PreviewRow, pen: _Pen, ids: bool, width: int) -> list[str]:
    head, counts = f"── row {row.number} ", f"· {describe_tokens(row.tokens)} "
    rule = "─" * max(width - cell_len(head + counts), 2)
    lines = [pen(head, "bold") + pen(counts + rule, "faint")]
    lines += [pen(f"   {line}", "warning") for note in row.notes for line in _wrap(note, width - 3)]
    parts = shorten_row(row.tokens, ROOM)
    if parts:
        lines.append("".join(_colored(parts, pen) if pen.color else _bracketed(parts)))
    if parts and ids:
        lines += ["", *_ids(parts, pen, width)]
    return lines


def _colored(parts: list[Piece | Gap], pen: _Pen) -> Iterable[str]:
    """Styles each line by itself: a background that spans a line feed may fill the rest of the line."""
    for (trained, hidden), run in itertools.groupby(parts, lambda part: (part.trained, isinstance(part, Gap))):
        style, faint = ("trained", "faint trained") if trained else ("", "faint")
        if hidden:
            yield from (pen(str(gap), faint) for gap in run)
            continue
        text = "".join(part.text for part in run if isinstance(part, Piece))
        for number, line in enumerate(text.split("\n")):
            if number:
                yield pen("⏎", faint) + "\n"
            end = 0
            for match in CONTROL.finditer(line):
                yield pen(line[end : match.start()], style) + pen(escape(match[0]), faint)
                end = match.end()
            yield pen(line[end:], style)


def _bracketed(parts: list[Piece | Gap]) -> Iterable[str]:
    inside = False
    for part in parts:
        if part.trained != inside:
            yield OPEN if part.trained else CLOSE
            inside = part.trained
        yield str(part) if isinstance(part, Gap) else _plain(part.text)
    if inside:
        yield CLOSE


def _plain(text: str) -> str:
    """Returns `text` without what could be taken for a bracket of ours."""
    return visible(text).replace(OPEN, escape(OPEN)).replace(CLOSE, escape(CLOSE))


def _ids(parts: list[Piece | Gap], pen: _Pen, width: int) -> list[str]:
    lines: list[str] = []
    room, seen = 0, -1
    for part in parts:
        if isinstance(part, Gap):
            if not part.tokens:
                continue
            item, style = f"… {part.tokens:,} tokens …", "faint"
        else:
            if part.position == seen:  # the other end of a token with a gap inside
                continue
            seen = part.position
            text = one_line(part.token.text)
            half = LONGEST_TOKEN // 2
            text = text if len(text) <= LONGEST_TOKEN else f"{text[:half]}…{text[-half:]}"
            mark, style = ("*", "trained") if part.trained else ("", "")
            item = f'{mark}{part.token.id} "{text}"'
        size = cell_len(item) + 2
        if not lines or size > room:
            lines.append("  " + pen(item, style))
            room = width - size
        else:
            lines[-1] += "  " + pen(item, style)
            room -= size
    return lines


def _lengths(preview: Preview, pen: _Pen, width: int) -> list[str]:
    counted = count_lengths(preview, bins=min(max(width - 76, 10), 40))
    if not counted:
        return [pen("Tokens a row", "bold") + ": no rows were counted"]
    head, *numbers = zip(*(_numbers(lengths) for lengths in counted), strict=True)
    titles = ("min", "median", "p95", "max")
    sizes = [max(map(len, (title, *column))) for title, column in zip(titles, numbers, strict=True)]
    room, size = max(map(cell_len, head)), max(len(lengths.counts) for lengths in counted)
    lines = [pen("Tokens a row", "bold") + f", {counted[0].rows:,} rows"]
    cells = "  ".join(title.rjust(size) for title, size in zip(titles, sizes, strict=True))
    lines.append(pen(" " * (room + size + 6) + cells, "faint"))
    for label, lengths, *values in zip(head, counted, *numbers, strict=True):
        cells = "  ".join(value.rjust(size) for value, size in zip(values, sizes, strict=True))
        label = pen(f"  {label}", "label") + " " * (room - cell_len(label))
        lines.append(f"{label}  {_bars(lengths).ljust(size)}  {cells}{_remark(lengths)}")
    return lines


def _numbers(lengths: Lengths) -> tuple[str, ...]:
    numbers = (lengths.least, lengths.median, lengths.p95, lengths.most)
    return (one_line(lengths.name), *(f"{number:,}" for number in numbers))


def _bars(lengths: Lengths) -> str:
    tallest = max(lengths.counts) or 1
    return "".join(BARS[-(-8 * count // tallest)] for count in lengths.counts)  # rounded up: few is not none


def _remark(lengths: Lengths) -> str:
    remark = "" if lengths.limit is None else f"  limit {lengths.limit:,}"
    if lengths.over:
        remark += f", {lengths.over:,} over"
    return remark + (f"  ({lengths.beyond:,} not drawn)" if lengths.beyond else "")
