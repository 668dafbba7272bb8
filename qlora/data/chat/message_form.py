"""The form in which a chat template takes a message.

Templates differ in the key that they read thoughts from, in whether the arguments of a call are an object or its JSON,
and in whether a content is a text or a list of parts. What a template takes is learnt from what it writes: a sample is
written in each form, and the form is taken whose text holds all that the sample says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, NamedTuple

from qlora.config.registries.chat_keys import THOUGHT_KEYS
from qlora.data.chat.conversations import THOUGHTS, Message

MARK: Final = "\ue0a0{}\ue0a1"
"""Characters for private use: no template acts on them."""
MARKS: Final = re.compile("\ue0a0(\\d+)\ue0a1")
QUESTION: Final[Message] = {"role": "user", "content": MARK.format(0)}
ANSWER: Final[Message] = {"role": "assistant", "content": MARK.format(1)}
NEXT: Final[Message] = {"role": "user", "content": MARK.format(2)}
SHORT_ID: Final = "qloracall"
LONG_ID: Final = "call_of_qlora"
SHORT: Final = re.compile(r"[0-9A-Za-z]{9}")
"""An id of a call as Mistral's templates demand it."""

INLINE: Final = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)", re.DOTALL)
CLOSED: Final = re.compile(r"()((?:(?!<think>).)*?)(\s*</think>\s*)(?!.*</think>)", re.DOTALL)
"""Thoughts that a prompt had opened: they lack the first tag."""


class Piece(Enum):
    """What a text of a message is."""

    answer = "answer"
    thought = "thought"
    call = "call"
    label = "label"
    """A role, a name or an id: no one answers with it."""


Leaf = Callable[[Piece, str], str]
"""Turns a text of a message into what the template is given."""
Write = Callable[[list[Message], list[dict[str, Any]] | None], str | None]
"""Writes a sample; None: the template cannot."""


class Speech(NamedTuple):
    """What a message says: its thought, and its content without it."""

    thought: str
    content: str
    tags: tuple[str, str] | None = None
    """What stood around the thought in the content; None: the thought came under a key, or there is none."""


@dataclass(frozen=True, slots=True)
class MessageForm:
    """The form in which a template takes a message."""

    thoughts: str | None = None
    """The key that it reads thoughts from; None: it reads none, and thoughts in a content are part of the content."""
    arguments_as_text: bool = False
    """Whether it takes the arguments of a call as JSON, not as an object."""
    content_as_parts: bool = False
    """Whether it takes a content as a list of parts."""
    short_ids: bool = False
    """Whether it takes an id of a call only if that has nine letters and digits."""

    def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Returns messages with the ids that the template demands: calls and their results keep belonging together."""
        if not self.short_ids:
            return messages
        prepared, open_ids = [], []
        for index, message in enumerate(messages):
            if calls := message.get("tool_calls"):
                ids = [_short_id(call.get("id") or f"{index} {number}") for number, call in enumerate(calls)]
                calls = [{**call, "id": short} for call, short in zip(calls, ids, strict=True)]
                message, open_ids = {**message, "tool_calls": calls}, list(ids)
            elif message["role"] == "tool":
                # A result without an id answers the first call that has none yet.
                label = message.get("tool_call_id")
                short = _short_id(label) if label else open_ids[0] if open_ids else _short_id(str(index))
                open_ids = [other for other in open_ids if other != short]
                message = {**message, "tool_call_id": short}
            prepared.append(message)
        return prepared

    def shape(self, message: Message, leaf: Leaf) -> Message:
        """Returns a message in this form, each of its texts replaced by what `leaf` makes of it."""
        other = {key: value for key, value in message.items() if key not in ("content", "tool_calls", THOUGHTS)}
        if len(other) > 1:  # the role alone is no text
            other = _map_labels(other, leaf)
        speech = read_speech(message)
        thought = leaf(Piece.thought, speech.thought) if speech.thought.strip() else speech.thought
        content: Any = leaf(Piece.answer, speech.content) if speech.content.strip() else speech.content
        if speech.tags is not None and self.thoughts is None:
            content = speech.tags[0] + thought + speech.tags[1] + content
        elif thought.strip():
            other[self.thoughts or THOUGHTS] = thought
        if calls := message.get("tool_calls"):
            other["tool_calls"] = [self._shape_call(call, leaf) for call in calls]
        if self.content_as_parts:
            content = [{"type": "text", "text": content}]
        return {**other, "content": content}

    def plain(self, message: Message) -> Message:
        """Returns a message in this form, its texts as they are."""
        return self.shape(message, lambda piece, text: text)

    def _shape_call(self, call: dict[str, Any], leaf: Leaf) -> dict[str, Any]:
        function = call["function"]
        name = leaf(Piece.call, function["name"])
        arguments = _map_values(function["arguments"], leaf)
        if self.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        labels = _map_labels({key: value for key, value in call.items() if key != "function"}, leaf)
        return {**labels, "function": {"name": name, "arguments": arguments}}


def _short_id(label: str) -> str:
    return label if SHORT.fullmatch(label) else hashlib.sha256(label.encode()).hexdigest()[:9]


def read_speech(message: Message) -> Speech:
    """Returns what a message says; a thought in the tags that open a content is the same as one under a key."""
    content, thought = message["content"], message.get(THOUGHTS) or ""
    if message["role"] != "assistant" or "</think>" not in content:
        return Speech(thought, content)
    inline = INLINE.match(content) or CLOSED.match(content)
    if inline is None or (thought.strip() and thought.strip() != inline[2].strip()):
        return Speech(thought, content)
    rest = content[inline.end() :]
    return Speech(thought, rest) if thought.strip() else Speech(inline[2], rest, (inline[1], inline[3]))


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a value in which every text, keys included and however deep, is changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    return [map_texts(item, change) for item in value] if isinstance(value, list) else value


def _map_labels(values: Message, leaf: Leaf) -> Message:
    return {key: map_texts(value, lambda text: leaf(Piece.label, text)) for key, value in values.items()}


def _map_values(value: Any, leaf: Leaf) -> Any:
    """Returns the arguments of a call with each text that is a value replaced; keys stay labels."""
    if isinstance(value, str):
        return leaf(Piece.call, value) if value.strip() else value
    if isinstance(value, dict):
        return {leaf(Piece.label, key): _map_values(item, leaf) for key, item in value.items()}
    return [_map_values(item, leaf) for item in value] if isinstance(value, list) else value


def map_values(message: Message, change: Callable[[Any], Any]) -> Message:
    """Returns a message in which every number, boolean and null among the arguments of its calls is changed."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value if isinstance(value, str) else change(value)

    if not (calls := message.get("tool_calls")):
        return message
    functions = ({**call["function"], "arguments": walk(call["function"]["arguments"])} for call in calls)
    return {**message, "tool_calls": [{**call, "function": told} for call, told in zip(calls, functions, strict=True)]}


def other_value(value: Any) -> Any:
    """Returns another number, boolean or null than `value`, of the same type where there is one."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 2 * value + 1 if isinstance(value, float) else True


def find_form(write: Write) -> MessageForm:
    """Returns the form that a template takes, by what it writes of samples; what it never writes has the plain form."""
    form = MessageForm()
    if not _holds(write, form, [QUESTION, ANSWER], 2):
        parts = replace(form, content_as_parts=True)
        form = parts if _holds(write, parts, [QUESTION, ANSWER], 2) else form
    thinking = {**ANSWER, THOUGHTS: MARK.format(2)}
    keys = (replace(form, thoughts=key) for key in THOUGHT_KEYS)
    form = next((keyed for keyed in keys if _holds(write, keyed, [QUESTION, thinking], 3)), form)
    with_text = replace(form, arguments_as_text=True)
    forms = (replace(other, short_ids=short) for short in (False, True) for other in (form, with_text))
    return next((calling for calling in forms if _writes_call(write, calling)), form)


def _writes_call(write: Write, form: MessageForm) -> bool:
    arguments = {"text": MARK.format(2)}
    label = SHORT_ID if form.short_ids else LONG_ID
    call = {"type": "function", "id": label, "function": {"name": MARK.format(1), "arguments": arguments}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    # A template that joins texts writes an object as Python would.
    return _holds(write, form, [QUESTION, calling], 3, without=str(arguments))


def _holds(write: Write, form: MessageForm, messages: list[Message], marks: int, *, without: str = "") -> bool:
    """Tells whether the text of messages in a form holds the first `marks` marks."""
    text = write([form.plain(message) for message in messages], None)
    if text is None or (without and without in text):
        return False
    return {str(index) for index in range(marks)} <= set(MARKS.findall(text))
