"""Parses JSON text of any length piece by piece: one object a line, or one array of objects."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from qlora.data.ingest.row_size import MAX_ROW_BYTES, check_text, too_long
from qlora.errors import DataError

Row = dict[str, Any]

BLANKS = " \t\r\n"
_blanks = re.compile(f"[{BLANKS}]*")
NEAR_END = 16
"""An error that few characters before the end of the text at hand may come of the cut: longer than -Infinity."""


class DoubledKey(ValueError):
    """An object has a key twice, so that one of its values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DoubledKey(f"the key {key!r} stands twice in one object; keep one of them")
    return row


_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_CONSTANTS.__getitem__)
parse = _decoder.decode
"""Parses a whole text; NaN is null. Raises `DoubledKey`, `json.JSONDecodeError`, `ValueError` or `RecursionError`."""
_scan: Callable[[str, int], tuple[Any, int]] = cast(Any, _decoder).scan_once
"""Parses one value at a position; `parse` does the same in twice the time for a short row."""


def read_lines(
    file: IO[bytes], label: str, *, size: int, most: int = MAX_ROW_BYTES
) -> Iterator[tuple[list[int], list[Row]]]:
    """Yields line numbers and the objects that stand on them, for about `size` bytes at a time.

    No line may have more than `most` bytes.
    """
    number = 0
    for text in _whole_lines(file, label, size, most):
        rows, numbers = [], []
        # str.splitlines would also split at characters like U+2028, which JSON strings may hold.
        for line in text.split("\n"):
            number += 1
            line = line.strip(BLANKS)
            if not line:
                continue
            check_text(line, most, f"{label}, line {number}")
            try:
                row, end = _scan(line, 0)
            except DoubledKey as error:
                raise DataError(f"{label}, line {number}: {error}") from None
            except (StopIteration, ValueError, RecursionError):
                end = -1
            if end != len(line):
                raise DataError(
                    f"{label}, line {number}: broken JSON ({_reason(line)}); the file must hold one array of objects, "
                    "or one object a line"
                )
            if type(row) is not dict:
                raise DataError(f"{label}, line {number}: {_kind(row)}; each line must hold an object")
            rows.append(row)
            numbers.append(number)
        yield numbers, rows


def read_array(file: IO[str], label: str, *, size: int, most: int = MAX_ROW_BYTES) -> Iterator[tuple[int, list[Row]]]:
    """Yields objects of the array, with the number of the first (from 0), for about `size` characters at a time.

    No object may have more than `most` bytes.
    """
    window = _Window(file, label, size)
    rows: list[Row] = []
    start = count = yielded = 0
    window.advance()
    is_open = window.peek() != "]"
    while is_open:
        row = window.value(most, f"{label}: element {count} of the array")
        if type(row) is not dict:
            raise DataError(f"{label}: element {count} of the array is {_kind(row)}; each must be an object")
        rows.append(row)
        count += 1
        mark = window.peek()
        if mark not in (",", "]"):
            raise window.error("Expecting ',' delimiter", window.position)
        is_open = mark == ","
        if is_open:
            window.advance()
            window.peek()
        if window.consumed - yielded > size:
            yield start, rows
            rows, start, yielded = [], count, window.consumed
    window.advance()
    if window.peek():
        raise window.error("Extra data", window.position)
    yield start, rows


class _Window:
    """The part of a file's text that is being parsed."""

    def __init__(self, file: IO[str], label: str, size: int) -> None:
        self.file, self.label, self.size = file, label, size
        self.text, self.position = "", 0
        self.dropped, self.line = 0, 1  # characters and lines before the text
        self.peek()

    @property
    def consumed(self) -> int:
        return self.dropped + self.position

    def peek(self) -> str:
        """Moves to the next character that is no blank and returns it, or "" at the end."""
        while True:
            self.position = _end_of_blanks(self.text, self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def advance(self) -> None:
        self.position += 1

    def value(self, most: int, name: str) -> Any:
        """Returns the value that begins here, which errors call `name` where it has more than `most` bytes."""
        while True:
            try:
                value, end = _scan(self.text, self.position)
            except StopIteration as error:
                message, position = "Expecting value", error.value
            except json.JSONDecodeError as error:
                message, position = error.msg, error.pos
            except DoubledKey as error:
                raise DataError(f"{self.label}, line {self.line_of(self.position)}: {error}") from None
            except (ValueError, RecursionError) as error:
                raise self.error(_said(error), self.position) from None
            else:
                check_text(self.text[self.position : end], most, name)
                self.position = end
                return value
            is_cut = message.startswith("Unterminated string") or position >= len(self.text) - NEAR_END
            if is_cut and len(self.text) - self.position > most:
                raise too_long(name, most)
            if not is_cut or not self.more():
                raise self.error(message, position)

    def more(self) -> bool:
        """Drops what was parsed and reads on, ever more where one value needs it; returns False at the end."""
        rest = len(self.text) - self.position
        text = self.file.read(max(self.size, rest))
        if text:
            self.line += self.text.count("\n", 0, self.position)
            self.dropped += self.position
            self.text, self.position = self.text[self.position :] + text, 0
        return bool(text)

    def error(self, message: str, position: int) -> DataError:
        if position >= len(self.text.rstrip()) or message.startswith("Unterminated string"):
            message = "the array is not closed; is the file cut off?"
            position = len(self.text.rstrip())
        return DataError(f"{self.label}, line {self.line_of(position)}: broken JSON ({message})")

    def line_of(self, position: int) -> int:
        """Returns the line of the file, from 1, on which a position of the text stands."""
        return self.line + self.text.count("\n", 0, position)


def _end_of_blanks(text: str, position: int) -> int:
    match = _blanks.match(text, position)
    assert match is not None, "the expression matches nothing too"
    return match.end()


def _whole_lines(file: IO[bytes], label: str, size: int, most: int) -> Iterator[str]:
    """Yields text that ends with a line, without its newline."""
    waiting = [file.read(size).removeprefix(b"\xef\xbb\xbf")]
    lines, unfinished = waiting[0].count(b"\n"), len(waiting[0]) - waiting[0].rfind(b"\n") - 1
    while block := file.read(size):
        cut = block.rfind(b"\n")
        lines += block.count(b"\n")
        if cut < 0:
            waiting.append(block)
            unfinished += len(block)
            if unfinished > most:
                raise too_long(f"{label}, line {lines + 1}", most)
            continue
        yield str(b"".join([*waiting, block[:cut]]), "utf-8")
        waiting = [block[cut + 1 :]]
        unfinished = len(waiting[0])
    yield str(b"".join(waiting), "utf-8")


def _reason(text: str) -> str:
    try:
        parse(text)
    except (ValueError, RecursionError) as error:
        return _said(error)
    raise AssertionError("the decoder takes what its own scanner refuses")


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true or false"}
    return kinds.get(type(value), "null")
