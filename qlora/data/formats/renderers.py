"""What the columns of a row mean: a table of pure functions from a row to what is trained on."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.data.chat import conversations as chats
from qlora.data.chat.conversations import Message
from qlora.data.formats import scores
from qlora.data.formats.cells import Row, cell_text, is_missing, peek, track
from qlora.data.formats.labels import KTO_LABELS, LABELS, is_rejected
from qlora.data.formats.prompts import ALPACA, ALPACA_NEWLINE, PROMPTS, QUESTION, AnyExample, Example, Prompt, Segment
from qlora.errors import DataError
from qlora.text import brief

ASKED = ("conversations", "prompt", "question", "instruction", "input", "query", "messages")
"""The columns that may hold what a chosen answer answers, the first one that is filled."""

END_MARK = "<|endoftext|>"
"""GPT-3's end of text, which self-instruct's completions spell out; the tokenizer's own end token follows anyway."""

HUMAN_BOT = re.compile(r"(?:^|\n)<(human|bot)>: ?")
GUANACO = re.compile(r"### (Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Format:
    """How rows of one layout become examples."""

    render: Callable[[Row], Sequence[AnyExample]]
    """A pure function; rows reach it with at least one of the alternatives in `needs`. A row gives one example,
    several where it is nested, none where it is to be left out."""
    needs: tuple[tuple[str, ...], ...]
    """The columns without which it cannot work; each tuple is an alternative."""
    labels: tuple[str, ...] = ()
    """The columns, in any capitals, that say whether the answer of a row is a good one."""

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """Returns the columns that are missing for the alternative nearest to `columns`."""
        present = set(columns)
        return min(([c for c in names if c not in present] for names in self.needs), key=len)

    def describe_needs(self) -> str:
        """Returns the columns in words: "instruction and output"."""
        return " or ".join(" and ".join(names) for names in self.needs)


def alpaca(row: Row, prompt: Prompt = ALPACA) -> list[Example]:
    """Renders instruction, input or context (absent, null or empty: none) and output or response as Alpaca does.

    The column `system` stands before all, an empty line behind it. Each round of `history`, pairs of question and
    answer, stands before the row's own with the same prompt and an end token.
    """
    if is_rejected(row, *KTO_LABELS):
        return []
    return [_answer_alpaca(row, cell_of(row, "alpaca", "output", "response"), prompt)]


def _answer_alpaca(row: Row, answer: str, prompt: Prompt = ALPACA) -> list[Segment]:
    """Renders an answer to what a row of Alpaca's layout asks, and has asked before."""
    context = cell_of(row, "alpaca", "input", "context")
    rounds = [_pair(prompt.ask(asked), answered) for asked, answered in _history(row)]
    question = prompt.ask(cell_of(row, "alpaca", "instruction"), context)
    earlier = [segment._replace(ends=segment.trained) for segments in rounds for segment in segments]
    return _after_system(row, "alpaca", [*earlier, *_pair(question, answer)])


def alpaca_newline(row: Row) -> list[Example]:
    """Renders as `alpaca` does, with a line break in place of the last blank of the prompt (Axolotl, torchtune)."""
    return alpaca(row, ALPACA_NEWLINE)


def _history(row: Row) -> list[tuple[str, str]]:
    """Returns the pairs of question and answer in the column `history`, a list or its JSON."""
    cell = chats.decode(row.get("history"))
    rounds = [] if cell is None or cell == "" else cell
    if not isinstance(rounds, list) or not all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(said is None or isinstance(said, str) for said in pair)
        for pair in rounds
    ):
        raise DataError(
            f"data.format=alpaca needs pairs [question, answer] in column history, but a row holds {brief(cell)}"
        )
    return [(asked or "", answer or "") for asked, answer in rounds]


def _alpaca(instruction: str, context: str, answer: str) -> list[Segment]:
    return _pair(ALPACA.ask(instruction, context), answer)


def _pair(source: str, target: str) -> list[Segment]:
    return [Segment(source, False), Segment(target, True)]


def _whole(text: str, prompt: str = "") -> list[Segment]:
    """Returns a text that is trained as a whole; one that ends where its answer would begin has an empty answer."""
    said = text.rstrip()
    marks = (prompt_words for prompt_words in PROMPTS if prompt_words.in_text and prompt_words.prefix.strip() in said)
    is_open = bool(prompt.strip()) and said == prompt.rstrip()
    if is_open or any(said.endswith(prompt_words.behind) for prompt_words in marks):
        return _pair(said, "")
    return _pair("", text)


def _after_system(row: Row, name: str, segments: list[Segment]) -> list[Segment]:
    """Puts what the column `system` says before the first segment, as the chat template of these rows does."""
    system = cell_of(row, name, "system")
    return [segments[0]._replace(system=f"{system}\n\n"), *segments[1:]] if system else segments


def input_output(row: Row) -> list[Example]:
    """Renders input and output verbatim, after what `system` says; none where `kto_tag` is false."""
    if is_rejected(row, *KTO_LABELS):
        return []
    pair = _pair(cell_of(row, "input-output", "input"), cell_of(row, "input-output", "output"))
    return [_after_system(row, "input-output", pair)]


def prompt_completion(row: Row) -> list[Example]:
    """Renders prompt and completion verbatim, after what `system` says, or all as turns of a chat (TRL).

    None where a label marks the completion as a bad one (KTO).
    """
    if is_rejected(row):
        return []
    name = "prompt-completion"
    if _turns(row.get("prompt")) is None and _turns(row.get("completion")) is None:
        answer = cell_of(row, name, "completion").removesuffix(END_MARK)
        return [_after_system(row, name, _pair(cell_of(row, name, "prompt"), answer))]
    return _chat(
        row, read_said(row, name, "prompt", "user") + read_said(row, name, "completion", "assistant"), "completion"
    )


def question_answer(row: Row) -> list[Example]:
    """Renders "Question: ...", a new line, "Answer: ", and the answer, after what `system` says.

    None where `kto_tag` is false.
    """
    if is_rejected(row, *KTO_LABELS):
        return []
    question, answer = cell_of(row, "question-answer", "question"), cell_of(row, "question-answer", "answer")
    return [_after_system(row, "question-answer", _pair(QUESTION.ask(question), answer))]


def text(row: Row) -> list[Example]:
    """Renders a whole text without a prompt (OpenAssistant-Guanaco)."""
    return [_whole(cell_of(row, "text", "text"))]


def chosen(row: Row, column: str = "chosen") -> list[Example]:
    """Renders the preferred answer of a pair, or that of another `column`.

    A text that holds its own prompt, or has none, is trained as a whole, as in the original (HH-RLHF); one that
    answers a text in `prompt` or an Alpaca instruction is trained after it; turns become a chat: those of one of
    `ASKED`, then the chosen ones.
    """
    asked = next((name for name in ASKED if not is_missing(peek(row, name))), "prompt")
    if _turns(row.get(column)) is None and asked != "conversations" and _turns(peek(row, asked)) is None:
        answer, prompt = cell_of(row, "chosen", column), cell_of(row, "chosen", "prompt")
        if row.get("instruction"):
            return [_answer_alpaca(row, answer)]
        if prompt and not answer.startswith(prompt):
            return [_after_system(row, "chosen", _pair(prompt, answer))]
        if asked == "prompt":
            return [_whole(answer, prompt)]
    turns = read_said(row, "chosen", column, "assistant")
    if turns and turns[0]["role"] == "assistant":
        turns = read_said(row, "chosen", asked, "user") + turns
    return _chat(row, turns, column)


def scored(row: Row) -> list[Example]:
    """Renders the answer with the best score, of several, as `chosen` does (UltraFeedback)."""
    best = scores.best(row)
    return [] if best is None else chosen(best)


def _chat(row: Row, turns: list[Message], column: str) -> list[Example]:
    return list(chats.build_conversation(row, turns, f"column {column}"))


def read_said(row: Row, name: str, column: str, speaker: str) -> list[Message]:
    """Returns a cell as messages: turns as they are, a text as said by `speaker`."""
    turns = _turns(row.get(column))
    if turns is None:
        said = cell_of(row, name, column)
        return [{"role": speaker, "content": said}] if said else []
    return chats.normalise(turns, column, row)


def _turns(cell: Any) -> list[Any] | None:
    """Returns the turns in a cell, which may be one alone or JSON; None: it holds none."""
    value = chats.decode(cell)
    if chats.is_turn(value):
        return [value]
    if not isinstance(value, list):
        return None
    # A text may be a JSON list that is no chat.
    return value if not isinstance(cell, str) or (value and all(map(chats.is_turn, value))) else None


def human_bot(row: Row) -> list[Example]:
    """Renders "<human>: ...", "<bot>: ..." (OIG): one question and answer as the original does, more as a chat."""
    whole = cell_of(row, "human-bot", "text")
    if whole.count("\n<bot>: ") == 1 and whole.count("<human>: ") <= 1:
        source, target = whole.split("\n<bot>: ")
        return [_pair(source.replace("<human>: ", ""), target)]
    return _marked(row, whole, "human-bot", HUMAN_BOT, "'<human>: ' and '<bot>: '")


def guanaco(row: Row) -> list[Example]:
    """Renders "### Human: ...### Assistant: ..." as a chat, so that the loss may count the answers alone."""
    marks = "'### Human: ' and '### Assistant: '"
    return _marked(row, cell_of(row, "guanaco", "text"), "guanaco", GUANACO, marks)


def inst(row: Row) -> list[Example]:
    """Renders Llama 2's "<s>[INST] ... [/INST] ... </s>" as a chat."""
    whole = cell_of(row, "inst", "text")
    turns = chats.split_inst(whole)
    if turns is None:
        raise DataError(f"data.format=inst needs '[INST]' and '[/INST]' in column text, but a row holds {brief(whole)}")
    return _chat(row, turns, "text")


def _marked(row: Row, whole: str, name: str, mark: re.Pattern[str], label: str) -> list[Example]:
    if not mark.search(whole):
        raise DataError(f"data.format={name} needs {label} in column text, but a row holds {brief(whole)}")
    return _chat(row, chats.split_marked(whole, mark), "text")


def self_instruct_tasks(row: Row) -> list[Example]:
    """Renders an instruction with instances of input and output: one Alpaca example an instance."""
    name = "self-instruct-tasks"
    instruction = cell_of(row, name, "instruction")
    return [
        _alpaca(instruction, cell_of(task, name, "input"), cell_of(task, name, "output"))
        for task in nested(row, "instances", name)
    ]


def unnatural(row: Row, *, reformulations: bool = False) -> list[Example]:
    """Renders Unnatural Instructions as the original: instruction_with_input verbatim, then output, an instance each.

    The constraints are not shown, and the reformulated instructions only where asked for. Flattened rows without
    instruction_with_input are Alpaca's.
    """
    if "instances" not in row:
        return [_unnatural(row)] if row.get("instruction_with_input") else alpaca(row)
    tasks = nested(row, "instances", "unnatural")
    if reformulations:
        tasks += nested(row, "reformulations", "unnatural")
    return [_unnatural(task) for task in tasks]


def _unnatural(task: Row) -> list[Segment]:
    return _pair(cell_of(task, "unnatural", "instruction_with_input"), cell_of(task, "unnatural", "output"))


def nested(row: Row, column: str, name: str) -> list[Row]:
    """Returns the rows inside a cell: a list of objects, an object of lists, or the JSON of either."""
    cell = chats.decode(row.get(column))
    if isinstance(cell, Mapping) and all(isinstance(part, list) for part in cell.values()):
        # What `datasets` makes of a sequence of objects.
        cell = [dict(zip(cell, parts, strict=True)) for parts in zip(*cell.values(), strict=True)]
    if not cell:
        return []
    if not isinstance(cell, list) or not all(isinstance(part, Mapping) for part in cell):
        raise DataError(f"data.format={name} needs a list of objects in column {column}, but a row holds {brief(cell)}")
    return [track(row, part, column) for part in cell]


def segments(row: Row) -> list[Example]:
    """Renders a list of [text, trained] pairs, or source and target."""
    pairs = chats.decode(row.get("segments"))
    if pairs is None:
        return [_pair(cell_of(row, "segments", "source"), cell_of(row, "segments", "target"))]
    try:
        rendered = [Segment(text, trained) for text, trained in pairs]
    except (TypeError, ValueError):
        rendered = None
    if rendered is None or not all(isinstance(s.text, str) and isinstance(s.trained, bool) for s in rendered):
        raise DataError(f"data.format=segments: a row holds {brief(pairs)} as segments; each must be a pair "
                          "[text, true or false]")  # fmt: skip
    return [rendered]


# In the order in which `auto` tries them.
FORMATS: dict[str, Format] = {
    "unnatural": Format(
        unnatural, (("instruction", "instances"), ("instruction_with_input", "output"), ("instruction", "output"))
    ),
    "self-instruct-tasks": Format(self_instruct_tasks, (("instruction", "instances"),)),
    "alpaca": Format(alpaca, (("instruction", "output"), ("instruction", "response")), KTO_LABELS),
    "segments": Format(segments, (("segments",), ("source", "target"))),
    "chosen": Format(chosen, (("chosen",),)),
    scores.NAME: Format(scored, tuple((column,) for column in scores.LISTS)),
    "messages": Format(chats.messages, (("messages",),), LABELS),
    "conversations": Format(chats.conversations, (("conversations",),), LABELS),
    "prompt-completion": Format(prompt_completion, (("prompt", "completion"),), LABELS),
    "input-output": Format(input_output, (("input", "output"),), KTO_LABELS),
    "question-answer": Format(question_answer, (("question", "answer"),), KTO_LABELS),
    "human-bot": Format(human_bot, (("text",),)),
    "inst": Format(inst, (("text",),)),
    "text": Format(text, (("text",),)),
    "guanaco": Format(guanaco, (("text",),)),
    "alpaca-newline": Format(alpaca_newline, (("instruction", "output"), ("instruction", "response")), KTO_LABELS),
}
OPTIONAL_COLUMNS = ("input", "rejected", "scores", "context", "system", "history", "tools", "functions", *LABELS)
"""Columns that formats read where they are there."""
WITH_REFORMULATIONS = Format(functools.partial(unnatural, reformulations=True), FORMATS["unnatural"].needs)


def cell_of(row: Row, name: str, *columns: str) -> str:
    """Returns the first cell that is not empty as text; absent and empty ones are ""."""
    cells = (cell_text(row.get(column), column, name) for column in columns)
    return next((text for text in cells if text), "")
