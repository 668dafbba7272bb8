"""Writes conversations with a chat template, and finds which characters of the text the loss counts.

A template is a program; what it made of a message is found, not assumed. The conversation is written a second time
with a mark in place of every text, and the two are read side by side: between two marks both must agree to the letter.
A template that looks into its messages is compared with the conversation's beginnings instead, as an inference server
would send them. A turn that fits neither way is refused, and so is one whose answer or call the text lacks: no guess
ever decides what is trained, and nothing is left out without a word.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora.config.registries.chat_templates import TEMPLATES
from qlora.config.schema import TrainOn
from qlora.data.chat.conversations import Conversation, Message
from qlora.data.chat.message_form import (
    ANSWER,
    MARK,
    MARKS,
    NEXT,
    QUESTION,
    MessageForm,
    Piece,
    find_form,
    map_texts,
    map_values,
    other_value,
)
from qlora.data.chat.templates import Template, suggest_template
from qlora.data.chat.turn_layout import Fitted, Layout, Span, Text, TurnBounds, find_span, holds, lay_out
from qlora.errors import OF_CODE, ConfigError, UserError
from qlora.upstream.transformers import render_chat, token_id

PART: Final = "\ufdd0"
"""Parts a token that a message spells, while a template writes it; Unicode gives it to no text."""
CANNOT_WRITE: Final = (TemplateError, *OF_CODE)
"""What a template raises for messages that it has no form for, or whatever it computes."""
PROBE: Final = 918_273_645_000
"""The first of the numbers that stand for the values in calls."""
LAYOUTS: Final = 256
"""So many structures of conversations are remembered."""


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
    asked: Written | None = None
    """What a server sends for the last turn, where it is not the text before that turn."""
    lost_thoughts: int = 0
    """Trained turns whose thought the text lacks."""
    lost_messages: int = 0
    """Messages of others than the assistant that the text lacks."""


class Turns(NamedTuple):
    """The turns of the assistant that are trained."""

    turns: list[ChatTurn]
    prompt: str | None
    """What a server sends for the last one; None: the text before it."""
    lost_thoughts: int
    lost_messages: int


@dataclass(frozen=True)
class ChatWriter:
    """Writes conversations with one template of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train_on: TrainOn = TrainOn.assistant

    def write(self, conversation: Conversation) -> Written:
        """Returns the text and its trained spans.

        Raises `ConfigError` where the template cannot write the conversation, or leaves out an answer or a call.
        """
        # Parted, a token that a message spells is none of the template's own to all that follows.
        prepared = self.form.prepare(conversation.messages)
        marked, texts = self._mark(prepared)
        messages = self._fill(prepared, texts)
        tools = map_texts(conversation.tools, self._part)
        text = self._apply(tools, messages)
        turns, prompt, lost_thoughts, lost_messages = self._turns(text, messages, marked, texts, tools)
        trained = [turn.span for turn in turns]
        if self.train_on is TrainOn.last:
            trained = trained[-1:]
        elif self.train_on is TrainOn.all:
            trained = [Span(0, len(text))]
        ends = bool(turns) and (
            turns[-1].span.end < len(text.rstrip()) or self._bounds.closes(text[: turns[-1].span.end])
        )
        asked = None if prompt is None else self._join(Written(prompt, [], [], [], True))
        return self._join(Written(text, trained, turns, [], ends, asked, lost_thoughts, lost_messages))

    def ask(self, messages: Sequence[Message], tools: Any = None) -> Written:
        """Returns the text that a server sends for the next answer; raises `ConfigError` as `write` does."""
        prepared = self.form.prepare(messages)
        text = self._apply(map_texts(tools, self._part), self._fill(prepared, self._mark(prepared)[1]), prompt=True)
        return self._join(Written(text, [], [], [], True))

    def _apply(self, tools: Any, messages: Sequence[Message], prompt: bool = False) -> str:
        try:
            return self._render(messages, tools, prompt)
        except CANNOT_WRITE as error:
            roles = " ".join(str(message.get("role")) for message in messages[:12])
            raise ConfigError(
                f"data.template={self.template.name}: the template cannot write a conversation of the roles {roles}"
                f"{' ...' if len(messages) > 12 else ''} ({error}); choose another data.template, such as "
                f"{suggest_template(self.tokenizer)}"
            ) from None

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool) -> str:
        return render_chat(
            self.tokenizer,
            list(messages),
            tools=tools or None,
            chat_template=self.template.text,
            add_generation_prompt=prompt,
        )

    # The form of messages

    @cached_property
    def form(self) -> MessageForm:
        """The form in which the template takes a message."""

        def write(messages: list[Message], tools: Any) -> str | None:
            try:
                return self._render(messages, tools, False)
            except CANNOT_WRITE:
                return None

        return find_form(write)

    def _mark(self, messages: Sequence[Message]) -> tuple[list[Message], list[Text]]:
        """Returns the messages with a mark in place of every text, and the texts."""
        texts: list[Text] = []

        def shape(index: int, message: Message) -> Message:
            def leaf(piece: Piece, text: str) -> str:
                if piece is Piece.label:
                    return self._part(text)
                texts.append(Text(index, piece, self._part(text)))
                return MARK.format(len(texts) - 1)

            return self.form.shape(message, leaf)

        return [shape(index, message) for index, message in enumerate(messages)], texts

    def _fill(self, messages: Sequence[Message], texts: Sequence[Text]) -> list[Message]:
        """Returns the messages in the template's form, with the texts that `_mark` returned."""
        rest = iter(texts)

        def leaf(piece: Piece, text: str) -> str:
            return self._part(text) if piece is Piece.label else next(rest).text

        return [self.form.shape(message, leaf) for message in messages]

    # Turns

    def _turns(self, text: str, messages: list[Message], marked: list[Message], texts: list[Text], tools: Any) -> Turns:
        """Returns the turns that are trained; raises `ConfigError` where the text lacks an answer or a call."""
        local = [content for content in texts if messages[content.message]["role"] == "assistant"]
        said = {content.message for content in local}
        answered = {content.message for content in local if content.piece is not Piece.thought}
        # A weight of 1 asks for a turn that says nothing, too.
        turns = [
            i for i, turn in enumerate(messages) if turn["role"] == "assistant" and (i in said or turn.get("weight"))
        ]
        trained = [index for index in turns if messages[index].get("weight", 1)]
        if not turns:
            return Turns([], None, 0, 0)
        layout = self._layout(messages, marked, texts, turns, tools)
        asked = trained[-1] if trained else turns[-1]
        prompt = self._apply(tools, messages[:asked], prompt=True)
        fitted = layout.fit(text, texts, self._special)
        if fitted is None or not self._follows(text, fitted, layout, asked, prompt):
            fitted = self._by_beginnings(text, messages, local, layout, tools)
        for index in turns:
            self._refuse_lost(fitted.lost[index], messages, index)
        # A turn that only thinks says nothing where its thought is lost.
        lost = {index for index in trained if Piece.thought in fitted.lost[index]}
        trained = [index for index in trained if index in answered or index not in lost]
        spans = {index: span for index in trained if (span := fitted.spans[index])}
        needed = {TrainOn.assistant: trained, TrainOn.last: trained[-1:], TrainOn.all: []}[self.train_on]
        self._refuse_unclear([index for index in needed if index not in spans], needed)
        counted = lost & {max(lost | spans.keys())} if self.train_on is TrainOn.last and lost else lost
        if spans and max(spans) != asked:
            prompt = self._apply(tools, messages[: max(spans)], prompt=True)
        is_text = not spans or self._is_prompt(text, spans[max(spans)].start, prompt)
        written = [ChatTurn(span, self._reference(text, span)) for span in spans.values()]
        return Turns(written, None if is_text else prompt, len(counted), layout.lost_messages)

    def _layout(
        self, messages: list[Message], marked: list[Message], texts: list[Text], turns: list[int], tools: Any
    ) -> Layout:
        key = json.dumps([marked, tools], ensure_ascii=False, default=repr)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = lay_out(marked, texts, turns, partial(self._apply, tools), self._bounds)
            for turn in self._turns_that_lose_values(messages, marked, turns, tools):
                layout.lost[turn].add(Piece.call)
        return layout

    def _turns_that_lose_values(
        self, messages: list[Message], marked: list[Message], turns: list[int], tools: Any
    ) -> set[int]:
        """Returns the turns whose text leaves out a number, a boolean or a null among the arguments of their calls.

        First each of these stands for a number that comes nowhere else; one that is then not found may be written in
        another way, so the text must change with it.
        """
        owners: list[int] = []

        def written(change: Callable[[int, Any], Any]) -> str | None:
            """Returns the text with other values; None: there are none, or the template does not take these."""
            owners.clear()

            def numbered(turn: int, value: Any) -> Any:
                owners.append(turn)
                return change(len(owners) - 1, value)

            changed = [map_values(message, partial(numbered, index)) if index in turns else message
                       for index, message in enumerate(messages)]  # fmt: skip
            with suppress(UserError):
                return self._apply(tools, self._mark(changed)[0]) if owners else None
            return None

        text = written(lambda index, value: PROBE + index) or ""
        doubted = [index for index in range(len(owners)) if str(PROBE + index) not in text]
        whole = self._apply(tools, marked) if doubted else None
        return {owners[doubt] for doubt in doubted if written(partial(_change_one, doubt)) == whole}

    @cached_property
    def _layouts(self) -> dict[str, Layout]:
        return {}

    def _follows(self, text: str, fitted: Fitted, layout: Layout, index: int, prompt: str) -> bool:
        """Tells whether a turn follows its prompt as in the layout; a template may read what messages say."""
        span = fitted.spans[index]
        return span is None or index not in layout.exact or self._is_prompt(text, span.start, prompt)

    def _is_prompt(self, text: str, end: int, prompt: str) -> bool:
        return text[:end] in (prompt, prompt + self._bounds.header)

    def _by_beginnings(
        self, text: str, messages: list[Message], texts: list[Text], layout: Layout, tools: Any
    ) -> Fitted:
        """Returns the turns by the conversation's beginnings, where a copy of marks is written otherwise."""
        apply = partial(self._apply, tools)
        spans = {index: find_span(text, messages, index, apply, self._bounds) for index in layout.spans}
        lost = {index: kinds - {Piece.thought} for index, kinds in layout.lost.items()}
        for content in texts:
            span = spans[content.message]
            if span is not None and not holds(text[span.start : span.end], content.text):
                lost[content.message].add(content.piece)
        return Fitted(spans, lost)

    def _refuse_lost(self, lost: set[Piece], messages: list[Message], index: int) -> None:
        """Raises `ConfigError` where the text lacks an answer or a call; a lost thought is counted."""
        if not lost - {Piece.thought}:
            return
        calls = messages[index].get("tool_calls") or []
        names = " and ".join(dict.fromkeys(self._plain(call["function"]["name"]) for call in calls))
        what = f"a call ({names})" if Piece.call in lost else "what the assistant says" + " beside a call" * bool(calls)
        raise ConfigError(
            f"data.template={self.template.name}: turn {index + 1} of {len(messages)} holds {what}, which the template "
            f"does not write, so it would not be trained; data.template={suggest_template(self.tokenizer)} writes it"
        )

    def _refuse_unclear(self, unclear: list[int], needed: list[int]) -> None:
        if unclear:
            last = "data.train_on=last or " if unclear[-1] != needed[-1] else ""
            raise ConfigError(
                f"data.template={self.template.name}: the template writes turn {unclear[0] + 1} otherwise when more "
                f"turns follow, so the tokens to train cannot be told; set {last}data.train_on=all, or choose another "
                "data.template"
            )

    def _reference(self, text: str, span: Span) -> str:
        """Returns what a turn says without the template's tokens, as generated answers are decoded."""
        turn = text[span.start : span.end]
        return (self._special.sub("", turn) if self._special else turn).strip()

    # What a question and an answer show of the template

    @cached_property
    def _sample(self) -> tuple[str, str, str]:
        """What the template writes between a question and an answer, behind a last answer, and as a prompt."""
        asked, answered = map(self.form.plain, (QUESTION, ANSWER))
        parts = MARKS.split(self._apply(None, [asked, answered]))
        prompt = self._apply(None, [asked], prompt=True).rpartition(QUESTION["content"])[2]
        if parts[1::2] != ["0", "1"]:
            raise ConfigError(
                f"data.template={self.template.name}: the template does not write what a question and an answer say "
                "once each, so the tokens to train cannot be told; choose another data.template"
            )
        return parts[2], parts[4], prompt

    @cached_property
    def _followed(self) -> str:
        """What the template writes between an answer and the next question; "" where it cannot."""
        parts = MARKS.split(self._apply(None, list(map(self.form.plain, (QUESTION, ANSWER, NEXT)))))
        return parts[4] if parts[1::2] == ["0", "1", "2"] else ""

    @cached_property
    def _bounds(self) -> TurnBounds:
        between, behind, prompt = self._sample
        closed = self._apply(None, [self.form.plain(QUESTION)]).rpartition(QUESTION["content"])[2]
        lead = between.removeprefix(prompt) if prompt == closed and between.startswith(prompt) else None
        bounds = TurnBounds(self._special, between if lead is not None or between == prompt else "", behind, lead)
        shared = bounds.agreed_length(self._followed, behind)
        last_only = behind[shared:] if bounds.closes(behind[:shared].rstrip()) else ""
        return replace(bounds, last_only=last_only)

    @cached_property
    def _end(self) -> str:
        """What ends a turn of the assistant, up to its end token; "" where there is none."""
        behind, bounds = self._sample[1], self._bounds
        for text in (behind, self._followed):
            end = text[: bounds.end(text, behind, hands_over=text is not behind) or 0]
            if bounds.closes(end):
                return end
        return ""

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends a turn of the assistant, for generation to stop at; None where there is none."""
        tokens = self._special.findall(self._end) if self._special else []
        return token_id(self.tokenizer, tokens[-1]) if tokens else None

    @cached_property
    def stop_text(self) -> str:
        """What opens the next question, for generation to stop at; "" where a token ends an answer before it."""
        return "" if self._special and self._special.search(self._followed) else self._followed.rstrip()

    # Text that spells a token

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Finds the tokens that no message may write: special ones, and those of turns where added without a flag."""
        added = self.tokenizer.added_tokens_decoder.values()
        behind, needed = self._sample[1], TEMPLATES.get(self.template.name, ())
        tokens = [
            token for token in map(str, (t for t in added if t.special or str(t) in needed or str(t) in behind))
            if token.strip()
        ]  # fmt: skip
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None

    def _part(self, text: str) -> str:
        """Parts every token that a text spells."""
        return self._special.sub(lambda match: match[0][0] + PART + match[0][1:], text) if self._special else text

    def _plain(self, text: str) -> str:
        return text.replace(PART, "")

    def _join(self, written: Written) -> Written:
        """Joins what `_part` parted, and notes where that was."""
        positions = [match.start() for match in re.finditer(PART, written.text)]
        if not positions or self._special is None:
            return written
        text = self._plain(written.text)
        spelled = [self._special.match(text, position - index - 1) for index, position in enumerate(positions)]

        def joined(span: Span) -> Span:
            return Span(*(position - bisect_left(positions, position) for position in span))

        return replace(
            written,
            text=text,
            trained=[joined(span) for span in written.trained],
            turns=[ChatTurn(joined(turn.span), self._plain(turn.reference)) for turn in written.turns],
            raw=[Span(*match.span()) for match in spelled if match],
        )


def _change_one(changed: int, index: int, value: Any) -> Any:
    return other_value(value) if index == changed else value
