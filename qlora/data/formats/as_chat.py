"""Alpaca's rows as conversations: `data.format=qlora.data.formats.as_chat:from_alpaca`, for a chat template."""

from __future__ import annotations

from typing import Any

from qlora.data.formats.cells import number_text


def from_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of `messages`: instruction and input, a line break between, are asked, and output is the answer.

    `system` and `history` (pairs of question and answer) stand before, if there are such columns; `prompt`, `query` and
    `response` are other names of the three; `kto_tag`, the label of the answer, is kept.
    """
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = [row.get("instruction") or row.get("prompt"), row.get("input") or row.get("query")]
    messages.append({"role": "user", "content": "\n".join(number_text(part) or str(part) for part in asked if part)})
    answers = (row.get(name) for name in ("output", "response"))
    messages.append({"role": "assistant", "content": next((said for said in answers if said not in (None, "")), "")})
    return {"messages": messages} | ({"kto_tag": row["kto_tag"]} if "kto_tag" in row else {})
