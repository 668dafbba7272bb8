"""Chats in every published layout become the messages that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora.config.registries.chat_keys import CALL_ROLES, ROLES, THOUGHT_KEYS
from qlora.data.formats.cells import Row, is_missing, number_text, peek, read_switch, track
from qlora.data.formats.labels import is_rejected
from qlora.data.ingest.json_text import DoubledKey, parse
from qlora.errors import DataError
from qlora.text import brief, listed

Message = dict[str, Any]

ARGUMENTS = ("arguments", "parameters", "input")
"""What data sets call the arguments of a call: OpenAI, Llama 3, Anthropic."""
TEXT_PARTS = ("text", "input_text", "output_text")
TEXT_KEYS = ("text", "value", "content")
"""The keys of a part of a content that hold its text."""
THOUGHT_PARTS = ("thinking", "reasoning")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what a text model cannot see or hear."""
KEPT = ("name", "tool_call_id")
"""Keys of a turn that are passed on unchanged, for templates to read."""
THOUGHTS = THOUGHT_KEYS[0]
"""The key of a message that holds them here."""
PRINTED = re.compile(r"\s*\[\s*\{\s*'")
"""How Python prints a list of objects."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat as `apply_chat_template` takes it."""

    messages: list[Message]
    """Each with role (system, user, assistant, tool) and content (text), maybe with tool_calls and those of `KEPT`;
    `weight` (1 or 0) where a turn says whether the loss counts it."""
    tools: list[dict[str, Any]] | None
    """The functions that the assistant may call, as OpenAI's JSON schemas; None: none."""


def messages(row: Row) -> list[Conversation]:
    """Renders OpenAI's layout: messages of role and content, maybe with tools; none where `label` is false (KTO)."""
    return _render(row, "messages")


def conversations(row: Row) -> list[Conversation]:
    """Renders ShareGPT's layout: conversations of from and value, maybe with the columns system and tools."""
    return _render(row, "conversations")


def _render(row: Row, column: str) -> list[Conversation]:
    if is_rejected(row):
        return []
    return build_conversation(row, normalise(read_turns(row, column), column, row), f"column {column}")


def build_conversation(row: Row, turns: list[Message], where: str) -> list[Conversation]:
    """Adds the columns `system` (unless the turns begin with one) and `tools`; nothing said gives no conversation."""
    _refuse_media(row)
    if all(turn["role"] == "system" for turn in turns):
        return []
    first = next(index for index, turn in enumerate(turns) if turn["role"] != "system")
    if turns[first]["role"] == "assistant":
        raise DataError(
            f"{where}, turn {first + 1} of {len(turns)}: the assistant speaks before any user turn; take such turns "
            "out, or map the rows with a function of your own (data.format=module:function)"
        )
    if turns[0]["role"] != "system" and (system := row.get("system")):
        if not isinstance(system, str):
            raise DataError(f"column system must hold text, but a row holds {brief(system)}")
        turns = [{"role": "system", "content": system}, *turns]
    return [Conversation(turns, read_tools(row))]


def _refuse_media(row: Row) -> None:
    """Raises `DataError` where a row holds pictures, sound or films beside its turns."""
    for column in MEDIA_COLUMNS:
        cell = decode(row.get(column))
        if _holds_media(cell):
            raise DataError(
                f"column {column} holds {brief(cell)}; qlora trains text only, so leave such rows out, or take the "
                "column out if the turns say all without it"
            )


def _holds_media(cell: Any) -> bool:
    if isinstance(cell, Mapping):
        return any(map(_holds_media, cell.values()))
    return any(map(_holds_media, cell)) if isinstance(cell, list) else isinstance(cell, (str, bytes)) and bool(cell)


def read_turns(row: Row, column: str) -> list[Any]:
    """Returns the list in a cell, which may be JSON; an absent or empty one is []."""
    cell = decode(row.get(column))
    if cell is None or cell == "":
        return []
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        written = "; write lists as JSON (json.dumps), not as Python prints them" if PRINTED.match(str(cell)) else ""
        raise DataError(
            f"data.format={column} needs a list of turns in that column, but a row holds {brief(cell)}{written}"
        )
    return list(cell)


def decode(cell: Any) -> Any:
    """Returns what a cell holds: text that spells a JSON list or object is read, all else stays as it is.

    Raises `DataError` for turns of a chat with a key that stands twice.
    """
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return parse(cell)
    except DoubledKey as error:
        value = json.loads(cell)
        if is_turn(value) or (isinstance(value, list) and any(map(is_turn, value))):
            raise DataError(f"in the turns {brief(cell)}, {error}") from None
        return cell
    except (ValueError, RecursionError):
        return cell


def is_turn(value: object) -> bool:
    """Tells whether a value looks like one turn of a chat."""
    return isinstance(value, Mapping) and any(isinstance(value.get(key), str) for key in ("role", "from"))


def is_empty(message: Message) -> bool:
    """Tells whether a turn says, calls and thinks nothing."""
    return not (message["content"].strip() or message.get("tool_calls") or message.get(THOUGHTS))


def normalise(turns: Sequence[Any], column: str, row: Row) -> list[Message]:
    """Turns {role, content} or {from, value} of any naming, from a column of a row, into messages of a template."""
    return [
        _message(track(row, turn, column), f"column {column}, turn {number} of {len(turns)}")
        for number, turn in enumerate(turns, start=1)
    ]


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {brief(turn)}; each must be an object with role and content, or from and value")
    spoken = _first(turn, "role", "from")
    if spoken is None:
        raise DataError(f"{where} has the keys {listed(turn)}; it needs role and content, or from and value")
    name = str(spoken).strip().lower()
    if name not in ROLES:
        raise DataError(f"{where} has the unknown role {brief(spoken)}; known are {', '.join(ROLES)}")
    message: Message = {"role": ROLES[name]}
    key = "value" if turn.get("content") is None else "content"
    value = turn.get(key) if name in CALL_ROLES else _parts(turn, key, message["role"])
    if name in CALL_ROLES:
        message |= {"content": "", "tool_calls": _calls(turn, key, where)}
    else:
        message["content"] = _content(value, message["role"], where)
    # No template writes the thoughts of others: their keys stay unread, and are named.
    if message["role"] == "assistant" and (thought := _thought(turn, value, where)):
        message[THOUGHTS] = thought
    calls = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    if calls:
        message["tool_calls"] = _calls(turn, calls, where)
    elif value is None and not any(key in turn for key in ("content", "value", "tool_calls")):
        raise DataError(f"{where} has the keys {listed(turn)}; it needs role and content, or from and value")
    message |= {key: turn[key] for key in KEPT if turn.get(key) is not None}
    switch = read_switch(turn, where)
    return message if switch is None else message | {"weight": int(switch)}


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _parts(turn: Row, key: str, role: str) -> Any:
    """Returns what a turn says; where that is an object or a list of parts, they are tracked in a list."""
    value = turn.get(key)
    if isinstance(value, Mapping) and (value.get("type") in TEXT_PARTS or (role != "tool" and _text_key(value))):
        return _as_list(turn, key)
    return _as_list(turn, key) if isinstance(value, list) and (role != "tool" or _is_parts(value)) else value


def _as_list(holder: Row, key: str) -> list[Any]:
    """Returns what a key holds as a list, its objects tracked."""
    value = holder[key]
    return [track(holder, part, key) for part in (value if isinstance(value, list) else [value])]


def _content(value: Any, role: str, where: str) -> str:
    """Returns what is said as text; parts are joined, a tool's objects are written as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if role == "tool" and not _is_parts(value):
        return json.dumps(value, ensure_ascii=False)
    if (number := number_text(value)) is not None:
        return number
    if not isinstance(value, Sequence):
        raise DataError(f"{where} says {brief(value)}; content must be text, or a list of parts of text")
    return "".join(_part(part, where) for part in value if not _is_thought(part))


def _thought(turn: Row, content: Any, where: str) -> str:
    """Returns the thoughts of a turn: under any of their keys, or as parts of its content; "" if there are none."""
    # A number, true, or an object without text under such a key is a setting: nothing reads it.
    spoken = {
        key: _thought_text(_as_list(turn, key), where)
        for key in THOUGHT_KEYS
        if isinstance(value := peek(turn, key), (str, list))
        or (isinstance(value, Mapping) and _text_key(value, *THOUGHT_KEYS))
    }
    if isinstance(content, list):
        spoken["content"] = _thought_text([part for part in content if _is_thought(part)], where)
    thoughts = {key: text for key, text in spoken.items() if text.strip()}
    if len({text.strip() for text in thoughts.values()}) > 1:
        raise DataError(
            f"{where} holds different thoughts under {' and '.join(thoughts)}; keep one of them, for a turn thinks once"
        )
    return next(iter(thoughts.values()), "")


def _thought_text(value: Any, where: str) -> str:
    if isinstance(value, list):
        return "".join(_thought_text(part, where) for part in value)
    if not isinstance(value, Mapping):
        return _content(value, "assistant", where)
    key = _text_key(value, *THOUGHT_KEYS)
    if key is None:
        raise DataError(f"{where} holds a part {brief(value)} without a text of thoughts; leave such parts out")
    value.get("type")  # whatever it is, the text is a thought here
    return _thought_text(_as_list(value, key), where)


def _text_key(part: Row, *preferred: str) -> str | None:
    """Returns the key of a part that holds its text, `preferred` first; None: there is none."""
    return next((key for key in (*preferred, *TEXT_KEYS) if peek(part, key) is not None), None)


def _is_thought(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in THOUGHT_PARTS


def _is_parts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(p, Mapping) and "type" in p for p in value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = _text_key(part) if isinstance(part, Mapping) else None
    text = None if key is None else part[key]
    if kind not in (None, *TEXT_PARTS) or not isinstance(text, str):
        label = f"of type {kind}" if kind is not None and kind not in TEXT_PARTS else brief(part)
        raise DataError(f"{where} holds a part {label}; qlora trains text only, so leave such rows out")
    return text


def _calls(turn: Row, key: str, where: str) -> list[dict[str, Any]]:
    """Returns the calls of functions under a key of a turn in OpenAI's shape; their broken JSON stays text."""
    calls = decode(turn.get(key))
    return [_call(track(turn, call, key), where) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    bare = track(call, function, "function") if isinstance(function, Mapping) else call
    if not isinstance(bare, Mapping) or not isinstance(bare.get("name"), str):
        raise DataError(f"{where} calls {brief(call)}; a call of a function is JSON with name and arguments")
    arguments = _arguments(call, bare, where)
    call.get("type")  # "function" or the like says nothing more
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise DataError(
            f"{where} calls {bare['name']} with arguments that JSON cannot write ({error}); write them as text"
        ) from None
    known = {"id": str(call["id"])} if call.get("id") is not None else {}
    return {"type": "function", **known, "function": {"name": bare["name"], "arguments": arguments}}


def _arguments(call: Row, bare: Row, where: str) -> Any:
    """Returns the arguments under any of their keys, of a call or of the function in it; {}: there are none."""
    holders = {"": bare} if bare is call else {"function.": bare, "": call}
    given: dict[str, Any] = {}
    for name, key in ((name, key) for name in holders for key in ARGUMENTS):
        value = holders[name].get(key)
        read = decode(value)
        given |= {} if is_missing(value) else {name + key: read if isinstance(read, dict) else value}
    first: Any = next(iter(given.values()), {})
    if any(value != first for value in given.values()):
        raise DataError(
            f"{where} calls {bare['name']} with different arguments under {' and '.join(given)}; keep one of them"
        )
    return first


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """Returns the column `tools` (or the older `functions`), a list or its JSON, in OpenAI's shape."""
    column = "tools" if row.get("tools") else "functions"
    cell = row.get(column)
    tools = decode(cell)
    if not tools or tools == "null":
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"column {column} must hold a list of JSON schemas, or its JSON, but a row holds {brief(cell)}")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def split_marked(text: str, mark: re.Pattern[str]) -> list[Message]:
    """Splits a text at marks whose first group names the speaker; what stands before them is the system's.

    A last turn of the user that says nothing, which some sets leave open for a question, is left out.
    """
    start, *rest = mark.split(text)
    turns: list[Message] = [{"role": "system", "content": start.strip()}] if start.strip() else []
    for name, said in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": ROLES[name.lower()], "content": said.strip()})
    is_open = bool(turns) and turns[-1]["role"] == "user" and not turns[-1]["content"]
    return turns[:-1] if is_open else turns


def split_inst(text: str) -> list[Message] | None:
    """Splits Llama 2's "<s>[INST] <<SYS>>...<</SYS>> question [/INST] answer </s>..."; None: it is no such text."""
    start, *rounds = text.split("[INST]")
    if start.replace("<s>", "").strip() or not rounds or not all("[/INST]" in piece for piece in rounds):
        return None
    turns: list[Message] = []
    for piece in rounds:
        asked, answer = piece.split("[/INST]", 1)
        system, closing, rest = asked.partition("<</SYS>>")
        if closing:
            turns.append({"role": "system", "content": system.replace("<<SYS>>", "", 1).strip()})
        turns.append({"role": "user", "content": (rest if closing else asked).strip()})
        said = answer.strip().removesuffix("<s>").strip().removesuffix("</s>")
        turns.append({"role": "assistant", "content": said.strip()})
    return turns
