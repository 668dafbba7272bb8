"""Rows in Alpaca's columns as conversations: `data.format=qlora.data.as_chat:from_alpaca`, for a chat template."""

from __future__ import annotations

from typing import Any


def from_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of `messages`: instruction and input, a line break between, are asked, and output is the answer.

    `system` and `history` (pairs of question and answer) stand before, if there are such columns; `prompt`, `query` and
    `response` are other names of the three.
    """
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = [row.get("instruction") or row.get("prompt"), row.get("input") or row.get("query")]
    messages.append({"role": "user", "content": "\n".join(str(part) for part in asked if part)})
    messages.append({"role": "assistant", "content": row.get("output") or row.get("response") or ""})
    return {"messages": messages}
