"""Writes conversations with a chat template, and finds which characters of the text the loss counts.

A template is a program; what it made of a message is found, not assumed. The conversation is written a second time
with a mark in place of every content, and the two texts are read side by side: between two marks both must agree to
the letter, and at a mark stands the content. Where that cannot work (a call of a tool has no content; a template that
rewrites earlier turns), the text is compared with that of the conversation's beginnings, as an inference server would
send them. A template that fits neither way is refused: no guess ever decides what is trained.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora.data.conversations import Conversation, is_empty
from qlora.data.templates import NEEDED_TOKENS, Template
from qlora.errors import ConfigError
from qlora.schema import TrainOn

Message = dict[str, Any]

# Characters for private use: no template acts on them.
MARK: Final = "\ue0a0{}\ue0a1"
QUESTION: Final = {"role": "user", "content": MARK.format(0)}
ANSWER: Final = {"role": "assistant", "content": MARK.format(1)}
NEXT: Final = {"role": "user", "content": MARK.format(2)}
MARKS: Final = re.compile("\ue0a0(\\d+)\ue0a1")

PART: Final = "\ufdd0"
"""Parts a token that a message spells, while a template writes it; Unicode gives it to no text."""


class Span(NamedTuple):
    """Characters [start, end) of a written conversation."""

    start: int
    end: int


class ChatTurn(NamedTuple):
    """A turn of the assistant: its characters, the end-of-turn mark included, and its own text."""

    span: Span
    reference: str


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as its template writes it."""

    text: str
    trained: list[Span]
    """What the loss counts, in order; never overlapping."""
    turns: list[ChatTurn]
    """The turns of the assistant."""
    raw: list[Span]
    """Where a message spells a token of the template's own: text there must not become that token."""
    ends: bool
    """Whether the last turn ends with an end-of-turn token, or others follow it; else the end token is added."""


@dataclass(frozen=True)
class ChatWriter:
    """Writes conversations with one template of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train_on: TrainOn = TrainOn.assistant

    def write(self, conversation: Conversation) -> Written:
        """Returns the text and its trained spans; raises `ConfigError` where the template cannot write it."""
        # Parted, a token that a message spells is none of the template's own to all that follows.
        messages, tools = self._part(conversation.messages), self._part(conversation.tools)
        text = self._apply(messages, tools)
        turns = self._turns(text, messages, tools)
        spans = [turn.span for turn in turns]
        if self.train_on is TrainOn.last:
            spans = spans[-1:]
        elif self.train_on is TrainOn.all:
            spans = [Span(0, len(text))]
        ends = bool(turns) and (turns[-1].span.end < len(text.rstrip()) or self._closes(text, turns[-1].span))
        return self._join(Written(text, spans, turns, [], ends))

    def ask(self, messages: Sequence[Message]) -> Written:
        """Returns the text that a server sends for the next answer; raises `ConfigError` as `write` does."""
        text = self._apply([self._part(message) for message in messages], prompt=True)
        return self._join(Written(text, [], [], [], True))

    def _apply(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                chat_template=self.template.text,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            roles = " ".join(str(message.get("role")) for message in messages[:12])
            raise ConfigError(
                f"data.template={self.template.name}: the template cannot write a conversation of the roles {roles}"
                f"{' ...' if len(messages) > 12 else ''} ({error}); choose another data.template"
            ) from None

    def _turns(self, text: str, messages: Sequence[Message], tools: Any) -> list[ChatTurn]:
        """Returns the turns of the assistant that a weight asks for, or that have none and say or call something."""
        found = self._by_marks(text, messages, tools) or {}
        said = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight", not is_empty(message))
        ]
        turns = []
        for index in said:
            by_marks = None if messages[index].get("tool_calls") else found.get(index)
            span = by_marks or self._by_beginnings(text, messages, index, tools)
            if span is not None:
                turns.append(ChatTurn(span, text[span.start : span.end].removesuffix(self._end).strip()))
            elif self.train_on is TrainOn.assistant or (self.train_on is TrainOn.last and index == said[-1]):
                raise ConfigError(
                    f"data.template={self.template.name}: the template writes turn {index + 1} otherwise when more "
                    "turns follow, so the tokens to train cannot be told; set data.train_on=last or data.train_on=all, "
                    "or choose another data.template"
                )
        return turns

    def _closes(self, text: str, span: Span) -> bool:
        """Tells whether a turn ends with a token that can end it."""
        found = self._special.findall(text, *span) if self._special else []
        return bool(found) and text.endswith(found[-1], *span)

    # By marks

    def _by_marks(self, text: str, messages: Sequence[Message], tools: Any) -> dict[int, Span] | None:
        """Returns the spans of the assistant's contents by message, or None where the two texts do not agree."""
        marked = [
            {**message, "content": MARK.format(index)} if message["content"].strip() else message
            for index, message in enumerate(messages)
        ]
        parts = MARKS.split(self._apply(marked, tools))
        spans: dict[int, Span] = {}
        position = 0
        literals, indices = parts[::2], [int(number) for number in parts[1::2]]
        for literal, following, index in zip(literals, literals[1:], indices, strict=False):
            position += len(literal)
            form = _written_form(text, position, messages[index]["content"], following)
            if not text.startswith(literal, position - len(literal)) or form is None:
                return None
            end = position + len(form)
            begun = position - self._written_before(literal)
            spans[index] = Span(begun, end + len(self._end) if text.startswith(self._end, end) else end)
            position = end
        return spans if text[position:] == literals[-1] else None

    def _written_before(self, literal: str) -> int:
        """Returns how many characters before an answer the model writes: after "[/INST]" the blank of " Yes"."""
        if self._header:
            found = literal.rfind(self._header)
            return len(literal) - found - len(self._header) if found >= 0 else 0
        before, _, prompt = self._sample
        lead = before.removeprefix(prompt)
        return len(lead) if before.startswith(prompt) and lead.isspace() and literal.endswith(lead) else 0

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends a turn of the assistant, for generation to stop at; None where there is none."""
        found = self._special.findall(self._end) if self._special else []
        return self.tokenizer.convert_tokens_to_ids(found[-1]) if found else None

    @cached_property
    def stop_text(self) -> str:
        """What opens the next question, for generation to stop at; "" where a token ends an answer before it."""
        parts = MARKS.split(self._apply([QUESTION, ANSWER, NEXT]))
        opening = parts[4] if parts[1::2] == ["0", "1", "2"] else ""
        return "" if self._special and self._special.search(opening) else opening.rstrip()

    @cached_property
    def _sample(self) -> tuple[str, str, str]:
        """What the template writes between a question and an answer, behind a last answer, and as a prompt."""
        parts = MARKS.split(self._apply([QUESTION, ANSWER]))
        prompt = self._apply([QUESTION], prompt=True).rpartition(QUESTION["content"])[2]
        if parts[1::2] != ["0", "1"]:
            raise ConfigError(
                f"data.template={self.template.name}: the template does not write what a question and an answer say "
                "once each, so the tokens to train cannot be told; choose another data.template"
            )
        return parts[2], parts[4], prompt

    @cached_property
    def _header(self) -> str:
        """What a prompt adds to a conversation; "" where a question's end is all."""
        prompt, closed = self._sample[2], self._apply([QUESTION]).rpartition(QUESTION["content"])[2]
        return prompt.removeprefix(closed) if prompt.startswith(closed) else ""

    @cached_property
    def _end(self) -> str:
        """What ends a turn of the assistant: up to the first special token behind it; "" where there is none."""
        behind = self._sample[1]
        found = self._special.search(behind) if self._special else None
        return behind[: found.end()] if found else ""

    # By beginnings

    def _by_beginnings(self, text: str, messages: Sequence[Message], index: int, tools: Any) -> Span | None:
        """Returns the span of a turn as what the conversation up to it adds to the prompt before it; None: unclear."""
        prompt = self._prompt(messages[:index], tools)
        whole = self._apply(messages[: index + 1], tools)
        turn = whole.removeprefix(prompt)
        end = turn.rfind(self._end) + len(self._end) if self._end and self._end in turn else len(turn.rstrip())
        span = Span(len(prompt), len(prompt) + end)
        return span if whole.startswith(prompt) and text[: span.end] == whole[: span.end] and end else None

    def _prompt(self, messages: Sequence[Message], tools: Any) -> str:
        """Returns what stands before an answer in a written conversation."""
        prompt = self._apply(messages, tools, prompt=True)
        before, _, asked = self._sample
        if asked.startswith(before):  # a prompt may open thoughts that a written turn lacks
            return prompt.removesuffix(asked.removeprefix(before))
        header = before.removeprefix(asked)
        # A template without prompts writes the header of an answer with the answer.
        return prompt + header if before.startswith(asked) and not (self._header or header.isspace()) else prompt

    # Text that spells a token

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Finds the tokens that no message may write: special ones, and those of turns where added without a flag."""
        added = self.tokenizer.added_tokens_decoder.values()
        behind, needed = self._sample[1], NEEDED_TOKENS.get(self.template.name, ())
        tokens = [
            token for token in map(str, (t for t in added if t.special or str(t) in needed or str(t) in behind))
            if token.strip()
        ]  # fmt: skip
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None

    def _part(self, value: Any) -> Any:
        """Parts every token that a message spells, however deep in it."""
        if self._special is None:
            return value
        if isinstance(value, str):
            return self._special.sub(lambda match: match[0][0] + PART + match[0][1:], value)
        if isinstance(value, dict):
            return {self._part(key): self._part(item) for key, item in value.items()}
        return [self._part(item) for item in value] if isinstance(value, list) else value

    def _join(self, written: Written) -> Written:
        """Joins what `_part` parted, and notes where that was."""
        places = [match.start() for match in re.finditer(PART, written.text)]
        if not places or self._special is None:
            return written
        text = written.text.replace(PART, "")
        found = [self._special.match(text, place - number - 1) for number, place in enumerate(places)]

        def joined(span: Span) -> Span:
            return Span(*(place - bisect_left(places, place) for place in span))

        return Written(
            text,
            [joined(span) for span in written.trained],
            [ChatTurn(joined(turn.span), turn.reference.replace(PART, "")) for turn in written.turns],
            [Span(*match.span()) for match in found if match],
            written.ends,
        )


def _written_form(text: str, position: int, content: str, following: str) -> str | None:
    """Returns how a template wrote a content before `following`: as it is, or without white space at its ends."""
    forms = dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip()))
    return next((form for form in forms if text.startswith(form + following, position)), None)
