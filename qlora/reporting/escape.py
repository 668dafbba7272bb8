"""Escapes untrusted text (rows, names, tokens) for Markdown, CSV and HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qlora.text import visible

MARKDOWN = re.compile(r"[\\`*{}\[\]<>#|!~&$]|(?<![^\W_])_|_(?![^\W_])")
"""What has a meaning inside a line of Markdown; an underscore inside a word has none."""
BEGINS = re.compile(r"^(\s*)(-+|=+|\+|\d+[.)])(?=\s|$)")
"""What has one at its beginning: lists, and the lines under a heading."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What begins a formula in a spreadsheet."""


def markdown_text(text: str) -> str:
    """Returns a text as a part of a Markdown line that shows it as it is: no link, no picture, no HTML, no heading."""
    line = " ".join(visible(text).split())
    escaped = MARKDOWN.sub(lambda sign: "\\" + sign[0], line)
    escaped = BEGINS.sub(lambda match: f"{match[1]}{match[2][:-1]}\\{match[2][-1]}", escaped)
    return re.sub(r"(?i)\b(https?|ftp|mailto|www)([:.])", r"\1\\\2", escaped)


def markdown_code(text: str) -> str:
    """Returns a text as a code span, whose fence is longer than any run of backticks in it."""
    line = " ".join(visible(text).split())
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line or ' '}{pad}{fence}"


def markdown_block(text: str, language: str = "") -> str:
    """Returns a text as a block of code, whose fence is longer than any run of backticks in it."""
    fence = "`" * max(_longest_run(text) + 1, 3)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of plain texts."""
    lines = [[markdown_text(cell) for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_cell(value: Any) -> Any:
    """Returns a value as a cell that no spreadsheet takes for a formula: such a text gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None
    starts = value.startswith(FORMULA) or value.lstrip().startswith(FORMULA)
    return f"'{text}" if starts and not is_number else text


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
