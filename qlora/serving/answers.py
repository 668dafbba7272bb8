"""Answers in OpenAI's form: whole ones, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.generation.engine import Score
from qlora.serving.asked import Asked
from qlora.serving.worker import Part
from qlora.upstream.transformers import decode

Json = dict[str, Any]


@dataclass
class Form:
    """The form of one answer."""

    asked: Asked
    tokenizer: PreTrainedTokenizerBase
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    offset: int = 0
    """Characters of the tokens that were told already."""

    def whole(self, parts: Sequence[Part]) -> Json:
        """Returns an answer of which all parts are there."""
        text, tokens = "".join(part.text for part in parts), [token for part in parts for token in part.tokens]
        if self.asked.is_chat:
            choice: Json = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            choice = {"text": text}
        choice |= {"index": 0, "logprobs": self._logprobs(tokens), "finish_reason": parts[-1].finish}
        return {**self._head(is_chunk=False), "choices": [choice], "usage": self._usage(parts[-1])}

    def opening(self) -> list[Json]:
        """Returns the chunks that come before any text."""
        return [self._chunk({"role": "assistant", "content": ""}, None, None)] if self.asked.is_chat else []

    def chunk(self, part: Part) -> Json:
        """Returns the chunk of a part."""
        delta: Any = ({"content": part.text} if part.text else {}) if self.asked.is_chat else part.text
        return self._chunk(delta, self._logprobs(part.tokens), part.finish)

    def closing(self, part: Part) -> list[Json]:
        """Returns the chunks that come after the last part."""
        if not self.asked.reports_usage:
            return []
        return [{**self._head(is_chunk=True), "choices": [], "usage": self._usage(part)}]

    def _chunk(self, said: Any, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"delta" if self.asked.is_chat else "text": said}
        choice |= {"index": 0, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.asked.reports_usage else {}
        return {**self._head(is_chunk=True), "choices": [choice], **usage}

    def _head(self, *, is_chunk: bool) -> Json:
        kind = ("chat.completion" + ".chunk" * is_chunk) if self.asked.is_chat else "text_completion"
        number = f"{'chatcmpl' if self.asked.is_chat else 'cmpl'}-{self.number}"
        return {"id": number, "object": kind, "created": self.created, "model": self.asked.model}

    def _usage(self, last: Part) -> Json:
        prompt, answer = self.prompt_tokens, last.length
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _logprobs(self, tokens: Sequence[tuple[int, Score]]) -> Json | None:
        if self.asked.likeliest is None:
            return None
        if self.asked.is_chat:
            return {"content": [self._entry(token, score) for token, score in tokens], "refusal": None}
        texts, offsets = [self._text(token) for token, _ in tokens], []
        for token, _ in tokens:
            offsets.append(self.offset)
            self.offset += len(token_text(self.tokenizer, token))
        # Several tokens may be written alike, as halves of a character are: the likeliest one stands for them.
        top = [{self._text(token): value for token, value in reversed(score.likeliest)} for _, score in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for _, score in tokens],
            "top_logprobs": top if self.asked.likeliest else None,
            "text_offset": offsets,
        }

    def _entry(self, token: int, score: Score) -> Json:
        likeliest = [self._told(other, value) for other, value in score.likeliest]
        return {**self._told(token, score.logprob), "top_logprobs": likeliest}

    def _told(self, token: int, logprob: float) -> Json:
        text = token_text(self.tokenizer, token)
        is_whole = "\ufffd" not in text
        return {"token": self._text(token), "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self.asked.names_ids else token_text(self.tokenizer, token)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns the text of a token behind another one: some tokenizers leave out the blank before a first word."""
    alone, twice = decode(tokenizer, [token]), decode(tokenizer, [token, token])
    return twice.removeprefix(alone) if twice.startswith(alone) else alone


def event(data: Json) -> bytes:
    """Returns a chunk as a server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
"""The event that ends a stream."""
