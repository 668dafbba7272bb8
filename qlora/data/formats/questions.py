"""Rows that ask and hold no answer, for a model to answer: which column asks, and in which words."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qlora.data.chat import conversations as chats
from qlora.data.chat.conversations import Conversation
from qlora.data.formats.cells import Row
from qlora.data.formats.prompts import ALPACA, PROMPTS, QUESTION, Example, Segment
from qlora.data.formats.recognise import Choice
from qlora.data.formats.renderers import Format, cell_of, read_said

NAME = "questions"
ASKING = ("instruction", "question", "prompt", "query", "input", "inputs", "problem", "text")
"""The columns that ask, the first of them that a set has."""
CONTEXT = ("input", "context")
"""What an instruction may stand beside."""


def choose_questions(columns: Sequence[str], *, between: str | None) -> Choice | None:
    """Returns how rows with these columns ask; None: no column does.

    `between` stands between an instruction and its input in a message of a chat; None: they are asked in the words of
    the instruction formats.
    """
    asking = next((name for name in ASKING if name in columns), None)
    if asking is None:
        return None
    render = functools.partial(_render, column=asking, between=between)
    return Choice(NAME, f"the column {asking}, and none with answers", Format(render, ((asking,),)))


def is_whole_text(choice: Choice, sample: Sequence[Row]) -> bool:
    """Returns whether rows were taken for texts that are trained as a whole, and none of them holds a dialogue."""
    marks = [prompt.behind for prompt in PROMPTS if prompt.in_text]
    return choice.name == "text" and not any(mark in str(row.get("text")) for mark in marks for row in sample)


def asks(example: Example) -> bool:
    """Returns whether an example ends where the answer would begin."""
    if isinstance(example, Conversation):
        return example.messages[-1]["role"] != "assistant"
    answer = example[-1]
    return answer.trained and not answer.text.strip()


def _render(row: Row, *, column: str, between: str | None) -> list[Example]:
    turns = read_said(row, NAME, column, "user")
    if not turns:
        return []
    is_text = isinstance(row.get(column), str) and len(turns) == 1 and turns[0]["role"] == "user"
    context = next((text for name in CONTEXT if column == "instruction" and (text := cell_of(row, NAME, name))), "")
    if not is_text or between is not None:
        if context:
            turns = [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']}{between or ''}{context}"}]
        return list(chats.build_conversation(row, turns, f"column {column}"))
    system = cell_of(row, NAME, "system")
    asked = {"instruction": lambda text: ALPACA.ask(text, context), "question": QUESTION.ask}.get(column, str)
    said = Segment(asked(turns[0]["content"]), False, f"{system}\n\n" if system else "")
    return [[said, Segment("", True)]]
