"""Rows of other formats as conversations, for a chat template: `data.format=qlora.data.formats.as_chat:from_alpaca`."""

from __future__ import annotations

from typing import Any

from qlora.data.formats.cells import number_text
from qlora.data.formats.prompts import ALPACA_NEWLINE

Row = dict[str, Any]


def from_alpaca(row: Row) -> Row:
    """Returns a row of `messages`: instruction and input, a line break between, are asked, and output is the answer.

    `system` and `history` (pairs of question and answer) stand before, if there are such columns; `prompt`, `query` and
    `response` are other names of the three; `kto_tag`, the label of the answer, is kept.
    """
    messages = [_turn("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [_turn("user", question), _turn("assistant", answer)]
    asked = [row.get("instruction") or row.get("prompt"), row.get("input") or row.get("query")]
    messages.append(_turn("user", "\n".join(_text(part) for part in asked if part)))
    messages.append(_turn("assistant", _answer(row)))
    return {"messages": messages} | ({"kto_tag": row["kto_tag"]} if "kto_tag" in row else {})


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
    answers = (row.get(name) for name in ("output", "response"))
    return next((said for said in answers if said not in (None, "")), "")


def _text(value: Any) -> str:
    return "" if value is None else number_text(value) or str(value)
