"""Asks a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, Ollama, ours."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora.errors import ResourceError
from qlora.text import brief_text
from qlora.upstream.transformers import decode
from qlora.verify.engine import Continuation, Likely, Message, Served

TIMEOUT = 600
"""Seconds: a large model may compile or load at its first request."""
FEWER = (20, 5, 1)
"""What a server is asked for that refuses the number of likely tokens: vLLM allows 20, OpenAI's own completions 5."""
TOKEN_ID = "token_id:"
"""How vLLM names a token by its id."""
KEY_VARIABLE = "OPENAI_API_KEY"


class Refused(Exception):
    """Raised when a server answers with an error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class OpenAIServer:
    """A server at an address."""

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, *, top: int, model: str | None = None) -> None:
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        self.root = self.url.removesuffix("/v1")
        self.tokenizer, self.top = tokenizer, top
        self._by_text: dict[str, list[int]] | None = None
        self._names_ids = True
        self.served = self._find(model)

    def _find(self, model: str | None) -> Served:
        """Returns the model of that name, or the only one; raises `ResourceError` where the server has none such."""
        try:
            listed = self._get(f"{self.url}/models")
        except Refused as error:
            raise ResourceError(
                f"verify.engine={self.url}: the server answers /models with {error}; it must speak OpenAI's protocol"
            ) from error
        entries = {str(entry["id"]): entry for entry in listed.get("data", []) if isinstance(entry, Mapping)}
        if model is None and len(entries) != 1:
            raise ResourceError(
                f"verify.engine={self.url}: the server has the models {', '.join(entries) or 'none'}; name one with "
                "verify.model=NAME"
            )
        name = model or next(iter(entries))
        if name not in entries:
            raise ResourceError(
                f"verify.model={name}: the server at {self.url} has {', '.join(entries)}; name one of them"
            )
        meta = entries[name].get("meta") or {}
        return Served(self.url, name, meta.get("ftype"), details={"owned_by": entries[name].get("owned_by")})

    def next_tokens(self, ids: Sequence[int]) -> list[Likely]:
        """Returns the likeliest tokens behind a prompt; raises `ResourceError` where there are no probabilities."""
        answer = self._complete(ids, 1)
        entries = _top_tokens(answer.get("logprobs"))
        if not entries:
            raise ResourceError(
                f"verify.engine={self.url}: the server returns no logprobs for /completions, so nothing can be "
                "compared; start it with them, or verify another engine"
            )
        return [Likely(self._ids(entry), float(entry["logprob"])) for entry in entries]

    def chat_tokens(self, messages: Sequence[Message]) -> list[int] | int:
        """Returns the tokens of a chat by llama.cpp's or vLLM's own addresses, else their number by the usage."""
        try:
            prompt = self._post(f"{self.root}/apply-template", {"messages": list(messages)})["prompt"]
            asked = {"content": prompt, "add_special": True, "parse_special": True}
            return [int(token) for token in self._post(f"{self.root}/tokenize", asked)["tokens"]]
        except (Refused, KeyError, TypeError):
            pass
        try:
            asked = {"model": self.served.what, "messages": list(messages), "add_generation_prompt": True}
            return [int(token) for token in self._post(f"{self.root}/tokenize", asked)["tokens"]]
        except (Refused, KeyError, TypeError):
            pass
        request = {"model": self.served.what, "messages": list(messages), "max_tokens": 1}
        try:
            return int(self._post(f"{self.url}/chat/completions", request)["usage"]["prompt_tokens"])
        except (Refused, KeyError, TypeError) as error:
            raise ResourceError(
                f"verify.engine={self.url}: the server says nothing of the tokens of a chat "
                f"({brief_text(str(error), 160)}); its chat template cannot be compared"
            ) from error

    def continue_greedily(self, ids: Sequence[int], count: int) -> Continuation:
        """Returns what follows a prompt."""
        answer = self._complete(ids, count)
        return Continuation(str(answer.get("text") or ""), answer.get("finish_reason") == "stop")

    def close(self) -> None:
        """Does nothing: the server is another's."""

    def _complete(self, ids: Sequence[int], count: int) -> dict[str, Any]:
        request = {"model": self.served.what, "prompt": [int(token) for token in ids], "max_tokens": count}
        request |= {"temperature": 0, "logprobs": self.top}
        while True:
            more = {"return_tokens_as_token_ids": True} if self._names_ids else {}
            try:
                answer: dict[str, Any] = self._post(f"{self.url}/completions", request | more)["choices"][0]
                return answer
            except Refused as error:
                fewer = next((number for number in FEWER if number < self.top), None)
                if error.code in (400, 422) and "logprobs" in str(error) and fewer is not None:
                    self.top = request["logprobs"] = fewer
                elif error.code in (400, 422) and self._names_ids:
                    self._names_ids = False
                else:
                    raise ResourceError(
                        f"verify.engine={self.url}: the server refuses a prompt of token ids "
                        f"({brief_text(str(error), 160)}), so what it reads cannot be compared token by token"
                    ) from error
            except (KeyError, IndexError, TypeError) as error:
                raise ResourceError(
                    f"verify.engine={self.url}: the answer of /completions has no choices; it must speak OpenAI's "
                    "protocol"
                ) from error

    def _ids(self, entry: Mapping[str, Any]) -> tuple[int, ...]:
        if isinstance(entry.get("id"), int):
            return (int(entry["id"]),)
        text = str(entry["token"])
        if text.startswith(TOKEN_ID):
            return (int(text.removeprefix(TOKEN_ID)),)
        if self._by_text is None:
            self._by_text = {}
            for index in range(len(self.tokenizer)):
                self._by_text.setdefault(decode(self.tokenizer, [index]), []).append(index)
                token = self.tokenizer.convert_ids_to_tokens(index)
                if isinstance(token, str):
                    self._by_text.setdefault(token, []).append(index)
        return tuple(dict.fromkeys(self._by_text.get(text, ())))

    def _get(self, url: str) -> Any:
        return self._send(urllib.request.Request(url, headers=_headers()))

    def _post(self, url: str, body: Mapping[str, Any]) -> Any:
        return self._send(urllib.request.Request(url, json.dumps(body).encode(), _headers()))

    def _send(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise Refused(error.code, brief_text(error.read().decode(errors="replace"), 300)) from error
        except (OSError, HTTPException, ValueError) as error:
            raise ResourceError(
                f"verify.engine={self.url}: no answer of a server there ({getattr(error, 'reason', None) or error}); "
                "start it, or check the address"
            ) from error


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _top_tokens(logprobs: Any) -> list[Mapping[str, Any]]:
    """Returns the likeliest first tokens of an answer, in the form of chats or in the older one of completions."""
    if not isinstance(logprobs, Mapping):
        return []
    if content := logprobs.get("content"):
        return list(content[0].get("top_logprobs") or [])
    tops = logprobs.get("top_logprobs") or []
    first = tops[0] if tops else None
    if isinstance(first, Mapping):
        return [{"token": token, "logprob": value} for token, value in first.items()]
    return list(first or [])
