"""Rows of other formats as conversations, for a chat template: `data.format=qlora.data.formats.as_chat:from_alpaca`."""

from __future__ import annotations

from typing import Any

from qlora.data.formats.cells import number_text
from qlora.data.formats.prompts import ALPACA_NEWLINE
from qlora.data.formats.scores import SIDE_SCORE

Row = dict[str, Any]

QUESTIONS = ("instruction", "prompt", "question", "input", "query")
"""The columns that may hold what is asked."""


def from_alpaca(row: Row) -> Row:
    """Returns a row of `messages`: instruction and input, a line break between, are asked, and output is the answer.

    `system` and `history` (pairs of question and answer) stand before, if there are such columns; `prompt`, `question`,
    `query`, `completion` and `response` are other names of the three; `kto_tag` and `label`, labels of the answer, are
    kept.
    """
    labels = {name: row[name] for name in ("kto_tag", "label") if name in row}
    return {"messages": [*_asked(row), _turn("assistant", _answer(row))]} | labels


def from_pair(row: Row) -> Row:
    """Returns a row of turns of the prompt and of both answers, of which texts are asked as `from_alpaca` does.

    Columns that hold turns already stay as they are.
    """
    said = {name: row.get(name, row.get(f"{name}_response")) for name in ("chosen", "rejected")}
    if not all(isinstance(text, str) for text in said.values()) or not any(
        isinstance(row.get(name), str) and row[name] for name in QUESTIONS
    ):
        return row
    answers = {name: [_turn("assistant", text)] for name, text in said.items()}
    scores = {name: cell for name, cell in row.items() if SIDE_SCORE.fullmatch(name.lower().replace("-", "_"))}
    return {"conversations": _asked(row), **answers, **scores}


def _asked(row: Row) -> list[Row]:
    messages = [_turn("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [_turn("user", question), _turn("assistant", answer)]
    first = next((row[name] for name in ("instruction", "prompt", "question") if row.get(name)), None)
    asked = [first, row.get("input") or row.get("query")]
    return [*messages, _turn("user", "\n".join(_text(part) for part in asked if part))]


def from_alpaca_prompt(row: Row) -> Row:
    """Returns a row of `messages` whose question is Alpaca's whole prompt, as torchtune has it."""
    asked = ALPACA_NEWLINE.ask(_text(row.get("instruction")), _text(row.get("input")))
    return {"messages": [_turn("user", asked), _turn("assistant", _answer(row))]}


def from_input_output(row: Row) -> Row:
    """Returns a row of `messages` of the columns input and output alone."""
    return {"messages": [_turn("user", _text(row.get("input"))), _turn("assistant", row.get("output") or "")]}


def from_any(row: Row) -> Row:
    """Returns a row of messages or conversations as it is, and any other as `from_alpaca` does."""
    return row if row.get("messages") or row.get("conversations") else from_alpaca(row)


def _turn(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def _answer(row: Row) -> Any:
    answers = (row.get(name) for name in ("output", "response", "completion"))
    return next((said for said in answers if said not in (None, "")), "")


def _text(value: Any) -> str:
    return "" if value is None else number_text(value) or str(value)
