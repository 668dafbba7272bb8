"""What a request for an answer asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qlora.serving.fields import Fields, is_text, is_whole
from qlora.serving.refusal import Refusal
from qlora.text import brief

MOST_LIKELY: Final = 100
"""How many of the likeliest tokens may be asked for."""
MOST_STOPS: Final = 16
ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MESSAGE_KEYS: Final = ("role", "content", "name")

Message = dict[str, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None: as `generation` says."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request for an answer."""

    model: str
    messages: list[Message] | None
    """A conversation; None: `prompt` is continued."""
    prompt: str | list[int] | None
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    likeliest: int | None
    """How many likely tokens are told beside each one of the answer; None: no log-probability is asked for."""
    streams: bool
    reports_usage: bool
    """Whether the end of a stream holds the number of tokens."""
    names_ids: bool
    """Whether tokens are told as `token_id:NUMBER`."""

    @property
    def is_chat(self) -> bool:
        """Whether a conversation is answered."""
        return self.messages is not None


def read_chat(body: bytes) -> Asked:
    """Returns what a request for a chat completion asks for; raises `Refusal`."""
    fields = Fields(body)
    messages = read_messages(fields)
    wants = fields.flag("logprobs")
    likeliest = fields.count("top_logprobs", 0, MOST_LIKELY)
    if likeliest is not None and not wants:
        raise Refusal("top_logprobs needs logprobs=true", param="top_logprobs")
    asked = _read(fields, messages=messages, prompt=None, likeliest=(likeliest or 0) if wants else None)
    fields.close()
    return asked


def read_completion(body: bytes) -> Asked:
    """Returns what a request for a completion asks for; raises `Refusal`."""
    fields = Fields(body)
    prompt = read_prompt(fields)
    asked = _read(fields, messages=None, prompt=prompt, likeliest=fields.count("logprobs", 0, MOST_LIKELY))
    fields.close()
    return asked


def read_messages(fields: Fields) -> list[Message]:
    """Returns a conversation whose last message is the user's."""
    messages = fields.take("messages", "a list of messages", lambda value: isinstance(value, list) and bool(value))
    if messages is None:
        raise Refusal("messages is missing: the conversation to answer", param="messages")
    read = [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if read[-1]["role"] != "user":
        raise Refusal(f"the last message must be the user's, not of {read[-1]['role']}", param="messages")
    return read


def read_prompt(fields: Fields) -> str | list[int]:
    """Returns one prompt: a text, or the ids of tokens."""
    prompt = fields.take("prompt", "a text or a list of token ids", lambda value: isinstance(value, str | list))
    if isinstance(prompt, list) and prompt and all(isinstance(part, str | list) for part in prompt):
        if len(prompt) > 1:
            raise Refusal(f"prompt holds {len(prompt)} prompts; send one a request", param="prompt")
        prompt = prompt[0]
    if prompt is None:
        raise Refusal("prompt is missing: the text to continue", param="prompt")
    if not (is_text(prompt) if isinstance(prompt, str) else all(map(is_whole, prompt))):
        raise Refusal("prompt must be a text or a list of token ids", param="prompt", code="invalid_type")
    return prompt


def _read(fields: Fields, **read: Any) -> Asked:
    """Reads what both kinds of requests have."""
    model = fields.text("model")
    if model is None:
        raise Refusal("model is missing: /v1/models lists the names", param="model")
    limits = fields.count("max_tokens", 1), fields.count("max_completion_tokens", 1)
    if None not in limits and limits[0] != limits[1]:
        raise Refusal("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
    top_k = fields.count("top_k", -1)
    sampling = Sampling(
        fields.number("temperature", 0),
        fields.number("top_p", 0, 1, above=True),
        None if top_k is None else max(top_k, 0),
        fields.take("seed", "a whole number", is_whole),
    )
    streams = fields.flag("stream")
    options = fields.take("stream_options", "an object", lambda value: isinstance(value, dict), {})
    if options and not streams:
        raise Refusal("stream_options needs stream=true", param="stream_options")
    usage = options.get("include_usage", False)
    if not isinstance(usage, bool) or any(name != "include_usage" for name in options):
        raise Refusal("stream_options takes include_usage, true or false, and nothing else", param="stream_options")
    return Asked(
        model=model,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        sampling=sampling,
        stops=_read_stops(fields),
        streams=streams,
        reports_usage=usage,
        names_ids=fields.flag("return_tokens_as_token_ids"),
        **read,
    )


def _read_stops(fields: Fields) -> tuple[str, ...]:
    def fits(value: Any) -> bool:
        texts = value if isinstance(value, list) else [value]
        return len(texts) <= MOST_STOPS and all(is_text(text) and text for text in texts)

    stop = fields.take("stop", f"a text or a list of up to {MOST_STOPS} texts, none empty", fits, [])
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise Refusal(f"{where} must be an object with role and content, got {brief(message)}", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{where}.role must be one of {', '.join(ROLES)}, got {brief(role)}", param="messages")
    for name, value in message.items():
        if name not in MESSAGE_KEYS and value not in (None, []):
            raise Refusal(f"{where}.{name} is not served here; leave it out", param="messages")
    read: Message = {"role": ROLES[role], "content": _read_content(message.get("content"), f"{where}.content")}
    if (name := message.get("name")) is not None:
        if not is_text(name):
            raise Refusal(f"{where}.name must be a text, got {brief(name)}", param="messages")
        read["name"] = name
    return read


def _read_content(content: Any, where: str) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[Any] = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts
    ]
    if not all(map(is_text, texts)):
        raise Refusal(
            f"{where} must be a text, or a list of parts of type text, got {brief(content)}", param="messages"
        )
    return "".join(texts)
